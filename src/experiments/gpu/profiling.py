"""Part 5 of `-t gpu`: where the GPU's time goes, how long it idles, and where the host waits for it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.bench.ours import prepared_sampling
from experiments.gpu.card import Card
from experiments.gpu.report import Report
from experiments.gpu.rows import FIRST, TINY, presets
from experiments.gpu.works import prepared, work_of
from experiments.markdown import table
from utils.runs.folder import REPO

TOP = 10
SLOW = 40  # seconds that a profile of an iteration may take
_STEPS = 16  # decoding steps behind the figures of one
_SYNC_TOKENS = 32
_HERE = str(REPO / "src/experiments")


@dataclass
class Trace:
    """What the profiler saw: seconds and calls of each operation, kernels and the seconds that they took together.

    On a CPU the operations' own time there; no kernels.
    """

    operations: dict[str, tuple[float, float]]
    kernels: float
    busy: float

    def per_step(self, one: Trace, steps: int) -> Trace:
        """A step's share, from this trace of one more than `steps` of them and a trace of the first alone."""
        names = {
            name: tuple((a - b) / steps for a, b in zip(found, one.operations.get(name, (0.0, 0.0))))
            for name, found in self.operations.items()
        }
        return Trace(names, (self.kernels - one.kernels) / steps, (self.busy - one.busy) / steps)

    def top(self) -> list[tuple[str, float, float]]:
        """The most expensive operations: name, seconds, calls."""
        ordered = sorted(self.operations.items(), key=lambda item: -item[1][0])
        return [(name, seconds, calls) for name, (seconds, calls) in ordered[:TOP] if seconds > 0]

    def as_table(self, wall: float) -> str:
        """Markdown of the most expensive operations."""
        lines = [
            (f"`{name[:70]}`", f"{1e3 * seconds:.3f}", f"{seconds / wall:.1%}", f"{calls:,.1f}".removesuffix(".0"))
            for name, seconds, calls in self.top()
        ]
        return table("operation | ms | of the time | calls", lines)


def traced(once: Callable[[], Any], card: Card) -> Trace:
    """Profile one repetition."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.gpu else [])]
    with profile(activities=activities) as found:
        once()
    operations, kernels, busy = {}, 0, 0.0
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if card.gpu else event.self_cpu_time_total
            operations[event.key] = (own / 1e6, event.count)
        elif not (getattr(event, "is_user_annotation", False) or event.key.startswith("Optimizer.")):
            kernels += event.count
            busy += event.self_device_time_total / 1e6
    return Trace(operations, kernels, busy)


@contextmanager
def counted_syncs(card: Card) -> Iterator[Counter[str]]:
    """Counts, by file:line of the project, the operations after which the host waited for the GPU.

    `torch.cuda.synchronize` itself is not among them, nor is what the clocks of PPO's phases wait for.
    """
    found: Counter[str] = Counter()

    def note(message: Any, category: type, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            found[place(sys._getframe(1)) or f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if card.gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if card.gpu:
                torch.cuda.set_sync_debug_mode("default")


def place(frame: Any) -> str | None:
    """file:line in src/ that a frame was called from, experiments aside."""
    src = str(REPO / "src") + "/"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(src) and not name.startswith(_HERE):
            return f"{name.removeprefix(src)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def profile_all(card: Card, tiny: bool, report: Report, left: Callable[[], float]) -> None:
    """Host waits, decoding steps of every size, PPO iterations of every size, while there is time."""
    names = presets(TINY if tiny else FIRST)
    jobs = [(f"{names[0]} {kind}, waits", count_waits, names[0], kind, 0) for kind in ("sampling", "sft", "ppo")]
    jobs += [(f"{name} decoding step", profile_step, name, "sampling", 0) for name in names]
    jobs += [(f"{name} PPO iteration", profile_iteration, name, "ppo", 0 if tiny else SLOW) for name in names]
    found: dict[str, Any] = {}
    for name, job, preset, kind, least in jobs:
        if left() <= least:
            report.skip(5, name, "the time was up")
            continue
        card.free()
        tables: dict[str, str] = {}
        try:
            with card.capped():
                found[name] = job(name, preset, kind, card, tiny, report, tables)
        except Exception as error:  # the other profiles are made all the same
            report.fail(5, name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
        report.save(5, found, tables)
    report.save(5, found)


def count_waits(
    name: str, preset: str, kind: str, card: Card, tiny: bool, report: Report, tables: dict[str, str]
) -> dict[str, Any]:
    """Host waits of one repetition that is no longer the first."""
    if not card.gpu:
        report.skip(5, name, "there is no GPU to wait for")
    work = work_of(preset, kind, card, tiny)
    work = replace(work, new=min(work.new, _SYNC_TOKENS)) if kind == "sampling" else work
    with prepared(work, card) as ready:
        ready.once()
        with counted_syncs(card) as waits:
            ready.once()
    places = dict(waits.most_common())
    if card.gpu:
        most = ", ".join(f"{where} x{count}" for where, count in waits.most_common(3))
        report.say(5, name, f"{sum(places.values())} waits: {most}")
        tables[name] = table("where | waits", [(f"`{where}`", count) for where, count in places.items()])
    return {"tokens": work.new, "waits": sum(places.values()), "places": places}


def profile_step(
    name: str, preset: str, kind: str, card: Card, tiny: bool, report: Report, tables: dict[str, str]
) -> dict[str, Any]:
    """One step of `generate` with all that belongs to it: the difference of one token and of some more."""
    work = work_of(preset, kind, card, tiny)
    steps = min(_STEPS, work.new - 1)
    with prepared(work, card) as ready:
        one = prepared_sampling(replace(work, new=1), ready.model)
        more = prepared_sampling(replace(work, new=1 + steps), ready.model)
        wall = (card.seconds(more) - card.seconds(one)) / steps
        trace = traced(more, card).per_step(traced(one, card), steps)
    return told(name, trace, max(wall, 1e-9), card, report, tables)


def profile_iteration(
    name: str, preset: str, kind: str, card: Card, tiny: bool, report: Report, tables: dict[str, str]
) -> dict[str, Any]:
    """One PPO iteration that is no longer the first."""
    with prepared(work_of(preset, kind, card, tiny), card) as ready:
        wall = card.seconds(ready.once, repeats=1)
        trace = traced(ready.once, card)
        return told(name, trace, wall, card, report, tables) | {"parts": dict(ready.parts)}


def told(name: str, trace: Trace, wall: float, card: Card, report: Report, tables: dict[str, str]) -> dict[str, Any]:
    """Verdict, table and data of a profile; `wall`: seconds of the same without the profiler."""
    idle = max(0.0, 1 - trace.busy / wall) if card.gpu else None
    most = ", ".join(f"{key} {seconds / wall:.0%}" for key, seconds, _ in trace.top()[:3])
    gpu = f"{trace.kernels:,.0f} kernels, the GPU idles {idle:.0%}; " if card.gpu else ""
    report.say(5, name, f"{1e3 * wall:.2f} ms; {gpu}most: {most}")
    tables[name] = trace.as_table(wall)
    top = [{"operation": key, "seconds": seconds, "calls": calls} for key, seconds, calls in trace.top()]
    return {"seconds": wall, "kernels": trace.kernels, "busy": trace.busy, "idle": idle, "operations": top}
