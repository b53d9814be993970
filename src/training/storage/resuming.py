"""Going on with a run: which one --resume means, whether it may be gone on with, and what gives way for it.

A run that goes on from a checkpoint has left the course that it took after it. What that course has left behind is set
aside under another name (*.superseded1), or cut off, so that nobody takes it for this run's.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from config.configs import PPOConfig, RunConfig, resolved
from config.scrub import scrubbed
from config.user_error import UserError
from models.weights.checkpoint import describe
from training.engine.runtime import Runtime
from training.storage.recorded import has_saved, record_of, refusal, run_and_checkpoint, settings_of
from training.storage.saving import STATE, load_state, newest_whole
from utils.dataset import TokenDataset
from utils.reward_function import moved
from utils.runs.durable import Disk, set_aside, standing, sweep, write_file
from utils.runs.finding import newest_run, step_checkpoints
from utils.runs.folder import HYPERPARAMS, create_run, lock_run, versions, write_hyperparams
from utils.runs.manifest import fault_of
from utils.runs.origins import find_origin, without_folders

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


# Settings that name a file or a folder: a move changes the folders around it. What they mean is compared elsewhere,
# rows by their fingerprint and models by their weights.
_PATHS = ("dataset", "tokenizer", "pretrain", "actor", "critic", "reward_fn", "eval_reward_fn")


@dataclass(frozen=True)
class Resumption:
    """A run to go on with: its folder, the checkpoint, the trainer's state, hyperparams.json, the settings that now
    differ ({field: [then, now]}), and where the models that it was started from are now ("sft", "rm"; None: without).
    """

    run: Path
    checkpoint: Path
    state: dict[str, Any]
    hyperparams: dict[str, Any]
    overridden: dict[str, list[Any]]
    origins: dict[str, Path | None]


def find_resumption(stage: str, config: RunConfig) -> Resumption | None:
    """What --resume means: None without the flag, or for `auto` when the newest run of this name has saved nothing.

    The run is locked; nothing in it is changed yet.

    Raises:
        UserError: no such run of this stage, nothing whole to go on from, another process at work on it, settings that
            differ from the run's and may not, or a model that it was started from is gone or is another one now.
        SystemExit: with 0, for `auto` when that run is finished.
    """
    wanted = _override_fields(config)
    if not config.resume:
        return None
    checkpoint = None
    if config.resume == "auto":
        run = _newest_saved(f"{stage}_{config.name}", config)
        if run is None:
            return None
    else:
        run, checkpoint = run_and_checkpoint(config.resume, config.runs_dir)
    record = record_of(run, stage, config.resume)
    gone = [f"{field} {value!r}" for field, value in record["config"].items() if not hasattr(config, field)]
    if gone:
        print(f"note: {run} has recorded settings that there are no longer: {', '.join(gone)}")
    record["config"] = resolved(settings_of(type(config), record["config"], run))
    changed = _differences(scrubbed(record["config"]), scrubbed(resolved(config)))
    refused = [f"{field}: {then!r} -> {now!r}" for field, (then, now) in changed.items() if field not in wanted]
    if refused:
        raise UserError(
            f"--resume {run}: settings differ from the run's ({'; '.join(refused)}); leave these flags out, or allow "
            f"the change with --resume-override where that makes sense ({', '.join(OVERRIDABLE)})"
        )
    if checkpoint is None and not config.plan:
        _leave_if_finished(run, record, config, changed)
    if checkpoint is None and not step_checkpoints(run) and standing(run / "final").exists():
        checkpoint = standing(run / "final")
    lock_run(run)
    checkpoint = _whole_checkpoint(run, checkpoint, config)
    state = load_state(checkpoint)
    origins = _origins(run, checkpoint, record, config)
    print(f"going on with {checkpoint}" + "".join(f"; {k}: {a!r} -> {b!r}" for k, (a, b) in changed.items()))
    return Resumption(run, checkpoint, state, record, changed, origins)


def _override_fields(config: RunConfig) -> set[str]:
    """The fields that --resume-override names, each one that may change."""
    wanted = {name.strip().removeprefix("--").replace("-", "_") for name in config.resume_override.split(",")} - {""}
    unknown = sorted(wanted - set(OVERRIDABLE))
    if unknown:
        raise UserError(f"--resume-override {', '.join(unknown)}: may not change; these may: {', '.join(OVERRIDABLE)}")
    if wanted and not config.resume:
        raise UserError(f"--resume-override {config.resume_override}: needs --resume auto or --resume PATH")
    return wanted


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{field: [then, now]} of the settings that decide what a run computes."""
    pairs = {field: [old[field], new[field]] for field in new if field not in _MAY_CHANGE}
    for field in _PATHS:
        then, now = pairs.get(field, (None, None))
        if isinstance(then, str) and isinstance(now, str):
            then, now = (without_folders(moved(path)) for path in (then, now))
            if then == now:
                del pairs[field]
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _newest_saved(stem: str, config: RunConfig) -> Path | None:
    """The newest run of a name; None, and a line that says why, when it has saved nothing to go on from."""
    run = newest_run(stem, config.runs_dir)
    if run is not None and has_saved(run):
        return run
    if run is None:
        print(f"--resume auto: no run {stem} yet; starting one")
    else:
        lock_run(run)  # it may be at work still
        own = ", with its settings where none are given" if (run / HYPERPARAMS).is_file() else ""
        print(f"--resume auto: {run} was stopped before its first checkpoint; starting a new run{own}")
    return None


def _leave_if_finished(run: Path, record: dict[str, Any], config: RunConfig, changed: dict[str, list[Any]]) -> None:
    """End the process with exit code 0 when a run has nothing left to train."""
    done = _ended_at(run)
    if done is None or _is_longer(record, config, done):
        return
    told = "".join(f"; {field}: {then!r} -> {now!r} changes nothing" for field, (then, now) in changed.items())
    print(f"finished: {run} has all of its {done} {'iterations' if record['stage'] == 'ppo' else 'steps'}{told}")
    raise SystemExit(0)


def _ended_at(run: Path) -> int | None:
    """The step of a run's final/; None when it has not ended: there is no whole one, or it was gone on with."""
    final, steps = standing(run / "final"), step_checkpoints(run)
    try:
        description = describe(final)
        done = int(description["step"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    if description.get("sealed") and fault_of(final) is not None:
        return None
    return None if steps and int(steps[-1].name[5:]) > done else done


def _is_longer(record: dict[str, Any], config: RunConfig, done: int) -> bool:
    """Whether the schedule now asked for goes on behind the `done` steps at which the run has ended.

    How many steps an epoch has is known only when the data are read. But a run that ended before its --max-steps had
    used up its epochs, and goes on only with more of them.
    """
    limit = config.max_steps or math.inf
    if isinstance(config, PPOConfig):
        return min(config.iterations, limit) > done
    then = dict(record["config"])
    for change in reversed(record.get("overridden", [])):  # back to the settings with which it came to its end
        if change["step"] >= done:
            then |= {field: values[0] for field, values in change["settings"].items()}
    return limit > done and (then["max_steps"] == done or config.epochs > then["epochs"])


def _origins(run: Path, checkpoint: Path, record: dict[str, Any], config: RunConfig) -> dict[str, Path | None]:
    """Where the models are now that a run was started from; SFT goes on without them."""
    found = {}
    flags = {"rm": {"sft": "pretrain"}, "ppo": {"sft": "actor", "rm": "critic"}}.get(record["stage"], {})
    for key, field in flags.items():
        found[key] = folder = find_origin(record, key, run, config.runs_dir, f"--resume {run}", getattr(config, field))
        if folder is None:
            continue
        if key not in (record.get("weights") or {}):
            if describe(folder).get("tokenizer") != describe(checkpoint).get("tokenizer"):
                raise UserError(
                    f"--resume {run}: was started from {record[key]}, and {folder} has another tokenizer; put the "
                    "right one back, or start a new run"
                )
            print(f"note: {run} has recorded no digest of its {key} weights; {folder} is taken by name and tokenizer")
        elif str(folder) != record[key]:
            print(f"{record[key]} is now {folder}, with the same weights")
    return found


def _whole_checkpoint(run: Path, wanted: Path | None, config: RunConfig) -> Path:
    """The checkpoint to go on from: the one that was asked for, or the newest whole one of the run."""
    if wanted is not None:
        fault = fault_of(wanted)
        if fault is not None and (wanted / STATE).is_file():
            raise refusal(config.resume, f"is not whole ({fault}); give an earlier checkpoint, or --resume {run}")
        return wanted
    checkpoint, faults = newest_whole(run)
    if checkpoint is None and not faults:
        raise refusal(config.resume, f"{run} has nothing under checkpoints/ to go on from; start a new run")
    if checkpoint is None:
        raise refusal(
            config.resume, f"{run} has no whole checkpoint to go on from ({'; '.join(faults)}); start a new run"
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
    data: TokenDataset,
    origins: dict[str, Any],
) -> Path:
    """The run's folder, made and described unless it is there already, with what it starts from.

    UserError: no room, or a run to go on with was training on other data, or elsewhere with --deterministic.
    """
    if resumption is not None:
        recorded = resumption.hyperparams.get("data")
        if recorded == data.earlier_fingerprint:
            print(
                "note: the run was started before batches were of one size and splits went by conversation; SFT and "
                "reward model see a few rows twice in this epoch, and a few may have changed sides of a split"
            )
        elif recorded != data.fingerprint:
            raise UserError(
                f"--resume {resumption.run}: --dataset {config.dataset} gives other rows than when it was started; "
                "put the old data back, or start a new run"
            )
        _compare_machines(config, runtime, resumption)
        _take_up(config, resumption)
        return resumption.run
    run = create_run(stage, config.name, config.runs_dir)
    extra = {"runs_on": runtime.describe(), **origins, "data": data.fingerprint}
    try:
        write_hyperparams(run, stage, resolved(config), resolved(model.config), extra)
    except OSError as error:
        raise UserError(f"--runs-dir {config.runs_dir}: cannot write there ({error.strerror}); make room") from None
    print(f"writing to {run}")
    return run


def _compare_machines(config: RunConfig, runtime: Runtime, resumption: Resumption) -> None:
    """Tell what is not as it was when the run was started, for then other bits may come out; --deterministic, which
    promises the same bits, refuses."""
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
    way, or the next --resume auto would jump to it, and the next reader take it for this run's."""
    run, disk = resumption.run, Disk()
    for folder in (run, run / "checkpoints"):
        sweep(folder, disk)
    step = resumption.state["step"]
    why = dict.fromkeys(_ahead(run, step), f"is ahead of step {step}")
    why |= dict.fromkeys(_outdated(run, resumption.state), f"tells of figures behind step {step}")
    for path, told in why.items():
        print(f"{path} {told} and is kept as {set_aside(path, 'superseded', disk).name}")
    _agree_on_best(run, resumption.state, disk)
    if resumption.overridden:
        record = resumption.hyperparams
        changes = [*record.get("overridden", []), {"step": step, "settings": resumption.overridden}]
        record = {**record, "config": resolved(config), "overridden": changes}
        write_file(run / HYPERPARAMS, (json.dumps(scrubbed(record), indent=2) + "\n").encode())


def _ahead(run: Path, step: int) -> list[Path]:
    """Whole checkpoints, and reports of numbers gone wrong, that were written behind `step`."""
    ahead = [p for p in step_checkpoints(run) if int(p.name[5:]) > step and fault_of(p) is None]
    final = run / "final"
    if final.exists() and describe(final)["step"] > step:
        ahead.append(final)
    reports = ((p, re.fullmatch(r"(?:nonfinite|kl)_step_(\d+)\.(?:json|safetensors)", p.name)) for p in run.iterdir())
    return ahead + sorted(p for p, found in reports if found and int(found[1]) > step)


def _outdated(run: Path, state: dict[str, Any]) -> list[Path]:
    """What was drawn from the run's figures, if some of these are now cut off."""
    log = run / "metrics.jsonl"
    if not log.exists() or log.stat().st_size <= state.get("logs", {}).get("metrics", 0):
        return []
    return [p for p in (run / "doctor", run / "overoptimisation.json", run / "overoptimisation.png") if p.exists()]


def _agree_on_best(run: Path, state: dict[str, Any], disk: Disk) -> None:
    """Let best/ and the best figure in the trainer's state be of one model, or begin the search for it anew.

    A best/ that was saved behind the checkpoint has taken the place of the one that the state tells of, so neither can
    stay: the state's figure would keep every model out of best/ that is not better than one that is lost.
    """
    best = run / "best"
    if best.exists() and fault_of(best) is None:
        description = describe(best)
        figures = [abs(value) for name, value in description.items() if name.startswith("eval/")]
        if description["step"] <= state["step"] and abs(state["best"]) in figures:
            return
        print(
            f"{best} is of step {description['step']}, not the best up to step {state['step']}, and is kept as "
            f"{set_aside(best, 'superseded', disk).name}"
        )
    state["best"] = math.inf
