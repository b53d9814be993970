"""A disk that is really full while a script trains: a small tmpfs; and a limit on the size of files."""

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import assert_same_run, curves
from scripts import call, newest
from setups import read_metrics

from training import trainers
from training.storage import saving
from utils.runs.finding import step_checkpoints
from utils.runs.manifest import fault_of
from utils.runs.metrics_log import MetricsLog

pytestmark = pytest.mark.slow

# A checkpoint of gpt2-nano with its optimizer takes 9 MB: two fit on the disk below, three do not.
ARGUMENTS = "--max-steps 6 --save-every 2 --eval-every 100 --keep 1 -b 4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that always had room."""
    folder = tmp_path_factory.mktemp("roomy")
    assert call("sft", f"-n full {ARGUMENTS}", folder).code == 0
    return newest(folder, "sft_full")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here ({mounted.stderr.strip()}); the file-size limit stands in")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def at_step(step: int, do, monkeypatch) -> None:
    """Call `do` while the trainer is in the midst of a step."""
    original = trainers.SFTTrainer.train_step

    def train_step(self, rows):
        if self.step == step - 1:
            do()
        return original(self, rows)

    monkeypatch.setattr(trainers.SFTTrainer, "train_step", train_step)


def fill(disk: Path, leave: int) -> None:
    """Put a file there that leaves so many bytes free."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))


@pytest.mark.parametrize("looks_first", [True, False], ids=["free space is seen", "the write fails"])
@pytest.mark.parametrize("leave", [5_000_000, 0], ids=["some room", "none"])
def test_the_run_stops_and_goes_on_when_there_is_room(disk, whole, leave: int, looks_first: bool, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(3, lambda: fill(disk, leave), patch)
        if not looks_first:  # another process fills the disk between the look and the write
            patch.setattr(saving.Saver, "_look_for_room", lambda self, needed: None)
        stopped = call("sft", f"-n full {ARGUMENTS}", disk)
    run = newest(disk, "sft_full")
    assert stopped.code == 1, stopped.err
    assert "Traceback" not in stopped.err
    error = [line for line in stopped.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "step_00000004: could not be saved; it needs" in error[0] and "are missing" in error[0]
    (kept,) = step_checkpoints(run)
    assert error[0].count(f"the newest whole checkpoint is {kept}") == 1
    assert kept.name == "step_00000002" and fault_of(kept) is None
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]  # nothing half
    (disk / "ballast").unlink()
    assert call("sft", f"-n full {ARGUMENTS} --resume auto", disk).code == 0
    assert_same_run(whole, run)


def test_training_goes_on_without_the_checkpoint(disk, whole, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(3, lambda: fill(disk, 0), patch)
        at_step(5, (disk / "ballast").unlink, patch)
        result = call("sft", f"-n full {ARGUMENTS} --on-save-error continue", disk)
    run = newest(disk, "sft_full")
    assert result.code == 0, result.err
    assert "step_00000004: could not be saved" in result.err and "training goes on" in result.err
    assert_same_run(whole, run)


def test_figures_wait_for_room(disk, capfd) -> None:
    log = MetricsLog(disk)
    log.log(1, {"x": 1})
    fill(disk, 0)
    for step in range(2, 200):  # more than what is left of the files' last blocks
        log.log(step, {"x": step, "a": 1.0, "long name of a figure": 2.0})
    warned = capfd.readouterr().err
    assert warned.count("metrics.jsonl: No space left on device; what belongs there is kept in memory") == 1
    with pytest.raises(OSError, match="No space left"):
        log.sync()
    assert all(json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines())
    (disk / "ballast").unlink()
    log.sync()
    assert [line["step"] for line in read_metrics(disk)] == list(range(1, 200))
    assert [step for step, _ in curves(disk)["x"]] == list(range(1, 200))


def test_a_full_disk_at_the_start_is_told_in_one_line(disk) -> None:
    fill(disk, 0)
    error = call("sft", f"-n full {ARGUMENTS}", disk / "new").error
    assert f"--runs-dir {disk / 'new'}: cannot write there (No space left on device)" in error


def test_a_file_that_may_not_grow(tmp_path, whole, monkeypatch) -> None:
    """RLIMIT_FSIZE: the weights (3 MB) fit, the optimizer's state (6 MB) does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard)), patch)
        try:
            stopped = call("sft", f"-n full {ARGUMENTS}", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = newest(tmp_path, "sft_full")
    assert stopped.code == 1 and "Traceback" not in stopped.err
    assert "step_00000004: could not be saved; it needs" in stopped.err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert fault_of(run / "checkpoints" / "step_00000002") is None
    assert call("sft", f"-n full {ARGUMENTS} --resume auto", tmp_path).code == 0
    assert_same_run(whole, run)
