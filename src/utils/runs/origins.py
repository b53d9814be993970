"""The checkpoints that a run was started from, found again after folders were moved or renamed.

hyperparams.json names the SFT model and the reward model by their paths of then and by the SHA-256 of their weights. A
path does not outlive a move; the name of a run (STAGE_NAME_TIME) and the bits of its weights do.
"""

from __future__ import annotations

import contextlib
import glob
import re
from pathlib import Path
from typing import Any

from config.user_error import UserError
from utils.runs.finding import find_checkpoint
from utils.runs.folder import runs_root
from utils.runs.manifest import digest_of

_KINDS = {"sft": "SFT model", "rm": "reward model"}
_WEIGHTS = "model.safetensors"


def record_origins(**checkpoints: Path | None) -> dict[str, Any]:
    """Entries of hyperparams.json for what a run starts from: `record_origins(sft=folder, rm=None)`."""
    digests = {key: digest_of(folder / _WEIGHTS) for key, folder in checkpoints.items() if folder is not None}
    return {**{key: str(folder or "") for key, folder in checkpoints.items()}, "weights": digests}


def without_folders(path: str | Path) -> str:
    """A path without the folders that a move changes: from the run's folder on, else its last part."""
    parts = Path(path).parts
    runs = [i for i, part in enumerate(parts) if re.fullmatch(r"(sft|rm|ppo)_[\w.-]+_\d{14}", part)]
    return str(Path(*parts[runs[-1] :])) if runs else Path(path).name


def places_of(recorded: str, run: Path, runs_dir: str) -> list[Path]:
    """Where a checkpoint that `run` has recorded may be now: there, beside that run, or in `runs_dir`."""
    inside = without_folders(recorded)
    return [Path(recorded), run.resolve().parent / inside, runs_root(runs_dir).resolve() / inside]


def find_origin(
    record: dict[str, Any], key: str, run: Path, runs_dir: str, who: str, argument: str = ""
) -> Path | None:
    """The checkpoint that a run was started from, wherever it is now; None if it was started without one.

    It is known by its weights. A run of older code has recorded none: then the names of its run and its folder decide.

    Args:
        record: the run's hyperparams.json. key: "sft" or "rm".
        run: the run's folder. runs_dir: where else to look.
        who: begins the error. argument: the flag that named the checkpoint; what it means now is looked at last.

    Raises:
        UserError: it is not there, or its weights have changed.
    """
    recorded, weights = str(record.get(key) or ""), record.get("weights")  # a run from elsewhere may hold anything
    if not recorded:
        return None
    wanted = weights.get(key) if isinstance(weights, dict) else None
    places = _candidates(recorded, run, runs_dir, argument)
    of_that_name = [place for place in places if without_folders(place) == without_folders(recorded)]
    known = of_that_name if wanted is None else (p for p in places if digest_of(p / _WEIGHTS) == wanted)
    for place in known:
        return place
    what = f"{who}: was started from the {_KINDS[key]} {recorded}"
    if of_that_name:
        raise UserError(
            f"{what}, and {of_that_name[0]} has other weights now: it was trained on or replaced; put the old ones "
            "back, or start a new run"
        )
    raise UserError(
        f"{what}, which is neither there nor beside the run nor in --runs-dir {runs_dir}; put that run back, or give "
        "the folder it is in as --runs-dir"
    )


def _candidates(recorded: str, run: Path, runs_dir: str, argument: str) -> list[Path]:
    """Checkpoint folders to compare: the places of the recorded one and, beside each, what it was renamed to since
    (final.superseded1); then what the flag means."""
    found = []
    for place in places_of(recorded, run, runs_dir):
        name = place.name.removesuffix(".old")  # recorded between two renames of a write that was cut short
        there = map(Path, sorted(glob.glob(f"{glob.escape(str(place.parent / name))}*")))
        found += [p for p in (place, *there) if (p / _WEIGHTS).is_file() and (p / "model.json").is_file()]
    if argument:
        with contextlib.suppress(UserError):
            found.append(find_checkpoint(argument, runs_dir, ""))
    return list(dict.fromkeys(found))
