"""All that only a GPU can tell, in one command of some minutes; nothing is downloaded and nothing else is needed.

    python src/experiments/main.py -t gpu                        # all parts, 8 minutes at most
    python src/experiments/main.py -t gpu --part 3 --minutes 4   # one of them
    python src/experiments/main.py -t gpu --device cpu --tiny    # rehearse all of it on a CPU with tiny models

Parts: 1 the tests that need a GPU; 2 the demo in bf16, fp32 and fp16; 3 speed and memory of every preset and stage
under a cap of 16 GB; 4 transformers beside ours; 5 profiles. Each prints a line per figure (what, figure, aim, ok or
MISSED) and writes its JSON as it goes; table.md holds all of them. When the time is up, what is left is left out.

1 and 2 run side by side and before the others, whose timings have nothing beside them. The most telling rows of 3 come
before 4 and 5; the demo by itself, for its time, and the other rows of 3 come last.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.user_error import UserError
from experiments.gpu.checks import (
    DEMO_ALONE,
    PRECISIONS,
    Child,
    finish,
    report_demo,
    report_tests,
    start_demo,
    start_tests,
)
from experiments.gpu.report import TITLES, Report, describe_environment

# Part, module and function, in the order in which they run.
MEASURED = (
    (3, "rows", "measure_first"),
    (4, "beside", "compare_all_sampling"),
    (5, "profiling", "profile_all"),
    (4, "beside", "compare_all_steps"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `-t gpu`."""
    parser.add_argument(
        "--part", type=int, action="append", choices=list(TITLES), help="only this one; may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing more after so many")
    parser.add_argument("--out", default="runs/gpu", metavar="FOLDER", help="where JSON files and table.md go")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="cap of the GPU's memory in parts 3 and 5")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny models, whose figures mean nothing")


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Parse the flags of `-t gpu` and run it; 1 when a part failed."""
    add_flags(parser)
    flags = parser.parse_args(rest)
    if flags.device == "cpu" and not flags.tiny:
        raise UserError("--device cpu: tells nothing of a GPU; with --tiny it rehearses the parts")
    for flag, value in (("--minutes", flags.minutes), ("--memory-gb", flags.memory_gb)):
        if not value > 0:
            raise UserError(f"{flag} {value:g}: must be above 0")
    out = Path(flags.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if flags.device == "cpu":  # before torch is loaded: many small operations, beside whoever else uses this machine
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return Session(flags, Report(out)).run()


@dataclass
class Session:
    """One run of the command."""

    flags: argparse.Namespace
    report: Report
    started: float = field(default_factory=time.monotonic)
    slow_demo: bool = False
    card: Any = None

    @property
    def end(self) -> float:
        """When the time is up, by `time.monotonic`."""
        return self.started + 60 * self.flags.minutes

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.end - time.monotonic()

    def run(self) -> int:
        """All parts that are wanted, in the order that the file's beginning says."""
        wanted = self.flags.part or list(TITLES)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            children = self.start_checks(wanted, folder)
            try:
                self.describe()
                # Tests or demos that hang leave the other parts half of the time.
                alone = not {3, 4, 5} & set(wanted)
                finish(children.values(), self.end if alone else self.started + 30 * self.flags.minutes)
            finally:
                finish(children.values(), 0.0)  # after an error or Ctrl-C nothing goes on
            for what, child in children.items():
                self.guarded(child_part(what), what, self.report_check, what, child)
            if 2 in wanted and self.flags.device == "cpu":
                self.report.skip(2, "the demo", "on a CPU it takes minutes: make demo")
                self.report.save(2, {})
            if {3, 4, 5} & set(wanted):
                self.measure(wanted)
            if 3 in wanted and not self.flags.tiny:
                self.measure_rest()
            if 2 in wanted and self.flags.device != "cpu":
                self.guarded(2, "the demo alone", self.demo_alone, folder)
        minutes = (time.monotonic() - self.started) / 60
        missed = sum(verdict.word == "MISSED" for verdict in self.report.verdicts)
        print(f"{minutes:.1f} minutes; {missed} aims missed; figures in {self.report.out}")
        return 1 if self.report.failed else 0

    def start_checks(self, wanted: list[int], folder: Path) -> dict[str, Child]:
        """The processes of parts 1 and 2."""
        children = {}
        if 1 in wanted:
            children["tests"] = start_tests(folder, self.flags.device)
        if 2 in wanted and self.flags.device != "cpu":
            (self.report.out / "demo.txt").unlink(missing_ok=True)
            children |= {dtype: start_demo(folder, self.flags.device, dtype) for dtype in PRECISIONS}
        return children

    def describe(self) -> None:
        """Find out where this runs, while the processes of parts 1 and 2 do their work; UserError without a GPU."""
        torch = importlib.import_module("torch")  # the first import of it, which takes seconds
        if self.flags.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has none that torch can see; --device cpu --tiny rehearses")
        self.report.environment |= describe_environment(self.flags.device)

    def report_check(self, what: str, child: Child) -> None:
        """The verdict on a process that has ended."""
        if what == "tests":
            report_tests(child, self.flags.device, self.report)
        else:
            report_demo(child, False, self.report)
            self.slow_demo |= what == PRECISIONS[0] and child.seconds > DEMO_ALONE

    def measure(self, wanted: list[int]) -> None:
        """Parts 3 to 5, in this process, but for the other rows of 3."""
        self.guarded(min({3, 4, 5} & set(wanted)), "the card's rates", self.measure_card)
        for part, name, function in MEASURED:
            if part in wanted:
                job = getattr(importlib.import_module(f"experiments.gpu.{name}"), function)
                self.guarded(part, function, job, self.card, self.flags.tiny, self.report, self.left)

    def measure_card(self) -> None:
        """What the hardware does at most, before any cap; it warms the GPU up."""
        self.card = importlib.import_module("experiments.gpu.card").Card(self.flags.device, self.flags.memory_gb)
        self.report.environment |= self.card.rates()

    def measure_rest(self) -> None:
        """The other rows of part 3, which leave the demo its time where it has not met its aim beside others."""
        kept = DEMO_ALONE if self.slow_demo else 0.0
        job = importlib.import_module("experiments.gpu.rows").measure_rest
        self.guarded(3, "measure_rest", job, self.card, self.report, lambda: self.left() - kept)

    def demo_alone(self, folder: Path) -> None:
        """The demo with nothing beside it, for its time."""
        if self.left() < DEMO_ALONE:
            self.report.skip(2, "demo alone", f"under {DEMO_ALONE:.0f} s were left")
            self.report.save(2, {})
            return
        child = start_demo(folder, self.flags.device, PRECISIONS[0], f"{PRECISIONS[0]} alone")
        try:
            finish([child], self.end)
        finally:
            finish([child], 0.0)
        report_demo(child, True, self.report)

    def guarded(self, part: int, what: str, job: Callable[..., None], *arguments: Any) -> None:
        """Run a part's job; whatever goes wrong in it is a verdict, and the next part runs."""
        try:
            job(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.report.fail(part, what, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
            self.report.save(part, {"error": traceback.format_exc()})


def child_part(what: str) -> int:
    """The part that a process belongs to."""
    return 1 if what == "tests" else 2
