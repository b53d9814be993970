"""What a run has recorded of itself, for --resume: which run is meant, and its settings, which need not be repeated.

A run may come from elsewhere, and its record is data: code that it names is imported only where the command line names
it, too.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from config.command_line import config_of_record
from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, StageConfig, flag_of
from config.scrub import SHOWN
from config.user_error import UserError
from utils.data.sources import DATASETS
from utils.reward_function import moved
from utils.runs.durable import standing
from utils.runs.finding import find_folder, newest_run, step_checkpoints
from utils.runs.folder import HYPERPARAMS, REPO, typed_path

STAGES: dict[type[RunConfig], str] = {SFTConfig: "sft", RMConfig: "rm", PPOConfig: "ppo"}

# What one command asks for is no setting of the run.
_OF_THE_COMMAND = ("resume", "resume_override", "runs_dir", "plan", "plan_gb")
_FUNCTIONS = ("reward_fn", "eval_reward_fn")
_OWN_FUNCTION = "utils/demo/gold.py:gold_reward"  # this repository's, and no code that a run brings along


def recorded_settings(kind: type[StageConfig], given: dict[str, str]) -> StageConfig | None:
    """The settings of the run that --resume means, as the defaults of a command line (`parse_cli`).

    Also of a run that --resume auto finds to be stopped before its first checkpoint: a new one takes its place. None
    where --resume auto finds no run.

    Args:
        given: the fields that the command line sets.

    Raises:
        UserError: no such run of this stage, its record cannot be read, or it does not hold all that is needed: the
            line has the flags to add.
    """
    stage, resume, runs_dir = STAGES[kind], given["resume"], given.get("runs_dir", kind.runs_dir)
    if resume == "auto":
        run = newest_run(f"{stage}_{given.get('name', kind.name)}", runs_dir)
        if run is None or not (run / HYPERPARAMS).is_file():
            return None
    else:
        run, _ = run_and_checkpoint(resume, runs_dir)
    values = {k: v for k, v in record_of(run, stage, resume)["config"].items() if k not in _OF_THE_COMMAND}
    missing = []
    for field in _FUNCTIONS:
        spec = str(values.get(field) or "")
        if f"/{moved(spec)}".endswith(f"/{_OWN_FUNCTION}"):
            values[field] = str(REPO / "src" / _OWN_FUNCTION)
        elif spec and field not in given:
            missing.append(f"{flag_of(field)} {shlex.quote(spec)} (code is run only as you name it)")
    for field in (field for field, value in values.items() if SHOWN in str(value) and field not in given):
        missing.append(f"{flag_of(field)} (recorded without its secret)")
    data = str(values.get("dataset", kind.dataset))
    if "dataset" not in given and data not in DATASETS and not typed_path(data).is_file():
        missing.append(f"--dataset PATH ({data} is not there)")
    if missing:
        raise refusal(resume, f"add what cannot be taken from the run: {', '.join(missing)}")
    return settings_of(kind, values, run)


def settings_of(kind: type[StageConfig], values: dict[str, Any], run: Path) -> StageConfig:
    """The settings in a run's record; UserError for one that cannot be."""
    return config_of_record(kind, values, f"--resume {run}: {HYPERPARAMS}")


def refusal(resume: str, told: str) -> UserError:
    """The error that --resume ends with."""
    return UserError(f"--resume {resume}: {told}")


def run_and_checkpoint(resume: str, runs_dir: str) -> tuple[Path, Path | None]:
    """What `--resume PATH` means: a run, by its folder or its name, or one and the checkpoint inside it."""
    folder = find_folder(resume, runs_dir, "--resume", has_saved)
    run = next((p for p in (folder, *folder.parents[:2]) if (p / HYPERPARAMS).is_file()), None)
    if run is None:
        raise refusal(resume, "no run folder or checkpoint inside one; give runs/STAGE_NAME_TIME")
    if ".superseded" in folder.name:
        raise refusal(
            resume,
            "is of a course that the run has left, and its figures are cut off; go on with another checkpoint, or "
            "start a new run from its weights",
        )
    return run, folder if run != folder else None


def has_saved(run: Path) -> bool:
    """Whether a run has saved anything to go on from."""
    return bool(step_checkpoints(run)) or standing(run / "final").exists()


def record_of(run: Path, stage: str, resume: str) -> dict[str, Any]:
    """hyperparams.json of a run, which is one of this stage."""
    try:
        record = json.loads((run / HYPERPARAMS).read_text())
        record["config"] = dict(record["config"])
        if record.get("stage") in ("rm", "ppo"):
            record["sft"] = str(record["sft"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        told = f"{HYPERPARAMS} of {run} is no record of a run ({error}); start a new one"
        raise refusal(resume, told) from None
    if record.get("stage") != stage:
        raise refusal(resume, f"is a run of stage {record.get('stage')}, not {stage}; use its own script")
    return record
