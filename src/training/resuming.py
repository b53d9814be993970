"""Going on with a run: which one --resume means, whether it may be gone on with, and what gives way for it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from config.configs import RunConfig, resolved
from config.user_error import UserError
from models.checkpoint import describe
from models.manifest import fault_of
from training.runtime import Runtime
from training.saving import STATE, load_state, newest_whole
from utils.durable import Disk, set_aside, standing, sweep, write_file
from utils.run_folder import (
    HYPERPARAMS,
    create_run,
    lock_run,
    places,
    runs_named,
    step_checkpoints,
    versions,
    write_hyperparams,
)

# Settings that may differ between a run and its resumption: where it runs, what it keeps, not what it computes.
_MAY_CHANGE = (
    "resume", "resume_override", "runs_dir", "device", "keep", "save_every", "on_save_error", "batch_size",
    "tokens_per_micro_batch", "activation_checkpointing", "plan", "plan_gb",
)  # fmt: skip

# Settings that --resume-override lets differ: how long, how fast and how closely watched. All others decide what the
# numbers of a checkpoint mean (its data, its model, its objective): with another one it is another run.
OVERRIDABLE = (
    "max_steps", "epochs", "iterations", "lr", "critic_lr", "min_lr_ratio", "weight_decay", "max_grad_norm", "max_kl",
    "on_nonfinite", "eval_every", "eval_examples", "log_every", "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """A run to go on with: its folder, the checkpoint, the trainer's state, hyperparams.json, and the settings that now
    differ: {field: [then, now]}."""

    run: Path
    checkpoint: Path
    state: dict[str, Any]
    hyperparams: dict[str, Any]
    overridden: dict[str, list[Any]]


def find_resumption(stage: str, config: RunConfig) -> Resumption | None:
    """What --resume means: None without the flag, or for `auto` when no unfinished run of this name has a checkpoint.

    The run is locked; nothing in it is changed yet.

    Raises:
        UserError: no such run, nothing whole to go on from, another process at work on it, or settings that differ from
            the run's.
    """
    wanted = _override_fields(config)
    if not config.resume:
        return None
    if config.resume == "auto":
        run = next((r for r in runs_named(f"{stage}_{config.name}", config.runs_dir) if _unfinished(r)), None)
        if run is None:
            print(f"--resume auto: no unfinished run {stage}_{config.name} with a checkpoint; starting a new one")
            return None
        checkpoint = None
    else:
        run, checkpoint = _run_and_checkpoint(config)
    lock_run(run)
    checkpoint = _whole_checkpoint(run, checkpoint, config)
    try:
        hyperparams = json.loads((run / HYPERPARAMS).read_text())
        old = dict(hyperparams["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--resume {config.resume}: {HYPERPARAMS} of {run} is no record of a run ({error}); start a new one"
        ) from None
    if hyperparams.get("stage") != stage:
        raise UserError(
            f"--resume {config.resume}: is a run of stage {hyperparams.get('stage')}, not {stage}; use its own script"
        )
    changed = _differences(old, json.loads(json.dumps(resolved(config))))
    refused = [f"{field}: {then!r} -> {now!r}" for field, (then, now) in changed.items() if field not in wanted]
    if refused:
        raise UserError(
            f"--resume {run}: settings differ from the run's ({'; '.join(refused)}); repeat the run's own flags, or "
            f"allow the change with --resume-override where that makes sense ({', '.join(OVERRIDABLE)})"
        )
    state = load_state(checkpoint)
    print(f"going on with {checkpoint}" + "".join(f"; {k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    return Resumption(run, checkpoint, state, hyperparams, changed)


def _override_fields(config: RunConfig) -> set[str]:
    """The fields that --resume-override names.

    Raises:
        UserError: one that may not change.
    """
    wanted = {name.strip().removeprefix("--").replace("-", "_") for name in config.resume_override.split(",")} - {""}
    unknown = sorted(wanted - set(OVERRIDABLE))
    if unknown:
        raise UserError(f"--resume-override {', '.join(unknown)}: may not change; these may: {', '.join(OVERRIDABLE)}")
    if wanted and not config.resume:
        raise UserError(f"--resume-override {config.resume_override}: needs --resume auto or --resume PATH")
    return wanted


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{field: [then, now]} of the settings that decide what a run computes."""
    fields = [field for field in {**new, **old} if field not in _MAY_CHANGE]
    return {field: [old.get(field), new.get(field)] for field in fields if old.get(field) != new.get(field)}


def _unfinished(run: Path) -> bool:
    """Whether a run has step checkpoints, and none of them has become final/."""
    steps, final = step_checkpoints(run), standing(run / "final")
    if not steps or not final.exists():
        return bool(steps)
    return int(steps[-1].name[5:]) > describe(final).get("step", math.inf)  # gone on with after its end


def _run_and_checkpoint(config: RunConfig) -> tuple[Path, Path | None]:
    """What `--resume PATH` means: a run folder, or one and the checkpoint inside it."""
    folder = next((p for p in places(config.resume, config.runs_dir) if p.is_dir()), None)
    around = (folder, *folder.parents[:2]) if folder else ()
    run = next((p for p in around if (p / HYPERPARAMS).is_file()), None)
    if run is None:
        raise UserError(f"--resume {config.resume}: no run folder or checkpoint inside one; give runs/STAGE_NAME_TIME")
    return run, folder if run != folder else None


def _whole_checkpoint(run: Path, wanted: Path | None, config: RunConfig) -> Path:
    """The checkpoint to go on from: the one that was asked for, or the newest whole one of the run.

    Raises:
        UserError: it is not whole, or the run has none.
    """
    if wanted is not None:
        fault = fault_of(wanted)
        if fault is not None and (wanted / STATE).is_file():
            raise UserError(
                f"--resume {config.resume}: is not whole ({fault}); give an earlier checkpoint, or --resume {run}"
            )
        return wanted
    if not step_checkpoints(run):
        raise UserError(f"--resume {config.resume}: has nothing under checkpoints/ to go on from; start a new run")
    checkpoint, faults = newest_whole(run)
    if checkpoint is None:
        torn = "; ".join(faults)
        raise UserError(
            f"--resume {config.resume}: {run} has no whole checkpoint to go on from ({torn}); start a new run"
        )
    for fault in faults:
        print(f"passed over: {fault}", file=sys.stderr)
    return checkpoint


def open_run(
    stage: str,
    config: RunConfig,
    model: nn.Module,
    runtime: Runtime,
    resumption: Resumption | None,
    extra: dict[str, Any],
) -> Path:
    """The run's folder, made and described unless it is there already; `extra` says what the run starts from.

    Raises:
        UserError: a run to go on with was training on other data (`extra["data"]`, a fingerprint).
    """
    if resumption is not None:
        if resumption.hyperparams.get("data") != extra["data"]:
            raise UserError(
                f"--resume {resumption.run}: --dataset {config.dataset} gives other rows than when it was started; "
                "put the old data back, or start a new run"
            )
        _compare_machines(config, runtime, resumption)
        _take_up(config, resumption)
        return resumption.run
    run = create_run(stage, config.name, config.runs_dir)
    extra = {"runs_on": runtime.describe(), **extra}
    try:
        write_hyperparams(run, stage, resolved(config), resolved(model.config), extra)
    except OSError as error:
        raise UserError(f"--runs-dir {config.runs_dir}: cannot write there ({error.strerror}); make room") from None
    print(f"writing to {run}")
    return run


def _compare_machines(config: RunConfig, runtime: Runtime, resumption: Resumption) -> None:
    """Tell what is not as it was when the run was started, for then other bits may come out.

    Raises:
        UserError: something is not, and --deterministic promises the same bits.
    """
    now = {"runs_on": runtime.describe(), **versions()}
    then = {"runs_on": resumption.hyperparams.get("runs_on"), **resumption.hyperparams.get("versions", {})}
    changed = "; ".join(f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])
    if changed and config.deterministic:
        raise UserError(
            f"--deterministic: the run was started elsewhere ({changed}); put that back, or give --no-deterministic "
            "and --resume-override deterministic"
        )
    if changed:
        print(f"note: not as when the run was started ({changed}); it may not end with the same bits")


def _take_up(config: RunConfig, resumption: Resumption) -> None:
    """Make a run ready to be gone on with: what writes left half done goes, and what lies ahead of the checkpoint gives
    way, or the next --resume auto would jump to it."""
    run, disk = resumption.run, Disk()
    for folder in (run, run / "checkpoints"):
        sweep(folder, disk)
    step = resumption.state["step"]
    ahead = [p for p in step_checkpoints(run) if int(p.name[5:]) > step and fault_of(p) is None]
    final = run / "final"
    if final.exists() and describe(final)["step"] > step:
        ahead.append(final)
    for folder in ahead:
        print(f"{folder} is ahead of step {step} and is kept as {set_aside(folder, 'superseded', disk).name}")
    if resumption.overridden:
        record = resumption.hyperparams
        changes = [*record.get("overridden", []), {"step": step, "settings": resumption.overridden}]
        record = {**record, "config": resolved(config), "overridden": changes}
        write_file(run / HYPERPARAMS, (json.dumps(record, indent=2) + "\n").encode())
