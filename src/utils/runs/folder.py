"""Run folders: where a run writes, and what it records about itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from config.scrub import scrubbed
from config.user_error import UserError
from utils.runs.durable import write_file

REPO = Path(__file__).resolve().parents[3]
HYPERPARAMS, LOCK = "hyperparams.json", ".lock"
_PACKAGES = ("torch", "numpy", "transformers", "datasets", "accelerate", "loralib", "tiktoken", "safetensors")


def typed_path(text: str | Path) -> Path:
    """A path as somebody typed it, where `~` is the home folder; UserError for that of a user who is not there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user's home folder; give the whole path") from None


def runs_root(runs_dir: str) -> Path:
    """The folder of all runs. The default `runs` is the repo's own from whatever folder a script is started."""
    return REPO / "runs" if runs_dir == "runs" else typed_path(runs_dir)


def create_run(stage: str, name: str, runs_dir: str) -> Path:
    """Make `STAGE_NAME_YYYYmmddHHMMSS` and return it; two runs started in one second get different seconds.

    UserError where the folder cannot be made, or its name would show a secret.
    """
    if scrubbed(name) != name:
        raise UserError(f"-n {name}: holds a secret, which the folder's name would show; give another name")
    root = runs_root(runs_dir)
    moment = time.time()
    while True:
        folder = root / f"{stage}_{name}_{time.strftime('%Y%m%d%H%M%S', time.localtime(moment))}"
        try:
            folder.mkdir(parents=True)
            lock_run(folder)
            return folder
        except FileExistsError:
            moment += 1
        except OSError as error:
            raise UserError(
                f"--runs-dir {runs_dir}: cannot write there ({error.strerror}); give a folder that can be written"
            ) from None


_locks: dict[Path, int] = {}  # open files, to be kept: a lock lasts as long as the process that holds its file


def lock_run(run: Path) -> None:
    """Keep other processes from writing to a run, until this one ends, however it ends.

    UserError where another process has it, it cannot be written to, or there is a link in it.
    """
    run = run.resolve()
    if run in _locks:
        return
    refuse_links(run)
    try:
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{run}: cannot write there ({error.strerror}); a run needs a folder that can be written"
        ) from None
    try:
        if not lock_descriptor(handle, blocking=False):
            holder = _holder(handle)
            os.close(handle)
            raise UserError(f"{run}: another process writes to it ({holder}); wait for its end, or stop it")
    except OSError as error:  # some network file systems have no locks
        print(
            f"warning: {run}: cannot be locked ({error.strerror}); let no second process write there", file=sys.stderr
        )
    _locks[run] = handle
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, f" process {os.getpid()} on {platform.node()}".encode())


def _holder(handle: int) -> str:
    """What the holder of a lock wrote into its file. On Windows the lock is on the first byte, which nobody else can
    read, so that nothing is told there."""
    try:
        text = os.read(handle, 100)
    except PermissionError:
        os.lseek(handle, 1, os.SEEK_SET)
        text = os.read(handle, 100)
    return text.decode(errors="replace").strip()


def refuse_links(folder: Path) -> None:
    """UserError for a folder that is a symbolic link or holds one: a run from elsewhere could have files overwritten
    outside it."""
    link = next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise UserError(f"{link}: is a link, and nothing is written through links in a run; put a copy in its place")


def write_hyperparams(
    folder: Path, stage: str, config: dict[str, Any], model: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Record the resolved configuration and what it ran on in hyperparams.json, without secrets."""
    record = {
        "stage": stage,
        "config": config,
        "model": model,
        "seed": config["seed"],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": versions(),
        "machine": platform.platform(),
        **extra,
    }
    write_file(folder / HYPERPARAMS, (json.dumps(scrubbed(record), indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in _PACKAGES}}


def _commit() -> str:
    """The code's commit, with "+changes" when the working tree differs; "unknown" outside git."""
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "src"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")
