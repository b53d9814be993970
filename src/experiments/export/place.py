"""Where an export goes: a folder that takes its place as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from config.user_error import UserError
from utils.runs.durable import Disk

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"


def target_folder(argument: str, overwrite: bool, checkpoint: Path) -> Path:
    """The folder to write, through links; UserError where something stands there, or the place is a bad one."""
    if not argument.strip():
        raise UserError("--to: is empty; give the folder to write")
    try:
        target = Path(argument).expanduser().resolve()
        there = sorted(target.iterdir()) if target.is_dir() else None
        is_taken = there is None and target.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home or a loop of links that leads nowhere
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--to {argument}: cannot be used ({reason}); give another folder") from None
    if is_taken:
        raise UserError(f"--to {argument}: is a file; give a folder")
    if Path.cwd().is_relative_to(target):
        raise UserError(f"--to {argument}: is the working folder or around it; give a folder of its own")
    if target.is_relative_to(checkpoint):
        raise UserError(f"--to {argument}: is inside the checkpoint {checkpoint}; give a folder outside it")
    if there and not overwrite:
        raise UserError(f"--to {argument}: is not empty ({there[0].name}, ...); --overwrite replaces an export")
    other = next((path for path in there or () if path.is_symlink() or not path.is_file()), None)
    if other is not None or (there and not {target / CONFIG, target / TOKENIZER} <= set(there)):
        why = f"it holds {other.name}" if other is not None else f"it has no {CONFIG} and {TOKENIZER}"
        raise UserError(f"--to {argument}: --overwrite replaces an export, and this is none ({why}); give another one")
    return target


@contextlib.contextmanager
def replacing(target: Path, argument: str) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the body ends; after any exception it is gone.

    Raises:
        UserError: it cannot be written: no room, no permission.
    """
    disk, fresh = Disk(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".writing", dir=target.parent))
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o755 & ~mask)
        yield fresh
        for path in sorted(fresh.iterdir()):
            path.chmod(0o644 & ~mask)
            disk.sync(path)
        disk.sync(fresh)
        if target.exists() and any(target.iterdir()):
            old = fresh.with_suffix(".old")
            disk.rename(target, old)
            try:
                disk.rename(fresh, target)
            except OSError:
                disk.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            disk.rename(fresh, target)
        disk.sync(target.parent)
    except OSError as error:
        told = f"cannot be written ({error.strerror or error}); give a place with room that can be written"
        raise UserError(f"--to {argument}: {told}") from None
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
