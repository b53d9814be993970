"""The real scripts, killed for good at random moments and started again with --resume auto until they are done."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from killing import assert_same_run
from scripts import call, newest

from utils.runs.finding import step_checkpoints
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

COMMANDS = {
    "sft": "--config gpt2-nano/dropout --max-steps 8 --warmup-steps 2 --eval-every 4 --save-every 3 -b 2",
    "rm": "-p sft_base --config gpt2-nano/lora --max-steps 8 --warmup-steps 2 --eval-every 4 --save-every 3",
    "ppo": "-a sft_base -c rm_base --max-steps 5 --eval-every 2 --save-every 2 --kl-target 0.1 --kl-horizon 20",
}
# The chain of the three stages for a LLaMA: each starts from what the one before has left after its kills.
LLAMA = {
    "sft": "--config llama-nano --max-steps 6 --warmup-steps 2 --eval-every 4 --save-every 2",
    "rm": "-p sft_hit --config llama-nano/lora --max-steps 6 --warmup-steps 2 --eval-every 4 --save-every 2",
    "ppo": "-a sft_hit -c rm_hit --config llama-nano/lora --max-steps 4 --eval-every 2 --save-every 2",
}


def life(stage: str, arguments: str, runs: Path, out: Path) -> None:
    """One process of a script, from its start to its exit code."""
    result = call(stage, arguments, runs)
    out.write_text(f"{result.code}\n{result.out}\n{result.err}")
    os._exit(result.code)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have torch imported already: parts of a second instead of many."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing", "scripts", "training.trainers", "tyro", "transformers", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        # The server that does the imports takes no other search path.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO / "src"), str(Path(__file__).parent)]))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert call("sft", "-n base --max-steps 2 --save-every 9", folder).code == 0
    assert call("rm", "-n base -p sft_base --max-steps 2 --save-every 9", folder).code == 0
    return folder


@pytest.mark.parametrize("stage", COMMANDS)
def test_killed_at_random_moments(stage: str, runs: Path, processes, tmp_path) -> None:
    run_and_kill(stage, COMMANDS[stage], runs, processes, tmp_path)


def test_killed_in_every_stage_of_a_llama(processes, tmp_path) -> None:
    runs = tmp_path / "runs"
    for stage, words in LLAMA.items():
        run_and_kill(stage, words, runs, processes, tmp_path)


def run_and_kill(stage: str, words: str, runs: Path, processes, tmp_path: Path) -> None:
    """A run that is never stopped, and one that is killed some three times: they end alike."""
    whole = call(stage, f"-n whole {words}", runs)
    assert whole.code == 0, whole.err
    chance, kills = random.Random(stage), 0
    for attempt in range(40):
        out = tmp_path / f"{attempt}"
        child = processes.Process(target=life, args=(stage, f"-n hit {words} --resume auto", runs, out))
        child.start()
        steps = len(lines(runs, stage))
        patience = time.monotonic() + 60
        while child.is_alive() and len(lines(runs, stage)) <= steps and time.monotonic() < patience:
            time.sleep(0.01)  # until it trains
        child.join(chance.uniform(0, 0.6) if kills < 3 else 60)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join(60)
        if child.exitcode != -signal.SIGKILL:
            break
    assert child.exitcode == 0, out.read_text()
    assert kills >= 1
    hit = newest(runs, f"{stage}_hit")
    assert_same_run(newest(runs, f"{stage}_whole"), hit)


def lines(runs: Path, stage: str) -> list[str]:
    """metrics.jsonl of the run that is being killed, so far."""
    found = list(runs.glob(f"{stage}_hit_*/metrics.jsonl"))
    return max(found).read_text().splitlines() if found else []


def hold(run: Path, ready, done) -> None:
    from utils.runs.folder import lock_run

    lock_run(run)
    ready.set()
    done.wait(60)


def test_a_second_process_is_refused_until_the_first_is_gone(runs: Path, processes) -> None:
    assert call("sft", "-n locked --max-steps 2 --save-every 1", runs).code == 0
    run = newest(runs, "sft_locked")
    (run / "final").rename(run / "moved")
    # Under another time, because this process holds the lock of the first.
    other = run.rename(run.with_name("sft_locked_20200101000000"))
    (other / ".lock").unlink()
    ready, done = processes.Event(), processes.Event()
    child = processes.Process(target=hold, args=(other, ready, done))
    child.start()
    assert ready.wait(60)
    before = {p: p.stat().st_mtime_ns for p in other.rglob("*") if p.name != ".lock"}
    arguments = "-n locked --max-steps 2 --save-every 1 --resume"
    for resume in ("auto", other, step_checkpoints(other)[-1]):
        error = call("sft", f"{arguments} {resume}", runs).error
        assert f"another process writes to it (process {child.pid} on " in error
    assert {p: p.stat().st_mtime_ns for p in other.rglob("*") if p.name != ".lock"} == before
    os.kill(child.pid, signal.SIGKILL)  # the lock dies with its process
    child.join(60)
    result = call("sft", f"{arguments} auto", runs)
    assert result.code == 0, result.err
    assert sys.platform != "linux" or (other / "final").is_dir()
