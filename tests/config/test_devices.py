"""Which device and precision a command takes."""

import pytest
import torch

from config.devices import choose_device, choose_dtype
from config.user_error import UserError


def test_device_and_dtype_are_chosen_by_what_is_there(monkeypatch) -> None:
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert choose_device("auto") == "cuda"
    there["cuda"] = False
    assert choose_device("auto") == "mps"
    there["mps"] = False
    assert choose_device("auto") == "cpu" == choose_device("cpu")
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")

    for capability, auto in (((8, 0), "bf16"), ((9, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert choose_dtype("auto", "cuda") == auto
        if auto == "fp16":  # a T4 says that it supports bf16, and emulates it
            with pytest.raises(UserError, match="--dtype bf16"):
                choose_dtype("bf16", "cuda")
        assert choose_dtype("fp32", "cuda") == "fp32"
    assert choose_dtype("auto", "cpu") == "fp32" == choose_dtype("auto", "mps")
    assert choose_dtype("bf16", "cpu") == "bf16"
    with pytest.raises(UserError, match="--dtype fp16: needs CUDA"):
        choose_dtype("fp16", "cpu")
