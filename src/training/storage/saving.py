"""What a run keeps: step checkpoints to resume from, the best model so far, the final one.

A checkpoint folder holds the model folders of `models.weights.checkpoint`, the tokenizer's files, `trainer_state.pt`
and the manifest that seals them. It is written as `utils.runs.durable` describes, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.user_error import RunStopped, UserError
from models.weights.checkpoint import save_model
from utils.runs.durable import Disk, delete_folder, replace_folder, set_aside
from utils.runs.finding import step_checkpoints
from utils.runs.manifest import MANIFEST, fault_of, write_manifest
from utils.runs.metrics_log import MetricsLog
from utils.tokenizer import Tokenizer

STATE = "trainer_state.pt"

_SMALL_FILES = 2**20  # bytes allowed for descriptions, manifest and a small tokenizer when room is looked for


@dataclass(eq=False)
class Saver:
    """Writes the checkpoints of one run."""

    run: Path
    models: dict[str, nn.Module]  # per subfolder; "" is the checkpoint folder itself
    tokenizer: Tokenizer  # saved with every checkpoint, so that it is self-contained
    description: dict[str, Any]  # entries for model.json beside the model config
    keep: int  # newest whole step checkpoints
    on_error: str = "stop"  # when a checkpoint cannot be written (full disk): stop the run, or "continue" without it
    log: MetricsLog | None = None  # the run's figures; on the medium before a checkpoint that counts on them
    disk: Disk = field(default_factory=Disk)
    saved_step: int = field(default=-1, init=False)  # of the newest step checkpoint that this process wrote

    def save_step(self, step: int, state: dict[str, Any]) -> bool:
        """Write checkpoints/step_XXXXXXXX and delete all whole ones but the newest `keep`.

        Where it could not be written: RunStopped, or False with --on-save-error continue.
        """
        if not self._write(self.run / "checkpoints" / f"step_{step:08d}", state, {"step": step}, self.on_error):
            return False
        self.saved_step = step
        # A torn one is not counted, and stays for its owner to look at.
        whole = [p for p in step_checkpoints(self.run) if fault_of(p) is None]
        for old in whole[: -self.keep]:
            delete_folder(old, self.disk)
        return True

    def save_best(self, step: int, metric: str, value: float) -> bool:
        """Replace best/; see `save_step`."""
        return self._write(self.run / "best", None, {"step": step, metric: value}, self.on_error)

    def save_final(self, step: int, state: dict[str, Any]) -> Path:
        """Write final/ and return it; RunStopped where it could not be written: there is nothing to go on with."""
        self._write(self.run / "final", state, {"step": step}, "stop")
        return self.run / "final"

    def _write(self, folder: Path, state: dict[str, Any] | None, extra: dict[str, Any], on_error: str) -> bool:
        """Write one checkpoint; whether it was written."""
        if state is not None and self.log is not None:
            state = state | {"logs": self.log.position()}
        needed = sum(t.nbytes for t in _tensors([{k: m.state_dict() for k, m in self.models.items()}, state]))
        needed += _SMALL_FILES
        try:
            self._look_for_room(needed)
            if self.log is not None:
                self.log.sync()
            self._make_way(folder)
            replace_folder(folder, self._parts(state, extra), self.disk)
        except OSError as error:
            self._failed(folder, needed, error, on_error)
            return False
        return True

    def _parts(self, state: dict[str, Any] | None, extra: dict[str, Any]) -> list[tuple[str, Any]]:
        """What a checkpoint is made of, in the order of writing; the manifest comes last."""
        description = {**self.description, **extra, "sealed": True}
        parts = [(name, partial(save_model, model, extra=description)) for name, model in self.models.items()]
        parts.append(("", self.tokenizer.save))
        if state is not None:
            parts.append((STATE, partial(_save_state, state)))
        return [*parts, (MANIFEST, write_manifest)]

    def _look_for_room(self, needed: int) -> None:
        if shutil.disk_usage(self.run).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _make_way(self, folder: Path) -> None:
        """Give a torn checkpoint that stands where the new one belongs another name: nobody deletes it unasked."""
        if not folder.exists() or fault_of(folder) is None:
            return
        aside = set_aside(folder, "torn", self.disk)
        tqdm.write(f"{folder} is not whole and is kept as {aside.name}", file=sys.stderr)

    def _failed(self, folder: Path, needed: int, error: OSError, on_error: str) -> None:
        """Tell what is missing and what is left; raises RunStopped unless the run goes on."""
        free = shutil.disk_usage(self.run).free
        if free < needed:
            why = f"it needs {_size(needed)} and {_size(free)} are free, so {_size(needed - free)} are missing"
        else:
            why = f"it needs {_size(needed)}: {os.strerror(error.errno) if error.errno else error}"
        whole, _ = newest_whole(self.run)
        left = f"the newest whole checkpoint is {whole}" if whole else "no checkpoint has been saved yet"
        told = f"{folder}: could not be saved; {why}; {left}"
        if on_error == "stop":
            raise RunStopped(
                f"{told}. Make room and go on with --resume {self.run}; --on-save-error continue trains on"
            ) from error
        tqdm.write(f"warning: {told}; training goes on (--on-save-error continue)", file=sys.stderr)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _save_state(state: dict[str, Any], path: Path) -> None:
    """Write the trainer's state; tensors go to the file one after the other, without a copy of the whole."""
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{STATE}: {str(error).splitlines()[0]}") from None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step checkpoint of a run that is whole, and what is wrong with those that were passed over for it."""
    faults = []
    for folder in reversed(step_checkpoints(run)):
        fault = fault_of(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder} {fault}")
    return None, faults


def capture_rng() -> dict[str, Any]:
    """State of every random generator in plain types and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put every random generator back to `capture_rng()`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0])


def load_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.pt of a checkpoint; nothing in it is unpickled. UserError where it cannot be read."""
    path = checkpoint / STATE
    try:
        with warnings.catch_warnings():  # torch tells of a file that is no state of ours in lines of its own
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and {"step", "best", "optimizer", "scaler", "rng"} <= set(state)):
            raise ValueError("it is no trainer's state")
        return state
    except FileNotFoundError:
        raise UserError(f"--resume {checkpoint}: no {STATE} in it; give a folder under checkpoints/") from None
    except Exception as error:
        raise UserError(
            f"--resume {checkpoint}: {STATE} cannot be read ({type(error).__name__}); give an earlier checkpoint"
        ) from error
