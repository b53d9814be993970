"""Checkpoints: what is kept, that a reader never sees half of one, and random generators put back."""

import errno
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from setups import LetterTokenizer, assert_equal_weights, weights

from config.user_error import RunStopped, UserError
from models.families import load_checkpoint
from models.weights.checkpoint import describe
from training.storage.saving import STATE, Saver, capture_rng, load_state, newest_whole, restore_rng
from utils.runs.durable import Disk
from utils.runs.finding import find_checkpoint, step_checkpoints
from utils.runs.manifest import fault_of


def saver(folder, make_model, keep: int = 2, **models) -> Saver:
    return Saver(folder, models or {"": make_model()}, LetterTokenizer(), {"stage": "sft"}, keep)


def test_the_newest_steps_are_kept(tmp_path, make_model) -> None:
    writer = saver(tmp_path, make_model, keep=2)
    for step in (1, 2, 10, 9):
        writer.save_step(step, {"step": step, "best": 0.5, "optimizer": {}, "scaler": {}, "rng": {}})
    assert [p.name for p in step_checkpoints(tmp_path)] == ["step_00000009", "step_00000010"]
    assert load_state(tmp_path / "checkpoints" / "step_00000010")["step"] == 10
    assert describe(tmp_path / "checkpoints" / "step_00000010")["step"] == 10


def test_final_and_best_stand_beside_them_and_are_replaced_whole(tmp_path, make_model) -> None:
    actor, critic = make_model(), make_model("critic", seed=1)
    writer = saver(tmp_path, make_model, **{"": actor, "critic": critic})
    writer.save_best(3, "eval/loss", 1.5)
    (tmp_path / "best" / "left-over").write_text("of the last best")
    writer.save_best(7, "eval/loss", 1.25)
    writer.save_final(8, {"step": 8})
    best, final = describe(tmp_path / "best"), describe(tmp_path / "final")
    assert (best["step"], best["eval/loss"], best["stage"]) == (7, 1.25, "sft") and final["step"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "final"]  # nothing half-written stays
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "critic",
        "manifest.json",
        "model.json",
        "model.safetensors",
        "tokenizer",
    ]
    assert (tmp_path / "final" / STATE).is_file()
    assert_equal_weights(weights(load_checkpoint(tmp_path / "final")), weights(actor))
    assert_equal_weights(weights(load_checkpoint(tmp_path / "final" / "critic", "critic")), weights(critic))


class Broken(Disk):
    """Refuses one operation of a save."""

    def __init__(self, fails_at: int, error: OSError) -> None:
        self.left, self.error = fails_at, error

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise self.error

    def write(self, path, produce) -> None:
        self._count()
        super().write(path, produce)

    def sync(self, path) -> None:
        self._count()
        super().sync(path)

    def rename(self, old, new) -> None:
        self._count()
        super().rename(old, new)

    def remove(self, folder) -> None:
        self._count()
        super().remove(folder)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_anywhere_leaves_a_whole_checkpoint(tmp_path, make_model, reason: int, monkeypatch) -> None:
    model = make_model()
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for moment in range(200):
        run = tmp_path / str(moment)
        run.mkdir()
        writer = saver(run, make_model, **{"": model})
        writer.save_step(2, {"step": 2})
        writer.save_best(2, "eval/loss", 2.0)
        writer.disk = Broken(moment, OSError(reason, os.strerror(reason)))
        try:
            writer.save_best(4, "eval/loss", 1.0)
            break
        except RunStopped as error:
            assert os.strerror(reason) in str(error) and "--on-save-error continue" in str(error), moment
            assert f"the newest whole checkpoint is {run}/checkpoints/step_00000002" in str(error)
        best = find_checkpoint(str(run / "best"), str(run), "-p")
        assert fault_of(best) is None and describe(best)["step"] in (2, 4), moment
        writer.disk, writer.on_error = Disk(), "continue"
        assert writer.save_best(6, "eval/loss", 0.5)
        assert sorted(p.name for p in run.iterdir()) == ["best", "checkpoints"], moment
    assert 10 < moment < 199


def test_a_run_may_go_on_without_a_checkpoint(tmp_path, make_model, capfd) -> None:
    writer = saver(tmp_path, make_model)
    writer.on_error = "continue"
    writer.disk = Broken(3, OSError(errno.ENOSPC, "No space left on device"))
    assert not writer.save_step(2, {"step": 2}) and writer.saved_step == -1
    warned = capfd.readouterr().err
    assert warned.count("\n") == 1 and "step_00000002: could not be saved" in warned and "training goes on" in warned
    assert writer.save_step(4, {"step": 4}) and writer.saved_step == 4
    assert [p.name for p in step_checkpoints(tmp_path)] == ["step_00000004"]
    writer.disk = Broken(3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunStopped, match="final: could not be saved"):  # nothing is left to go on with
        writer.save_final(5, {"step": 5})


def test_room_is_looked_for_before_anything_is_written(tmp_path, make_model, monkeypatch) -> None:
    writer = saver(tmp_path, make_model)
    state = {"step": 2, "moments": [torch.zeros(1_000_000)]}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000))
    with pytest.raises(RunStopped, match=r"it needs 5\.\d\d MB and 3\.00 MB are free, so 2\.\d\d MB are missing"):
        writer.save_step(2, state)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_torn_checkpoint_is_not_counted_not_deleted_and_not_written_over(tmp_path, make_model, capfd) -> None:
    writer = saver(tmp_path, make_model, keep=2)
    for step in (1, 2, 3):
        writer.save_step(step, {"step": step})
    torn = tmp_path / "checkpoints" / "step_00000003"
    (torn / "model.safetensors").write_bytes(b"torn")
    found, (fault,) = newest_whole(tmp_path)
    assert found.name == "step_00000002" and fault.startswith(f"{torn} model.safetensors has 4 bytes")
    writer.save_step(4, {"step": 4})
    assert [p.name[-1] for p in step_checkpoints(tmp_path)] == ["2", "3", "4"]  # two whole ones, and the torn one
    again = saver(tmp_path, make_model, keep=1)  # another process
    again.save_step(3, {"step": 3})
    assert [p.name[-1] for p in step_checkpoints(tmp_path)] == ["4"]  # step 3 is older, and goes
    assert (tmp_path / "checkpoints" / "step_00000003.torn1" / "model.safetensors").read_bytes() == b"torn"
    assert "is not whole and is kept as step_00000003.torn1" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_a_save_makes_no_second_copy_of_the_tensors(tmp_path, make_model) -> None:
    model = make_model("lm", n_embd=256, n_head=4, vocab_size=5000)
    size = sum(p.nbytes for p in model.parameters())
    state = {"step": 1, "moments": [torch.zeros_like(p) for p in model.parameters()]}
    writer = saver(tmp_path, make_model, **{"": model})
    writer.save_step(1, state)  # what a first save allocates for good
    assert size > 10e6
    with Peak() as peak:
        writer.save_step(2, state)
    assert peak.grown < size / 2, f"{peak.grown / 1e6:.1f} MB more for {2 * size / 1e6:.1f} MB of tensors"


class Peak:
    """Growth of this process's memory inside a block, from the kernel's own high-water mark."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *error) -> None:
        self.grown = self._read("VmHWM") - self.before

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def test_random_generators_come_back_through_a_file(tmp_path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.normal()  # leaves half a pair behind
    torch.save(capture_rng(), tmp_path / "rng.pt")
    expected = random.random(), np.random.normal(), np.random.random(), torch.rand(3).tolist()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), np.random.normal(), np.random.random(), torch.rand(3).tolist()) == expected


def test_a_state_that_cannot_be_read_is_the_users_error(tmp_path) -> None:
    with pytest.raises(UserError, match=f"--resume {tmp_path}: no {STATE}"):
        load_state(tmp_path)
    (tmp_path / STATE).write_bytes(b"PK torn")
    with pytest.raises(UserError, match="cannot be read .*earlier checkpoint"):
        load_state(tmp_path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_in_a_state_is_unpickled(tmp_path) -> None:
    torch.save({"step": Evil()}, tmp_path / STATE)
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path)
