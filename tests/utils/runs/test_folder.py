"""Run folders: names, and what they say about themselves."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError
from utils.runs.finding import runs_named
from utils.runs.folder import REPO, create_run, runs_root, write_hyperparams


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
