"""The cache on disk: whole or absent, and damage is found."""

import logging
import os
import time
from multiprocessing import get_context

import numpy as np

from utils.data.token_cache import default_cache_dir, read_arrays, write_arrays

KEY = "ab" * 32
ARRAYS = {"a": np.arange(500, dtype=np.int32), "b": np.array([0, 3], dtype=np.int64)}


def same(arrays):
    return (
        arrays is not None
        and set(arrays) == set(ARRAYS)
        and all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    )


def test_round_trip_and_nothing_left_beside(tmp_path):
    assert read_arrays(tmp_path / "new", KEY) is None
    write_arrays(tmp_path / "new", KEY, ARRAYS)
    assert same(read_arrays(tmp_path / "new", KEY))
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_every_damaged_byte_is_found_or_harmless(tmp_path, caplog):
    write_arrays(tmp_path, KEY, ARRAYS)
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    caplog.set_level(logging.CRITICAL)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        arrays = read_arrays(tmp_path, KEY)
        # A flipped byte in the zip's own bookkeeping (a date, a flag) may leave every array and its checksum intact.
        assert arrays is None or same(arrays)
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at])
        assert read_arrays(tmp_path, KEY) is None


def test_an_entry_of_another_key_is_not_taken(tmp_path, caplog):
    write_arrays(tmp_path, KEY, ARRAYS)
    assert read_arrays(tmp_path, KEY[:40] + "c" * 24) is None, "same file name, other key"
    assert "is damaged" in caplog.text


def test_nothing_is_unpickled(tmp_path, caplog):
    write_arrays(tmp_path, KEY, ARRAYS)
    np.savez(next(tmp_path.iterdir()), label=np.array([print], dtype=object), a=np.array([print], dtype=object))
    assert read_arrays(tmp_path, KEY) is None


def test_a_failed_write_leaves_the_old_entry_and_no_rest(tmp_path, monkeypatch, caplog):
    write_arrays(tmp_path, KEY, ARRAYS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    write_arrays(tmp_path, KEY, {"a": np.zeros(3)})
    assert same(read_arrays(tmp_path, KEY)) and len(list(tmp_path.iterdir())) == 1
    assert "No space left" in caplog.text


def test_an_unwritable_place_is_told_and_survived(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    write_arrays(tmp_path / "file", KEY, ARRAYS)
    assert "cannot be written" in caplog.text
    assert read_arrays(tmp_path / "file", KEY) is None


def test_remains_of_killed_processes_are_removed_after_a_day(tmp_path):
    old, young = tmp_path / "old.partial", tmp_path / "young.partial"
    for path in (old, young):
        path.write_text("x")
    os.utime(old, (time.time() - 90_000,) * 2)
    write_arrays(tmp_path, KEY, ARRAYS)
    assert not old.exists() and young.exists()


def test_the_place_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("RLHF_CACHE_DIR")
    assert default_cache_dir().parts[-3:] == ("runs", ".cache", "tokens")


def write_often(folder, times):
    for _ in range(times):
        write_arrays(folder, KEY, ARRAYS)


def test_two_writers_at_once_never_show_a_torn_entry(tmp_path):
    context = get_context("fork")
    processes = [context.Process(target=write_often, args=(tmp_path, 40)) for _ in range(2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        exists = bool(list(tmp_path.glob("*.npz")))
        assert same(read_arrays(tmp_path, KEY)) or not exists
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert same(read_arrays(tmp_path, KEY)) and len(list(tmp_path.iterdir())) == 1
