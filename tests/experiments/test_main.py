"""The command line of experiments/main.py: tasks, exit codes, one line for wrong input, any working directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError, run_main
from experiments import main as script
from experiments.demo import run as demo

pytestmark = pytest.mark.slow

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
    places = {task: f"experiments.quick_looks.look_at_{task}" for task in script.QUICK_LOOKS}
    places |= {task: f"experiments.demo.run.run_{task}" for task in ("demo", "results")}
    places |= {task: f"experiments.{task}.run.run" for task in script.ROOMS}
    places |= {task: f"experiments.{task}.run" for task in script.FILES}
    assert list(places) == list(script.TASKS)
    for code, (task, place) in enumerate(places.items()):
        told = (task, code)
        monkeypatch.setattr(place, lambda parser, rest, told=told: calls.append((told[0], rest)) or told[1])
    codes = []
    for task in script.TASKS:
        monkeypatch.setattr(sys, "argv", ["main.py", "--flag", "1", "-t", task])
        codes.append(script.main())
    assert calls == [(task, ["--flag", "1"]) for task in script.TASKS]
    assert codes == list(range(len(places)))


def test_demo_flags_reach_the_demo(monkeypatch, tmp_path):
    calls, result = [], {"seconds": {}, "overoptimisation": "picture"}
    for name in ("seed_table", "judged_table", "results_table"):
        monkeypatch.setattr(demo, name, lambda _: "a table")
    monkeypatch.setattr(demo, "failures", lambda _: [])
    monkeypatch.setattr(demo, "runs_root", lambda _: tmp_path)
    monkeypatch.setattr(demo, "newest_run", lambda run, _: run)
    monkeypatch.setattr(demo, "draw_demo", lambda *_: None)
    monkeypatch.setattr(demo, "draw_kl_ablation", lambda runs, path: calls.append((runs, str(path))))
    monkeypatch.setattr(demo, "run_seed", lambda *flags, **settings: calls.append((flags, settings)) or result)
    assert demo.run_demo(script.Parser(), ["--seed", "3", "--prompts", "10"]) == 0
    assert calls.pop() == ((3, "runs", (), 10, ()), {})
    assert demo.run_demo(script.Parser(), ["--dtype", "bf16", "--device", "cpu"]) == 0
    assert calls.pop() == ((0, "runs", (), 400, ("--dtype", "bf16", "--device", "cpu")), {})
    first = ["--seeds", "4", "5", "--variants", "kl0"]
    settings = {"runs_dir": "runs", "variants": ("kl0",), "prompts": 400}
    settings |= {"split": "validation", "side_by_side": False, "train": True}
    pairs = [("ppo_demo_s4", "ppo_demo_s4_kl0"), ("ppo_demo_s5", "ppo_demo_s5_kl0")]
    assert demo.run_results(script.Parser(), first) == 0
    assert calls == [((4,), settings), ((5,), settings), (pairs, "assets/overoptimisation.png")]
    calls.clear()
    flags = ["--split", "test", "--judge-only", "--picture", "p.png", "--parallel", "2"]
    assert demo.run_results(script.Parser(), [*first, *flags]) == 0
    settings |= {"split": "test", "side_by_side": True, "train": False}
    assert sorted(calls[:2]) == [((4,), settings), ((5,), settings)] and calls[2] == (pairs, "p.png")
    with pytest.raises(UserError, match="invalid choice: 'kl1'"):
        demo.run_results(script.Parser(), ["--variants", "kl1"])
