"""What the records around a checkpoint say of how it was made; a run from elsewhere may hold anything in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from config.user_error import UserError
from inference.systems import run_around
from models.weights.checkpoint import describe
from utils.hub import is_hub_name
from utils.runs.origins import places_of, without_folders


def record_of(checkpoint: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The run around a checkpoint, its hyperparams.json and the flags in it."""
    run, record = run_around(checkpoint)
    record = record if isinstance(record, dict) else {}
    config = record.get("config")
    return run, record, config if isinstance(config, dict) else {}


def temperature_of(checkpoint: Path, description: dict[str, Any]) -> float:
    """That of PPO's rollouts, where its policy is what was trained; 1 for other stages."""
    value = record_of(checkpoint)[2].get("temperature") if description.get("stage") == "ppo" else 1.0
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else 1.0


def room_of(checkpoint: Path, context: int) -> int:
    """Tokens of an answer: as many as PPO's responses had, 64 after SFT, and at most half of the context."""
    value = record_of(checkpoint)[2].get("response_length")
    return min(value if isinstance(value, int) and value > 0 else 64, context // 2)


def origin(description: dict[str, Any]) -> str:
    """What a model was trained from, without folders; "" where that is not told."""
    source = str(description.get("trained_from") or "")
    return source if is_hub_name(source) else without_folders(source)


def base_model(checkpoint: Path, description: dict[str, Any], runs_dir: str) -> str:
    """What the first of the runs behind a checkpoint started from: a name on the hub, a folder, "scratch"; "" where one
    of these runs is not there any more."""
    seen: set[Path] = set()
    while checkpoint not in seen:
        seen.add(checkpoint)
        recorded = str(description.get("trained_from") or "")
        places = places_of(recorded, run_around(checkpoint)[0], runs_dir) if recorded else []
        earlier = next((place for place in places if (place / "model.json").is_file()), None)
        if earlier is None:
            is_run = without_folders(recorded) != Path(recorded).name  # STAGE_NAME_TIME/..., and gone
            return "" if is_run else origin(description)
        try:
            checkpoint, description = earlier.resolve(), describe(earlier)
        except UserError:
            break
    return ""
