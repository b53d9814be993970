"""The seal of a checkpoint: what was changed, lost or added after it was saved is told."""

import json
import os
from pathlib import Path

import pytest

from config.user_error import UserError
from models.gpt import GPT, GPTCritic
from models.weights.checkpoint import save_model
from utils.runs.manifest import MANIFEST, fault_of, write_manifest


@pytest.fixture
def checkpoint(tmp_path, make_model) -> Path:
    folder = tmp_path / "checkpoint"
    save_model(make_model(), folder, {"sealed": True})
    save_model(make_model("critic"), folder / "critic", {"sealed": True})
    (folder / "state").write_bytes(bytes(1000))
    write_manifest(folder / MANIFEST)
    return folder


def test_what_was_saved_is_whole(checkpoint) -> None:
    assert fault_of(checkpoint) is None
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    names = ["model.json", "model.safetensors"]
    assert sorted(listed) == sorted([*names, *(f"critic/{name}" for name in names), "state"])
    GPT.from_checkpoint(checkpoint), GPTCritic.from_checkpoint(checkpoint / "critic")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "critic/model.safetensors", "state"])
@pytest.mark.parametrize(
    "harm, told", [(flip, "not what was saved"), (cut, "bytes, manifest.json says"), (os.remove, "is missing")]
)
def test_every_change_is_told(checkpoint, name: str, harm, told: str) -> None:
    harm(checkpoint / name)
    fault = fault_of(checkpoint)
    assert fault.startswith(f"{name} ") and told in fault
    cls, folder = (GPTCritic, checkpoint / "critic") if name.startswith("critic") else (GPT, checkpoint)
    if name == "state":
        cls.from_checkpoint(folder)  # a model is not asked about files that it does not read
        return
    with pytest.raises(UserError, match="take another checkpoint|no model.json|not a model description"):
        cls.from_checkpoint(folder)


def test_a_file_is_read_once_whatever_it_is_renamed_to_and_again_when_it_changes(checkpoint, monkeypatch) -> None:
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    with monkeypatch.context() as patch:
        patch.delattr("hashlib.file_digest")
        assert fault_of(moved) is None
    written = (moved / "state").stat().st_mtime_ns
    flip(moved / "state")
    os.utime(moved / "state", ns=(written, written))
    assert "is not what was saved" in fault_of(moved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {"size": 1}}}']
)
def test_a_manifest_that_is_none(checkpoint, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert "cannot be read" in fault_of(checkpoint)
    with pytest.raises(UserError, match="manifest.json: cannot be read"):
        GPT.from_checkpoint(checkpoint)


def test_a_checkpoint_without_its_manifest_is_half_copied(checkpoint, tmp_path, make_model) -> None:
    (checkpoint / MANIFEST).unlink()
    assert "has no manifest.json" in fault_of(checkpoint)
    for cls, folder in ((GPT, checkpoint), (GPTCritic, checkpoint / "critic")):
        with pytest.raises(UserError, match="half copied; copy the whole checkpoint folder"):
            cls.from_checkpoint(folder)
    save_model(make_model(), tmp_path / "plain")  # a model folder on its own has none
    GPT.from_checkpoint(tmp_path / "plain")


def test_a_model_that_the_manifest_does_not_list(checkpoint) -> None:
    listed = json.loads((checkpoint / MANIFEST).read_text())
    del listed["files"]["model.safetensors"]
    (checkpoint / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(UserError, match="manifest.json lists no model.safetensors"):
        GPT.from_checkpoint(checkpoint)
