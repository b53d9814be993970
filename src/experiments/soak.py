"""A long PPO run that is killed again and again: does it end with the bits of one that was left alone?

`main.py -t soak` runs PPO twice from the demo's SFT and reward model. The first run is undisturbed, and its memory is
watched; the second gets SIGKILL at random moments and is started again with --resume auto until it is done.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from config.user_error import UserError
from training.engine.host_memory import resident_bytes
from utils.runs.finding import newest_run
from utils.runs.folder import REPO, runs_root

_GROWTH = 0.02  # of the memory after the warm-up: what an allocator's rounding may add


def one_life(name: str, command: list[str], runs_dir: str, seconds: float = math.inf) -> tuple[bool, list[int]]:
    """Start train_ppo.py, its output in a file beside the runs, and kill it after `seconds`.

    Returns whether it came to its end before, and its memory all the while, bytes; UserError where it failed.
    """
    log = runs_root(runs_dir) / f"ppo_{name}.log"
    words = [sys.executable, str(REPO / "src/training/train_ppo.py"), "-n", name, *command]
    with log.open("a") as file:
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    until, memory = time.monotonic() + seconds, []
    while child.poll() is None:
        if time.monotonic() >= until:
            child.kill()
            child.wait()
            return False, memory
        if used := resident_bytes(child.pid):
            memory.append(used)
        time.sleep(0.1)
    if child.returncode:
        raise UserError(f"-t soak: train_ppo.py -n {name} ended with exit code {child.returncode}; see {log}")
    return True, memory


def figures(run: Path) -> list[dict]:
    """The iterations of a run's metrics.jsonl, without the clock."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines if "objective/kl" in line]


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal in two finished runs: weights to the bit, figures to the digit."""
    found = []
    for file in sorted((one / "final").rglob("*.safetensors")):
        name = file.relative_to(one)
        if file.read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    if figures(one) != figures(other):
        found.append("metrics.jsonl differs")
    return found


def growth(memory: list[int]) -> tuple[float, float]:
    """Median memory in the second and in the last quarter of a run, bytes; the first quarter is warm-up."""
    quarter = max(1, len(memory) // 4)
    return statistics.median(memory[quarter : 2 * quarter] or memory), statistics.median(memory[-quarter:])


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """`-t soak`: both runs and their comparison; 1 when they differ or memory grows.

    Flags that it does not know go to train_ppo.py. UserError for a figure that is not above 0.
    """
    parser.add_argument("-a", "--actor", default="sft_demo_s0", help="SFT run")
    parser.add_argument("-c", "--critic", default="rm_demo_s0", help="reward-model run")
    parser.add_argument("--iterations", type=int, default=200, help="of PPO")
    parser.add_argument("--save-every", type=int, default=5, help="iterations between checkpoints")
    parser.add_argument("--kill-every", type=float, default=30, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--runs-dir", default="runs", help="where run folders are")
    flags, more = parser.parse_known_args(rest)
    if min(flags.iterations, flags.save_every, flags.kill_every) <= 0:
        raise UserError("-t soak: --iterations, --save-every and --kill-every must be above 0")
    iterations, save_every, runs_dir = flags.iterations, flags.save_every, flags.runs_dir
    command = ["-a", flags.actor, "-c", flags.critic, "--iterations", str(iterations), "--save-every", str(save_every)]
    command += ["--deterministic", "--resume", "auto", "--runs-dir", runs_dir, *more]
    left, hit = (f"soak_{kind}_{time.strftime('%Y%m%d%H%M%S')}" for kind in ("left", "hit"))
    started = time.monotonic()
    _, memory = one_life(left, command, runs_dir)
    print(f"undisturbed: {iterations} iterations in {time.monotonic() - started:.0f} s", flush=True)
    chance, peaks = random.Random(flags.seed), []
    while True:
        finished, used = one_life(hit, command, runs_dir, chance.expovariate(1 / flags.kill_every))
        if finished:
            break
        peaks.append(max(used, default=0) / 1e6)
        so_far = newest_run(f"ppo_{hit}", runs_dir)
        print(f"kill {len(peaks)}: {len(figures(so_far)) if so_far else 0} iterations logged", flush=True)
    found = differences(*(newest_run(f"ppo_{name}", runs_dir) for name in (left, hit)))
    early, late = growth(memory)
    killed = f"; peaks of the killed processes {min(peaks):.0f} to {max(peaks):.0f} MB" if peaks else ""
    print(f"{len(peaks)} kills in {iterations} iterations, a checkpoint every {save_every}")
    print(f"memory: {early / 1e6:.0f} MB in the second quarter, {late / 1e6:.0f} MB in the last{killed}")
    if late > early * (1 + _GROWTH):
        found.append(f"memory grows by {late / early - 1:.1%}")
    for line in found:
        print(f"FAILED: {line}")
    if not found:
        print("the killed run ended with the bits and the figures of the one that was left alone; memory does not grow")
    return 1 if found else 0
