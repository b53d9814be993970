"""Run folders: where a run writes, what it records about itself, and how a model argument finds a checkpoint."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from config.user_error import UserError

REPO = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "numpy", "transformers", "datasets", "accelerate", "loralib", "tiktoken", "safetensors")


def runs_root(runs_dir: str) -> Path:
    """The folder of all runs. The default `runs` is the repo's own from whatever folder a script is started."""
    return REPO / "runs" if runs_dir == "runs" else Path(runs_dir)


def create_run(stage: str, name: str, runs_dir: str) -> Path:
    """Make `STAGE_NAME_YYYYmmddHHMMSS` and return it; two runs started in one second get different seconds.

    Raises:
        UserError: the folder cannot be made.
    """
    root = runs_root(runs_dir)
    moment = time.time()
    while True:
        folder = root / f"{stage}_{name}_{time.strftime('%Y%m%d%H%M%S', time.localtime(moment))}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not root.is_dir():
                raise UserError(f"--runs-dir {runs_dir}: is a file; give a folder") from None
            moment += 1
        except OSError as error:
            raise UserError(
                f"--runs-dir {runs_dir}: cannot write there ({error.strerror}); give a folder that can be written"
            ) from None


def write_hyperparams(
    folder: Path, stage: str, config: dict[str, Any], model: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Record the resolved configuration and what it ran on in hyperparams.json."""
    record = {
        "stage": stage,
        "config": config,
        "model": model,
        "seed": config["seed"],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in _PACKAGES}},
        "machine": platform.platform(),
        **extra,
    }
    (folder / "hyperparams.json").write_text(json.dumps(record, indent=2) + "\n")


def _commit() -> str:
    """The code's commit, with "+changes" when the working tree differs; "unknown" outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "src"], cwd=REPO, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def newest_run(stem: str, runs_dir: str) -> Path | None:
    """The newest run folder called `stem` (`sft_demo`), or None."""
    pattern = re.compile(re.escape(stem) + r"_\d{14}$")
    root = runs_root(runs_dir)
    found = sorted(p for p in root.glob(f"{_glob_escape(stem)}_*") if pattern.match(p.name)) if root.is_dir() else []
    return found[-1] if found else None


def find_checkpoint(argument: str, runs_dir: str, flag: str) -> Path:
    """The checkpoint folder that a model argument means.

    Args:
        argument: a run folder (its final/, else best/, else newest step), a checkpoint folder, or a run's stem such as `sft_demo`.
        runs_dir: where stems are looked up.
        flag: named in the error.

    Raises:
        UserError: there is no such run or it has no checkpoint; the message lists the runs there are.
    """
    candidates = [Path(argument), REPO / argument]
    stem_run = newest_run(argument, runs_dir) if "/" not in argument else None
    if stem_run is not None:
        candidates.append(stem_run)
    for folder in candidates:
        if (folder / "model.json").is_file():
            return folder
        for inner in (folder / "final", folder / "best", *reversed(step_checkpoints(folder))):
            if (inner / "model.json").is_file():
                return inner
    root = runs_root(runs_dir)
    if any(folder.is_dir() for folder in candidates):
        raise UserError(
            f"{flag} {argument}: no checkpoint in it; give a run that has saved one, or a folder with model.json"
        )
    there = sorted({re.sub(r"_\d{14}$", "", p.name) for p in root.glob("*_*") if p.is_dir()}) if root.is_dir() else []
    raise UserError(f"{flag} {argument}: no such run or folder; runs in {root}: {', '.join(there) or 'none yet'}")


def step_checkpoints(run: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_????????") if p.name[5:].isdigit())


def _glob_escape(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)
