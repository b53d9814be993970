"""A long PPO run that is killed again and again: does it end with the bits of one that was left alone?

`main.py -t soak` runs PPO twice from the demo's SFT and reward model. The first run is undisturbed, and its memory is
watched; the second gets SIGKILL at random moments and is started again with --resume auto until it is done.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from config.user_error import UserError
from training.engine.host_memory import resident_bytes
from utils.runs.folder import REPO, newest_run, runs_root

_GROWTH = 0.02  # of the memory after the warm-up: what an allocator's rounding may add


@dataclass
class Soak:
    """One soak and what it measures.

    Attributes:
        command: the PPO command without its name.
        runs_dir: where the runs are.
        kill_every: mean seconds between kills.
        chance: when they come.
        memory: (seconds, bytes) of the undisturbed run.
        peaks: highest memory of each life of the disturbed run, bytes.
    """

    command: list[str]
    runs_dir: str
    kill_every: float
    chance: random.Random
    memory: list[tuple[float, int]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def start(self, name: str) -> subprocess.Popen:
        """The script, writing its output to a file beside the runs."""
        log = runs_root(self.runs_dir) / f"ppo_{name}.log"
        script = str(REPO / "src/training/train_ppo.py")
        with log.open("a") as file:
            words = [sys.executable, script, "-n", name, *self.command]
            return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    def undisturbed(self, name: str) -> float:
        """The run to compare with; seconds it took."""
        started = time.monotonic()
        child = self.start(name)
        while child.poll() is None:
            used = resident_bytes(child.pid)
            if used:
                self.memory.append((time.monotonic() - started, used))
            time.sleep(0.5)
        self._check(child, name)
        return time.monotonic() - started

    def disturbed(self, name: str) -> int:
        """The run that is killed; how often it was."""
        kills = 0
        while True:
            child = self.start(name)
            until, peak = time.monotonic() + self.chance.expovariate(1 / self.kill_every), 0
            while child.poll() is None and time.monotonic() < until:
                peak = max(peak, resident_bytes(child.pid))
                time.sleep(0.1)
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            self.peaks.append(peak)
            kills += 1
            print(f"kill {kills}: {self._reached(name)} iterations logged", flush=True)
        self._check(child, name)
        return kills

    def _reached(self, name: str) -> int:
        run = newest_run(f"ppo_{name}", self.runs_dir)
        return len(figures(run)) if run else 0

    def _check(self, child: subprocess.Popen, name: str) -> None:
        if child.returncode:
            log = runs_root(self.runs_dir) / f"ppo_{name}.log"
            raise UserError(f"-t soak: train_ppo.py -n {name} ended with exit code {child.returncode}; see {log}")


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


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """Median memory in the second and in the last quarter of a run, bytes; the first quarter is warm-up."""
    used = [count for _, count in memory]
    quarter = max(1, len(used) // 4)
    return statistics.median(used[quarter : 2 * quarter] or used), statistics.median(used[-quarter:])


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Flags of `-t soak`; what it does not know goes to train_ppo.py.

    Raises:
        UserError: a figure that is not above 0.
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
    settings = (flags.iterations, flags.save_every, flags.kill_every, flags.seed, flags.runs_dir)
    return run_soak(flags.actor, flags.critic, *settings, more)


def run_soak(
    sft: str, rm: str, iterations: int, save_every: int, kill_every: float, seed: int, runs_dir: str, more: list[str]
) -> int:
    """Both runs and their comparison; 1 when they differ or memory grows."""
    command = ["-a", sft, "-c", rm, "--iterations", str(iterations), "--save-every", str(save_every)]
    command += ["--deterministic", "--resume", "auto", "--runs-dir", runs_dir, *more]
    soak = Soak(command, runs_dir, kill_every, random.Random(seed))
    names = [f"soak_{kind}_{time.strftime('%Y%m%d%H%M%S')}" for kind in ("left", "hit")]
    seconds = soak.undisturbed(names[0])
    print(f"undisturbed: {iterations} iterations in {seconds:.0f} s", flush=True)
    kills = soak.disturbed(names[1])
    found = differences(*(newest_run(f"ppo_{name}", runs_dir) for name in names))
    early, late = growth(soak.memory)
    peaks = f"; peaks of the killed processes {_megabytes(soak.peaks)}" if soak.peaks else ""
    print(f"{kills} kills in {iterations} iterations, a checkpoint every {save_every}")
    print(f"memory: {early / 1e6:.0f} MB in the second quarter, {late / 1e6:.0f} MB in the last{peaks}")
    if late > early * (1 + _GROWTH):
        found.append(f"memory grows by {late / early - 1:.1%}")
    for line in found:
        print(f"FAILED: {line}")
    if not found:
        print("the killed run ended with the bits and the figures of the one that was left alone; memory does not grow")
    return 1 if found else 0


def _megabytes(counts: list[int]) -> str:
    return f"{min(counts) / 1e6:.0f} to {max(counts) / 1e6:.0f} MB"
