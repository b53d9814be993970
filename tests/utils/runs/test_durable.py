"""Replacing a folder: old or new at every moment, on the medium before it is seen, whole after a write that failed."""

import errno
import os
from pathlib import Path

import pytest

from utils.runs.durable import Disk, delete_folder, replace_folder, set_aside, standing, sweep, whole_file, write_file


class Recorder(Disk):
    """Notes every operation; raises at the one of the given number."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        self.operations: list[tuple[str, ...]] = []
        self.fails_at, self.error = fails_at, error

    def _count(self, *operation) -> None:
        if len(self.operations) == self.fails_at:
            raise self.error
        self.operations.append(operation)

    def write(self, path, produce) -> None:
        self._count("write", path.name)
        super().write(path, produce)

    def sync(self, path) -> None:
        self._count("sync", path.name)
        super().sync(path)

    def rename(self, old, new) -> None:
        self._count("rename", old.name, new.name)
        super().rename(old, new)

    def remove(self, folder) -> None:
        self._count("remove", folder.name)
        super().remove(folder)


def parts(text: str) -> list:
    """A file, and a folder with a file in it."""

    def folder(path: Path) -> None:
        path.mkdir()
        (path / "inner").write_text(text)

    return [("a", lambda path: path.write_text(text)), ("b", folder)]


def content(folder: Path) -> set[str]:
    return {(folder / "a").read_text(), (folder / "b" / "inner").read_text()}


def test_everything_is_on_the_medium_before_it_gets_its_name(tmp_path) -> None:
    disk = Recorder()
    for text in ("one", "two"):
        replace_folder(tmp_path / "x", parts(text), disk)
    assert content(tmp_path / "x") == {"two"} and os.listdir(tmp_path) == ["x"]
    first = [("write", "a"), ("write", "b"), ("sync", "a"), ("sync", "b"), ("sync", "inner"), ("sync", "x.writing")]
    seal, around = ("rename", "x.writing", "x"), ("sync", tmp_path.name)
    assert disk.operations == [
        *first, seal, around,
        *first, ("rename", "x", "x.old"), seal, around, ("remove", "x.old"),
    ]  # fmt: skip


class Kill(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("error", [Kill(), OSError(errno.ENOSPC, "full")], ids=["kill", "error"])
def test_old_or_new_stands_whole_wherever_it_ends(tmp_path, error) -> None:
    counter = Recorder()
    for text in ("one", "two"):
        replace_folder(tmp_path / "count" / "x", parts(text), counter)
    per_write = len(counter.operations) - 8
    for moment in range(per_write):
        folder = tmp_path / str(moment) / "x"
        replace_folder(folder, parts("one"), Disk())
        with pytest.raises(type(error)):
            replace_folder(folder, parts("two"), Recorder(moment, error))
        found = content(standing(folder))
        assert len(found) == 1, moment
        if isinstance(error, OSError) and found == {"one"}:
            assert os.listdir(folder.parent) == ["x"], moment  # the room is given back
        replace_folder(folder, parts("three"), Disk())  # and the next write is not in the way of what is left
        assert content(folder) == {"three"} and os.listdir(folder.parent) == ["x"]


def test_a_sweep_puts_back_what_stood_and_removes_the_rest(tmp_path) -> None:
    for name in ("best.old", "final.old", "final", "step_1.writing", "step_2.deleting", "step_3", "step_4.torn1"):
        (tmp_path / name).mkdir()
    (tmp_path / "new.writing").write_text("half")
    sweep(tmp_path, Disk())
    assert sorted(os.listdir(tmp_path)) == ["best", "final", "step_3", "step_4.torn1"]
    sweep(tmp_path / "not there", Disk())


def test_a_deletion_cut_short_leaves_nothing_under_the_name(tmp_path) -> None:
    replace_folder(tmp_path / "x", parts("one"), Disk())
    with pytest.raises(Kill):
        delete_folder(tmp_path / "x", Recorder(1, Kill()))
    assert os.listdir(tmp_path) == ["x.deleting"]


def test_names_of_what_is_set_aside_do_not_collide(tmp_path) -> None:
    for number in (1, 2):
        (tmp_path / "x").mkdir()
        assert set_aside(tmp_path / "x", "torn", Disk()).name == f"x.torn{number}"


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"one")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_two_may_write_one_file_and_whoever_ends_last_stands_whole(tmp_path) -> None:
    path = tmp_path / "new folder" / "file"
    with whole_file(path) as one:
        one.write(b"one")
        with whole_file(path) as two:
            two.write(b"two")
            assert not path.exists() and len(os.listdir(path.parent)) == 2
        assert path.read_bytes() == b"two"
    with pytest.raises(KeyError), whole_file(path) as three:
        three.write(b"three")
        raise KeyError
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["file"]
