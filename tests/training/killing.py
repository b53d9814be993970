"""What a kill leaves on the disk, and whether a run that was gone on with is the run that was never stopped."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from setups import read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import trainers
from utils.runs.durable import Disk


class Camera(Disk):
    """Does the file operations, and looks at the disk before, in the midst of and after each.

    A copy of the folder is what SIGKILL would leave there at that moment: no handler and no cleanup comes after it.

    Args:
        look: called at every moment with the name of the operation.
    """

    def __init__(self, look: Callable[[str], None]) -> None:
        self.look = look

    def write(self, path: Path, produce) -> None:
        before = _files(path.parent)
        self.look(f"before writing {path.name}")
        super().write(path, produce)
        for file in sorted(_files(path.parent) - before):
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            self.look(f"while writing {file.name}")
            file.write_bytes(whole)
        self.look(f"after writing {path.name}")

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.look(f"after syncing {path.name}")

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.look(f"after renaming {old.name} to {new.name}")

    def remove(self, folder: Path) -> None:
        first = min(_files(folder))
        first.unlink()
        self.look(f"while removing {folder.name}")
        super().remove(folder)
        self.look(f"after removing {folder.name}")


def _files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file()}


class Album:
    """Copies of a run's folder, one per moment."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.moments: list[tuple[str, Path]] = []

    def look(self, what: str) -> None:
        copy = self.folder / f"{len(self.moments):04d}" / self.run.name
        self.moments.append((what, copy_of_runs(self.run, copy)))


def copy_of_runs(folder: Path, to: Path) -> Path:
    """A copy of a run's folder, or of a folder of runs, made in no time: links and not copies, for every file of a run
    but the growing ones is written anew and never changed. Whoever changes one should `rewrite` it."""
    return shutil.copytree(folder, to, copy_function=_link_unless_growing)


def rewrite(path: Path, data: bytes) -> None:
    """Change a file of `copy_of_runs`, and not that which it was copied from."""
    path.unlink()
    path.write_bytes(data)


def edit_record(path: Path, change: Callable[[dict], object]) -> None:
    """`rewrite` a JSON file (hyperparams.json, model.json) after `change` was made to its contents."""
    record = json.loads(path.read_text())
    change(record)
    rewrite(path, json.dumps(record).encode())


def _link_unless_growing(source: str, target: str) -> None:
    growing = source.endswith((".jsonl", ".lock")) or "tfevents" in source
    (shutil.copyfile if growing or ".writing" in source else os.link)(source, target)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All points that TensorBoard shows but for the clock's."""
    accumulator = EventAccumulator(str(run / "logs"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("time/")]
    found = {tag: [(p.step, repr(p.value)) for p in accumulator.Scalars(tag)] for tag in tags}
    texts = accumulator.Tags()["tensors"]
    return found | {tag: [(p.step, p.tensor_proto.string_val[0]) for p in accumulator.Tensors(tag)] for tag in texts}


def weights(run: Path) -> dict[Path, bytes]:
    """The weight files of final/ and best/."""
    files = [p for where in ("final", "best") for p in (run / where).rglob("*.safetensors")]
    return {p.relative_to(run): p.read_bytes() for p in files}


def figures(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(run)]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bits in the weights of final/ and best/, equal figures and texts, equal curves; the clock aside."""
    assert weights(one) and weights(one) == weights(other)
    assert figures(one) == figures(other)
    clock = [x["time"] for x in read_metrics(other)]
    assert clock == sorted(clock)
    texts = [(run / "samples.jsonl").read_bytes() if (run / "samples.jsonl").exists() else b"" for run in (one, other)]
    assert texts[0] == texts[1]
    assert curves(one) == curves(other)
    steps = [json.loads((run / "final" / "model.json").read_text())["step"] for run in (one, other)]
    assert steps[0] == steps[1]
    left = [p.name for p in other.rglob("*") if p.suffix in (".writing", ".old", ".deleting")]
    assert not left


TRAINERS = {"sft": "SFTTrainer", "rm": "RewardModelTrainer", "ppo": "PPOTrainer"}


def interrupt_at(stage: str, step: int, monkeypatch, number: int = signal.SIGINT) -> None:
    """Send a signal to this process while the trainer is in the middle of a step."""
    cls = getattr(trainers, TRAINERS[stage])
    name = "iteration" if stage == "ppo" else "train_step"
    original = getattr(cls, name)

    def interrupted(self, *args):
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(cls, name, interrupted)
