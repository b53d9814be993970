"""Run folders: names, and what they say about themselves."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import lock_descriptor

from config.user_error import UserError
from utils.runs import folder as run_folder
from utils.runs.finding import runs_named
from utils.runs.folder import REPO, create_run, lock_run, runs_root, write_hyperparams


def test_the_default_folder_is_the_repos_from_anywhere(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_root("runs") == REPO / "runs" and (REPO / "src" / "training").is_dir()
    assert runs_root("elsewhere") == Path("elsewhere")


def test_two_runs_of_one_second_get_two_folders(tmp_path) -> None:
    runs = [create_run("sft", "demo", str(tmp_path / "new")) for _ in range(3)]
    assert len(set(runs)) == 3 and all(re.fullmatch(r"sft_demo_\d{14}", run.name) and run.is_dir() for run in runs)
    assert runs_named("sft_demo", str(tmp_path / "new")) == sorted(runs, reverse=True)


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_is_no_folder_for_runs(tmp_path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--runs-dir .*: cannot write there"):
        create_run("sft", "demo", str(tmp_path / where))


def test_hyperparams_tell_what_ran(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_sft.py", "-n", "demo"])
    write_hyperparams(tmp_path, "sft", {"seed": 7, "lr": 0.1}, {"n_layer": 2}, {"pretrain": "scratch"})
    record = json.loads((tmp_path / "hyperparams.json").read_text())
    assert record["config"] == {"seed": 7, "lr": 0.1} and record["model"] == {"n_layer": 2}
    assert (record["stage"], record["seed"], record["pretrain"]) == ("sft", 7, "scratch")
    assert record["command"] == ["train_sft.py", "-n", "demo"]
    assert {"python", "torch", "accelerate", "loralib", "tiktoken"} <= set(record["versions"])
    status, head = subprocess.getstatusoutput(f"git -C {shlex.quote(str(REPO))} rev-parse HEAD")
    assert record["commit"].removesuffix("+changes") == ("unknown" if status else head)


def test_no_git_is_no_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write_hyperparams(tmp_path, "sft", {"seed": 0}, {}, {})
    assert json.loads((tmp_path / "hyperparams.json").read_text())["commit"] == "unknown"


@pytest.fixture
def held(tmp_path):
    """A run whose lock somebody else has: another open file is another holder."""
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    assert lock_descriptor(handle, blocking=False)
    yield tmp_path, handle
    os.close(handle)


@pytest.mark.parametrize("text", ["process 7 on there", " process 7 on there"], ids=["of earlier code", "of today"])
def test_a_run_that_another_process_writes_to_is_refused_by_name(held, text: str) -> None:
    run, handle = held
    os.write(handle, text.encode())
    with pytest.raises(UserError, match=r"another process writes to it \(process 7 on there\); wait for its end"):
        lock_run(run)
    assert (run / ".lock").read_text() == text


def test_the_holder_is_told_where_a_locked_byte_cannot_be_read(held, monkeypatch) -> None:
    """As on Windows."""
    run, handle = held
    os.write(handle, b" process 7 on there")
    read = os.read

    def on_windows(fd: int, count: int) -> bytes:
        if os.lseek(fd, 0, os.SEEK_CUR) == 0:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(fd, count)

    monkeypatch.setattr(os, "read", on_windows)
    with pytest.raises(UserError, match=r"\(process 7 on there\)"):
        lock_run(run)


def test_the_lock_of_a_process_that_died_is_nobodys(tmp_path) -> None:
    (tmp_path / ".lock").write_text("process 1234567 on a machine whose name is longer than that of this one")
    lock_run(tmp_path)
    lock_run(tmp_path)  # it is this process's own
    told = (tmp_path / ".lock").read_text()
    assert told.startswith(f" process {os.getpid()} on ") and "1234567" not in told


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys) -> None:
    def no_locks(handle: int, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "lock_descriptor", no_locks)
    lock_run(tmp_path)
    assert "cannot be locked (No locks available); let no second process write there" in capsys.readouterr().err
