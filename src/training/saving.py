"""What a run keeps: step checkpoints to resume from, the best model so far, the final one.

A checkpoint folder holds the model folders of `models.checkpoint`, the tokenizer's files and `trainer_state.pt`. It is
written beside its place and then renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config.user_error import UserError
from models.checkpoint import save_model
from utils.run_folder import step_checkpoints
from utils.tokenizer import Tokenizer

STATE = "trainer_state.pt"


class Saver:
    """Writes the checkpoints of one run.

    Args:
        run: the run's folder.
        models: module per subfolder; "" is the checkpoint folder itself.
        tokenizer: saved with every checkpoint, so that it is self-contained.
        description: entries for model.json beside the model config.
        keep: newest step checkpoints to keep.
    """

    def __init__(
        self, run: Path, models: dict[str, nn.Module], tokenizer: Tokenizer, description: dict[str, Any], keep: int
    ) -> None:
        self.run = run
        self.models = models
        self.tokenizer = tokenizer
        self.description = description
        self.keep = keep

    def save_step(self, step: int, state: dict[str, Any]) -> None:
        """Write checkpoints/step_XXXXXXXX and delete all but the newest `keep`."""
        self._write(self.run / "checkpoints" / f"step_{step:08d}", state, {"step": step})
        for old in step_checkpoints(self.run)[: -self.keep]:
            shutil.rmtree(old)

    def save_best(self, step: int, metric: str, value: float) -> None:
        """Replace best/."""
        self._write(self.run / "best", None, {"step": step, metric: value})

    def save_final(self, step: int, state: dict[str, Any]) -> Path:
        """Write final/ and return it."""
        self._write(self.run / "final", state, {"step": step})
        return self.run / "final"

    def _write(self, folder: Path, state: dict[str, Any] | None, extra: dict[str, Any]) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.with_name(folder.name + ".writing")
        shutil.rmtree(fresh, ignore_errors=True)
        for subfolder, model in self.models.items():
            save_model(model, fresh / subfolder, {**self.description, **extra})
        self.tokenizer.save(fresh)
        if state is not None:
            torch.save(state, fresh / STATE)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)


def capture_rng() -> dict[str, Any]:
    """State of every random generator in plain types and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put every random generator back to `capture_rng()`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.pt of a checkpoint; nothing in it is unpickled.

    Raises:
        UserError: missing or unreadable.
    """
    path = checkpoint / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume {checkpoint}: no {STATE} in it; give a folder under checkpoints/") from None
    except Exception as error:
        raise UserError(
            f"--resume {checkpoint}: {STATE} cannot be read ({type(error).__name__}); give an earlier checkpoint"
        ) from error
