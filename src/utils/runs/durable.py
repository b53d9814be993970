"""Folders and files written so that the old or the new one is found whole, whenever the process or the machine stops.

A folder NAME is replaced in these steps:

1. write NAME.writing, 2. fsync its files and folders, 3. rename NAME to NAME.old, 4. rename NAME.writing to NAME,
5. fsync the folder around them, 6. remove NAME.old.

Between 3 and 4 there is no NAME; `standing` then finds NAME.old, and the next write puts it back first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

Produce = Callable[[Path], object]

WRITING, OLD, DELETING, PARTIAL = ".writing", ".old", ".deleting", ".partial"


class Disk:
    """The file operations that durable writes are made of; a test puts its own in place, to stop or fail at each."""

    def write(self, path: Path, produce: Produce) -> None:
        """Make a file or a folder: `produce(path)`."""
        produce(path)

    def sync(self, path: Path) -> None:
        """Wait until a file, or the list of names in a folder, is on the medium."""
        if os.name == "nt":  # Windows syncs no folders, and a file only where it may be written to
            if path.is_dir():
                return
            handle = os.open(path, os.O_RDWR)
        else:
            handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name; a file of that name is replaced."""
        os.replace(old, new)

    def remove(self, folder: Path) -> None:
        """Remove a folder and what is in it."""
        shutil.rmtree(folder)


def standing(folder: Path) -> Path:
    """Where `folder` stands: under its name, or as NAME.old when a write was cut short between the two renames."""
    if folder.exists():
        return folder
    old = _beside(folder, OLD)
    return old if old.exists() else folder


def replace_folder(folder: Path, parts: Sequence[tuple[str, Produce]], disk: Disk) -> None:
    """Write `folder`, or replace it, durably and at once.

    Args:
        folder: its name; the folder around it is made when it is missing.
        parts: (name, produce) in the order of writing; `produce` gets the path of that name and writes a file or a
            folder there. An empty name is the new folder itself.

    Raises:
        OSError: a write failed; what stood before still stands, and what was written is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _beside(folder, WRITING), _beside(folder, OLD)
    if standing(folder) == old:
        disk.rename(old, folder)
    for left_over in (fresh, old):
        if left_over.exists():
            disk.remove(left_over)
    try:
        fresh.mkdir()
        for name, produce in parts:
            disk.write(fresh / name, produce)
        for path in sorted(fresh.rglob("*")):
            disk.sync(path)
        disk.sync(fresh)
        if folder.exists():
            disk.rename(folder, old)
        disk.rename(fresh, folder)
    except OSError:
        if standing(folder) == old:
            os.replace(old, folder)
        shutil.rmtree(fresh, ignore_errors=True)  # gives its room back at once
        raise
    disk.sync(folder.parent)
    if old.exists():
        disk.remove(old)


def set_aside(folder: Path, why: str, disk: Disk) -> Path:
    """Rename NAME to NAME.`why`1, or the next number that is free, so that its place can be taken; the new path."""
    number = 1
    while (aside := _beside(folder, f".{why}{number}")).exists():
        number += 1
    disk.rename(folder, aside)
    return aside


def delete_folder(folder: Path, disk: Disk) -> None:
    """Remove a folder; one that is cut short halfway has another name, so that nobody takes it for whole."""
    doomed = _beside(folder, DELETING)
    disk.rename(folder, doomed)
    disk.remove(doomed)


def sweep(folder: Path, disk: Disk) -> None:
    """Remove what writes and deletions that were cut short have left in `folder`, and put NAME.old back."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix == OLD and standing(path.with_suffix("")) == path:
            disk.rename(path, path.with_suffix(""))
        elif path.suffix in (WRITING, OLD, DELETING):
            disk.remove(path) if path.is_dir() else path.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write or replace one file durably and at once; after an OSError the old one still stands."""
    disk, fresh = Disk(), path.with_name("new" + WRITING)
    try:
        fresh.unlink(missing_ok=True)  # of a write that was cut short; it could be a link
        fresh.write_bytes(data)
        disk.sync(fresh)
        disk.rename(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    disk.sync(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the body ends: durably and whole, or not at all.

    Unlike `write_file` it takes as much as is written to it, and several processes may write one path at once: each
    has a temporary file of its own, *.partial, which stays only where a process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PARTIAL, delete=False) as file:
        partial = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames and removes no open file
            os.replace(partial, path)
        finally:
            file.close()
            partial.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
