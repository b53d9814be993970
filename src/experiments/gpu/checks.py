"""Parts 1 and 2 of `-t gpu`: the tests that need a GPU and the demo in every precision, as processes side by side.

This file loads no torch: the processes start first, and the command's own imports run beside theirs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.gpu.report import Report
from utils.runs.folder import REPO

PROCESSES = 8  # of the tests, which spend most of their time with imports
PRECISIONS = ("bf16", "fp32", "fp16")
DEMO_ALONE = 90.0  # seconds aimed at
_TAIL = 60_000  # characters of a log that are kept


@dataclass
class Child:
    """A process with a log of its own; `code` is None until it has ended, and stays so where the time was up first."""

    name: str
    command: Sequence[str]
    folder: Path
    seconds: float = 0.0
    code: int | None = None
    over: bool = False
    started: float = field(default_factory=time.monotonic)

    def start(self, threads: int = 1) -> Child:
        """Start it as the leader of a session, so that it can be ended with its own children."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    @property
    def log(self) -> Path:
        """All that it prints."""
        return self.folder / f"{self.name}.log"

    @property
    def text(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-_TAIL:]

    @property
    def last_line(self) -> str:
        """Its last words."""
        return next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "no output")


def finish(children: Iterable[Child], end: float) -> None:
    """Wait for all until `end` (of `time.monotonic`); what is still running then is stopped."""
    running = [child for child in children if not child.over]
    while running:
        for child in list(running):
            code = child.process.poll()
            late = time.monotonic() > end
            if code is None and not late:
                continue
            child.seconds, child.code, child.over = time.monotonic() - child.started, code, True
            if code is None:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
            running.remove(child)
        time.sleep(0.1)


def start_tests(folder: Path, device: str) -> Child:
    """`pytest -m gpu` on the files that have such tests; a rehearsal on a CPU takes one file of them."""
    marked = [
        p for p in sorted((REPO / "tests").rglob("test_*.py")) if re.search(r"gpu_marks|mark\.gpu", p.read_text())
    ]
    if device == "cpu":
        marked = [p for p in marked if p.name == "test_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked)]
    if device != "cpu" and importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= PROCESSES:
        command += ["-n", str(PROCESSES)]
    return Child("tests", command, folder).start()


def report_tests(child: Child, device: str, report: Report) -> None:
    """How many passed; failures make the part fail."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", child.last_line)}
    broken = re.findall(r"^(?:FAILED|ERROR) .*$", child.text, re.M)
    told = ", ".join(f"{n} {word}" for word, n in counts.items()) or child.last_line[:300]
    figure = f"{told} in {child.seconds:.0f} s"
    if child.code is None:
        report.fail(1, "pytest -m gpu", f"the time was up after {child.seconds:.0f} s")
    elif child.code or broken:
        report.fail(1, "pytest -m gpu", f"{figure}: {'; '.join(broken)[:500]}")
    elif device == "cpu":
        report.say(1, "pytest -m gpu", f"{figure} (a CPU tells nothing: all are skipped)")
    else:
        report.say(1, "pytest -m gpu", figure, "all pass", counts.get("passed", 0) > 0)
    report.save(1, {"seconds": child.seconds, "counts": counts, "failed": broken, "code": child.code})
    (report.out / "tests.txt").write_text(child.text)


def start_demo(folder: Path, device: str, dtype: str, name: str = "") -> Child:
    """`-t demo` with runs in a folder of its own."""
    runs = folder / (name or dtype)
    main = str(REPO / "src/experiments/main.py")
    command = [sys.executable, main, "-t", "demo", "--device", device, "--dtype", dtype, "--runs-dir", str(runs)]
    return Child(name or dtype, command, runs).start(threads=2)


def report_demo(child: Child, alone: bool, report: Report) -> None:
    """The demo's own verdict and figures. That RLHF did not work is an aim missed; to have no figures is a failure."""
    how = "alone" if alone else "beside the others and the tests"
    what, file = f"demo {child.name}", child.folder / "demo.json"
    if child.code is None or not file.is_file():
        reason = "the time was up" if child.code is None else f"exit code {child.code}: {child.last_line[:300]}"
        report.fail(2, what, f"{reason} after {child.seconds:.0f} s")
        found: dict[str, Any] = {}
    else:
        found = json.loads(file.read_text())
        ppo, sft = found["systems"]["ppo"], found["systems"]["sft"]
        figure = (
            f"{child.seconds:.0f} s {how}; gold {sft['gold']:.2f} of SFT, {ppo['gold']:.2f} of PPO, win rate "
            f"{ppo['win_rate']:.2f}, KL {ppo['kl']:.1f}"
        )
        report.say(2, what, figure, "RLHF works", child.code == 0)
        if alone:
            fast = child.seconds < DEMO_ALONE
            report.say(2, f"{what}, time", f"{child.seconds:.0f} s", f"under {DEMO_ALONE:.0f} s", fast)
    report.save(2, {child.name: {"seconds": child.seconds, "code": child.code, "alone": alone, "demo": found}})
    with (report.out / "demo.txt").open("a") as logs:
        logs.write(f"== {child.name}\n{child.text}\n")
