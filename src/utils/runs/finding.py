"""Finding runs: which folder a path, or the name of a run without its time, means on a command line."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from config.user_error import UserError
from utils.runs.durable import standing
from utils.runs.folder import REPO, runs_root, typed_path


def runs_named(stem: str, runs_dir: str) -> list[Path]:
    """The run folders called exactly `stem` (`sft_demo`), newest first."""
    return sorted((run for run, name in _runs(runs_dir).items() if name == stem), reverse=True)


def newest_run(stem: str, runs_dir: str) -> Path | None:
    """The newest run folder called exactly `stem`, or None."""
    return next(iter(runs_named(stem, runs_dir)), None)


def _runs(runs_dir: str) -> dict[Path, str]:
    """All run folders, and their names without the time."""
    root = runs_root(runs_dir)
    there = root.iterdir() if root.is_dir() else ()
    return {path: match[1] for path in there if (match := re.fullmatch(r"(.+)_\d{14}", path.name))}


def run_meant(stem: str, runs_dir: str, flag: str, usable: Callable[[Path], bool]) -> Path | None:
    """The run that a name without a time means, None without one.

    It is the newest run of exactly that name, usable or not: of an empty one its owner wants to be told. Without such a
    run it is the newest usable one whose name goes on with `_` (`sft_demo` finds `sft_demo_s0`, but `sft_demo_s` and a
    bare `sft` find nothing), and a line on stderr says which, unless `flag` is empty; if none is usable, the newest.
    """
    exact = newest_run(stem, runs_dir)
    if exact is not None or "_" not in stem:
        return exact
    longer = [run for run, name in _runs(runs_dir).items() if name.startswith(f"{stem}_")]
    longer.sort(key=lambda run: (run.name[-14:], run.name), reverse=True)
    found = next(filter(usable, longer), None)
    if found is None:
        return next(iter(longer), None)
    others = len(longer) - 1
    more = f"; {others} other run{'s begin' if others > 1 else ' begins'} with {stem}_" if others else ""
    if flag:
        _tell(f"{flag} {stem}: taking {found.name}{more}")
    return found


@functools.cache
def _tell(line: str) -> None:
    """Say something on stderr, and only once: a name is looked up for the memory plan and again to be loaded."""
    print(line, file=sys.stderr)


def places(path: str, runs_dir: str) -> list[Path]:
    """What a folder named on the command line may mean: from the working directory, the repo, or `runs_dir`."""
    return [typed_path(path), REPO / path, runs_root(runs_dir) / path]


def find_folder(argument: str, runs_dir: str, flag: str, usable: Callable[[Path], bool]) -> Path:
    """The folder that a run argument means: a path (a run, or a folder inside one), else a name as in `run_meant`.

    UserError where there is none; the message lists the runs there are.
    """
    folder = next((place for place in places(argument, runs_dir) if place.is_dir()), None)
    folder = folder or run_meant(argument, runs_dir, flag, usable)
    if folder is None:
        raise _nothing_there(argument, runs_dir, flag)
    return folder


def find_checkpoint(argument: str, runs_dir: str, flag: str) -> Path:
    """The checkpoint folder that a model argument means, as an absolute path.

    Args:
        argument: a run folder (its final/, else best/, else newest step), a checkpoint folder, or the name of a run
            without its time, such as `sft_demo` (see `run_meant`). Paths count from the working directory, the repo, or
            `runs_dir`, where names are looked up, too.
        flag: named in the error, and in the line that `run_meant` says.

    Raises:
        UserError: there is no such run or it has no checkpoint; the message lists the runs there are.
    """
    folders = places(argument, runs_dir)
    found = next(filter(None, map(_checkpoint_in, folders)), None)
    if found is not None:
        return found
    run = run_meant(argument, runs_dir, flag, lambda run: _checkpoint_in(run) is not None)
    if run is not None:
        folders.append(run)
        if (found := _checkpoint_in(run)) is not None:
            return found
    empty = next((folder for folder in reversed(folders) if folder.is_dir()), None)
    if empty is not None:
        raise UserError(
            f"{flag} {argument}: no checkpoint in {empty}; give a run that has saved one, or a folder with model.json"
        )
    raise _nothing_there(argument, runs_dir, flag)


def _checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint that a folder is or holds."""
    for inner in (folder, folder / "final", folder / "best", *reversed(step_checkpoints(folder))):
        if (standing(inner) / "model.json").is_file():
            return standing(inner).resolve()
    return None


def _nothing_there(argument: str, runs_dir: str, flag: str) -> UserError:
    there = ", ".join(sorted(set(_runs(runs_dir).values()))) or "none yet"
    stem = re.fullmatch(r"(sft|rm|ppo)_([\w.-]+)", argument)
    remedy = f"; src/training/train_{stem[1]}.py -n {stem[2]} makes one" if stem else ""
    return UserError(f"{flag} {argument}: no such run or folder; runs in {runs_root(runs_dir)}: {there}{remedy}")


def step_checkpoints(run: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_????????") if p.name[5:].isdigit())
