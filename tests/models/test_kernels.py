"""RLHF_PLAIN: each faster form left out by name, with the same results to within rounding."""

import contextlib

import pytest
import torch
from every_family import EVERY

from config.user_error import UserError
from models import kernels
from models.cache import KVCache
from models.cpu import activation, attention, linear, packing
from models.families import new_model

FAMILIES = EVERY

# What must run where a kernel is used and must not where it is left out, and the precision of that.
FASTER = {
    "attention": ([(attention, "causal_by_blocks"), (attention, "one_query")], torch.bfloat16),
    "linear": ([(linear, "linear"), (linear, "product"), (linear, "fill_rows")], torch.float32),
    "gelu": ([(activation, "gelu")], torch.bfloat16),
    "packing": ([(packing, "pack"), (packing, "packed_linear"), (packing, "frozen_linear")], torch.float32),
}


def test_every_kernel_is_tested():
    assert tuple(FASTER) == kernels.KERNELS


@pytest.mark.parametrize(
    ("setting", "names"),
    [("", set()), ("gelu", {"gelu"}), (" gelu, linear,", {"gelu", "linear"}), ("all", set(kernels.KERNELS))],
)
def test_kernels_are_named_with_commas_between_them(setting, names):
    assert kernels.plain_kernels(setting) == names


def test_an_unknown_name_is_told_with_the_choices(make_model, monkeypatch):
    config = make_model().config
    monkeypatch.setattr(kernels, "PLAIN", kernels.plain_kernels("gelu,softmax"))
    with pytest.raises(UserError, match="RLHF_PLAIN=softmax: choose from attention, linear, gelu, packing, or all"):
        new_model(config)


def outputs(make_model, dtype: torch.dtype) -> list[torch.Tensor]:
    """A decoding step after rows have left, states, logits, and what training gets."""
    half = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    model, ids = make_model(n_embd=32, std=0.1, lora_rank=2), torch.arange(48).view(3, 16)
    model.freeze_weights("lora")
    with half:
        with torch.no_grad():
            cache = KVCache.allocate(model.config, 3, 20, ids.device, kernels.cache_dtype("cpu", dtype))
            model.hidden(ids, None, cache)
            decoder = model.decoder(cache)
            decoder.keep_rows(torch.tensor([2, 0]))
            step, hidden = decoder.step(torch.tensor([4, 9])), model.hidden(ids)
            logits = model.lm_head(hidden)
        loss = model(ids, at=torch.arange(47), targets=ids.flatten()[1:])
    loss.backward()
    return [step, hidden, logits, loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", FASTER)
def test_a_kernel_left_out_is_torchs_own_way(name, make_model, family, monkeypatch):
    if name == "gelu" and family != "gpt2":
        pytest.skip("only GPT-2 has a GELU")
    monkeypatch.setattr(linear, "_MKL_IS_SLOW", True)  # as on an AMD processor
    if name == "packing":  # as on a processor with bf16: fp32 has a packed layout wherever oneDNN is
        monkeypatch.setattr(packing, "serves", lambda device, dtype: dtype == torch.float32)
    ways, dtype = FASTER[name]
    calls = []
    for module, function in ways:
        original = getattr(module, function)

        def watched(*args, function=function, original=original):
            calls.append(function)
            return original(*args)

        monkeypatch.setattr(module, function, watched)
    monkeypatch.setattr(kernels, "PLAIN", set())
    fast = outputs(make_model, dtype)
    assert set(calls) == {function for _, function in ways}
    calls.clear()
    monkeypatch.setattr(kernels, "PLAIN", {name})
    plain = outputs(make_model, dtype)
    assert not calls
    assert len(fast) == len(plain) == 4 + 2 * {"gpt2": 4, "llama": 7}[family] * 2
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).norm() <= (5e-2 if dtype == torch.bfloat16 else 1e-4) * b.norm()


def test_with_all_left_out_keys_lie_as_torch_wants_them(monkeypatch):
    cpu = torch.device("cpu")
    assert kernels.empty_keys(2, 3, 5, 4, cpu, torch.float32).transpose(2, 3).is_contiguous()
    assert kernels.cache_dtype("cpu", torch.bfloat16) == torch.float32
    monkeypatch.setattr(kernels, "PLAIN", kernels.plain_kernels("all"))
    keys = kernels.empty_keys(2, 3, 5, 4, cpu, torch.float32)
    assert keys.shape == (2, 3, 5, 4) and keys.is_contiguous()
    assert kernels.cache_dtype("cpu", torch.bfloat16) == kernels.cache_dtype("cuda", torch.bfloat16) == torch.bfloat16
