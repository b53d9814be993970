"""Run folders: names, what they say about themselves, and how a model argument finds a checkpoint."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError
from utils.runs import folder as run_folder
from utils.runs.folder import (
    REPO,
    create_run,
    find_checkpoint,
    newest_run,
    runs_named,
    runs_root,
    step_checkpoints,
    write_hyperparams,
)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text("{}")
    return folder


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


def test_runs_are_found_by_their_whole_name(tmp_path) -> None:
    names = [
        "sft_demo_20260101000000", "sft_demo_20260203040506", "sft_demo_lora_20270101000000", "sft_demo_2026",
        "rm_demo_20280101000000", "sft_demoX20270101000000", "sft_d[e]mo_20270101000000",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    assert [p.name for p in runs_named("sft_demo", str(tmp_path))] == [names[1], names[0]]
    assert newest_run("sft_demo", str(tmp_path)).name == names[1]
    assert newest_run("sft_d[e]mo", str(tmp_path)).name == names[-1]
    assert newest_run("sft", str(tmp_path)) is None and newest_run("sft_demo", str(tmp_path / "none")) is None


def test_a_run_means_its_final_else_best_else_newest_step(tmp_path) -> None:
    run = tmp_path / "sft_demo_20260101000000"
    step5, step30 = (checkpoint(run / "checkpoints" / f"step_{n:08d}") for n in (5, 30))
    (run / "checkpoints" / "step_00000040.writing").mkdir()
    assert step_checkpoints(run) == [step5, step30]

    def found(argument) -> Path:
        return find_checkpoint(str(argument), str(tmp_path), "-p")

    assert found(run) == step30 == found("sft_demo")
    best = checkpoint(run / "best")
    assert found("sft_demo") == best
    final = checkpoint(run / "final")
    assert found("sft_demo") == final == found(run) == found(run.name) == found(f"{run.name}/final")
    assert found(step5) == step5
    checkpoint(tmp_path / "sft_demo_20260101000001" / "final")
    assert found("sft_demo").parent.name == "sft_demo_20260101000001"


def test_paths_count_from_the_working_directory_and_from_the_repo(tmp_path, monkeypatch) -> None:
    checkpoint(tmp_path / "a" / "final")
    monkeypatch.chdir(tmp_path)
    found = find_checkpoint("a", "runs", "-p")
    assert found == (tmp_path / "a" / "final").resolve() and found.is_absolute()
    monkeypatch.setattr(run_folder, "REPO", tmp_path)
    os.makedirs("src")
    monkeypatch.chdir(tmp_path / "src")
    assert find_checkpoint("a", "runs", "-p") == found


def test_errors_name_the_flag_and_what_there_is(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^-a sft_demo: no such run or folder; runs in .*: none yet$"):
        find_checkpoint("sft_demo", str(tmp_path), "-a")
    for name in ("sft_a_20260101000000", "rm_b_20260101000000", "rm_b_20260101000001", "notes_x"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^-a sft_demo: no such run or folder; runs in .*: rm_b, sft_a$"):
        find_checkpoint("sft_demo", str(tmp_path), "-a")
    with pytest.raises(UserError, match=r"^-c rm_b: no checkpoint in .*rm_b_20260101000001;"):
        find_checkpoint("rm_b", str(tmp_path), "-c")
