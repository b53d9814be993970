"""The soak: what it compares, what it measures, and what it starts."""

import json
import random
import sys

import pytest

from config.user_error import UserError
from experiments import main as script
from experiments import soak

pytestmark = pytest.mark.slow

# Stands in for train_ppo.py: a run of ten iterations that saves after each, and takes a while.
SCRIPT = """
import json, sys, time
from pathlib import Path
name, runs = sys.argv[sys.argv.index("-n") + 1], Path(sys.argv[sys.argv.index("--runs-dir") + 1])
run = runs / f"ppo_{name}_20260101000000"
(run / "final").mkdir(parents=True, exist_ok=True)
path = run / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
for step in range(done + 1, 11):
    time.sleep(0.1)
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "objective/kl": EXPRESSION}) + "\\n")
(run / "final" / "model.safetensors").write_bytes(b"weights")
sys.exit(CODE)
"""


def run(tmp_path, monkeypatch, expression: str = "step / 10", code: int = 0) -> int:
    folder = tmp_path / "src" / "training"
    folder.mkdir(parents=True)
    (folder / "train_ppo.py").write_text(SCRIPT.replace("EXPRESSION", expression).replace("CODE", str(code)))
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setattr(soak, "REPO", tmp_path)
    flags = ["-a", "sft", "-c", "rm", "--iterations", "10", "--save-every", "1", "--kill-every", "0.8", "--seed", "3"]
    return soak.run(script.Parser(), [*flags, "--runs-dir", str(runs), "--lr", "1"])


def test_a_run_that_goes_on_rightly_passes(tmp_path, monkeypatch, capsys) -> None:
    assert run(tmp_path, monkeypatch) == 0
    told = capsys.readouterr().out
    assert "kill 1: " in told and "kills in 10 iterations, a checkpoint every 1" in told
    assert "ended with the bits and the figures of the one that was left alone" in told


def test_a_run_that_does_not_fails(tmp_path, monkeypatch, capsys) -> None:
    assert run(tmp_path, monkeypatch, expression="step - done") == 1
    assert "FAILED: metrics.jsonl differs" in capsys.readouterr().out


def test_a_script_that_fails_is_told(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="ended with exit code 3; see .*ppo_soak_left_.*log"):
        run(tmp_path, monkeypatch, code=3)


def test_weights_are_compared_to_the_bit(tmp_path) -> None:
    for name, data in (("one", b"a"), ("other", b"b")):
        (tmp_path / name / "final" / "critic").mkdir(parents=True)
        (tmp_path / name / "final" / "critic" / "model.safetensors").write_bytes(data)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"objective/kl": 1, "time": 3}) + "\n")
    found = soak.differences(tmp_path / "one", tmp_path / "other")
    assert found == ["final/critic/model.safetensors differs"]


def test_memory_is_compared_after_the_warm_up() -> None:
    steady = [50 if i < 10 else 100 for i in range(40)]
    assert soak.growth(steady) == (100, 100)
    growing = [100 + i for i in range(40)]
    early, late = soak.growth(growing)
    assert late > early * 1.1


def test_flags_reach_it_and_others_go_to_the_script(monkeypatch) -> None:
    calls = []

    def one_life(name, command, runs_dir, seconds=None):
        calls.append((command, runs_dir, seconds))
        return True, [1]

    monkeypatch.setattr(soak, "one_life", one_life)
    monkeypatch.setattr(soak, "newest_run", lambda name, runs_dir: None)
    monkeypatch.setattr(soak, "differences", lambda one, other: [])
    monkeypatch.setattr(sys, "argv", ["main.py", "-t", "soak", "--iterations", "7", "--kill-every", "2", "-b", "8"])
    assert script.main() == 0
    command = "-a sft_demo_s0 -c rm_demo_s0 --iterations 7 --save-every 5 --deterministic --resume auto --runs-dir runs"
    undisturbed, disturbed = calls
    assert undisturbed == ([*command.split(), "-b", "8"], "runs", None)
    assert disturbed == (*undisturbed[:2], random.Random(0).expovariate(1 / 2))
    monkeypatch.setattr(sys, "argv", ["main.py", "-t", "soak", "--save-every", "0"])
    with pytest.raises(UserError, match="must be above 0"):
        script.main()
