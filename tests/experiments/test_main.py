"""The command line of experiments/main.py: tasks, exit codes, one line for wrong input, any working directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError, run_main
from experiments import main as script

ROOT = Path(__file__).resolve().parents[2]


def start(*words, cwd=ROOT):
    """Run the script as a process of its own."""
    path = os.path.relpath(ROOT / "src/experiments/main.py", cwd)
    return subprocess.run([sys.executable, path, *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("cwd", [ROOT / "src", Path("/")])
def test_runs_from_any_folder(cwd):
    done = start("-t", "tokenizer", "--text", "hi", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "round trip: the same text" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["-t", "nope"], "-t nope: choose one of gpt, reward, dataset"),
        ([], "-t (missing): choose one of"),
        (["-t", "gpt"], "-m/--model"),
        (["-t", "loss", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(script.main)
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.out == "" and complaint in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_help_lists_every_task(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    assert script.main() == 0
    shown = capsys.readouterr().out
    assert all(f"\n{task} " in shown for task in script.TASKS)


def test_tasks_go_where_they_belong(monkeypatch):
    calls = []
    monkeypatch.setattr("experiments.quick_looks.run", lambda task, parser, rest: calls.append((task, rest)) or 0)
    monkeypatch.setattr("experiments.main.demo_task", lambda task, parser, rest: calls.append((task, rest)) or 7)
    own = {**{task: f"experiments.{task}.run" for task in script.ROOMS}, "soak": "experiments.soak"}
    for task, module in own.items():
        monkeypatch.setattr(f"{module}.run", lambda parser, rest, task=task: calls.append((task, rest)) or 5)
    codes = []
    for task in script.TASKS:
        monkeypatch.setattr(sys, "argv", ["main.py", "--flag", "1", "-t", task])
        codes.append(script.main())
    assert calls == [(task, ["--flag", "1"]) for task in script.TASKS]
    expected = {"demo": 7, "results": 7} | dict.fromkeys(own, 5)
    assert codes == [expected.get(task, 0) for task in script.TASKS]


def test_demo_flags_reach_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr("experiments.demo.run.run_demo", lambda *flags: calls.append(flags) or 0)
    monkeypatch.setattr("experiments.demo.run.run_results", lambda *flags: calls.append(flags) or 1)
    assert script.demo_task("demo", script.Parser(), ["--seed", "3", "--prompts", "10"]) == 0
    assert calls.pop() == (3, "runs", 10, ())
    assert script.demo_task("demo", script.Parser(), ["--dtype", "bf16"]) == 0
    assert calls.pop() == (0, "runs", 400, ("--dtype", "bf16"))
    assert script.demo_task("results", script.Parser(), ["--seeds", "4", "5", "--variants", "kl0"]) == 1
    first = ([4, 5], "runs", ("kl0",), 400, 1)
    assert calls.pop() == (*first, "assets/overoptimisation.png", "validation", True)
    flags = ["--seeds", "4", "5", "--variants", "kl0", "--split", "test", "--judge-only", "--picture", "p.png"]
    script.demo_task("results", script.Parser(), flags)
    assert calls.pop() == (*first, "p.png", "test", False)
    with pytest.raises(UserError, match="invalid choice: 'kl1'"):
        script.demo_task("results", script.Parser(), ["--variants", "kl1"])
