"""What a finding is, and how most are made: by a sign, which is a figure, its healthy range, and what must be outside.

Where a single point may leave its range by chance, a sign asks for behaviour that lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from experiments.doctor.ranges import Range
from experiments.doctor.record import RunRecord


@dataclass(frozen=True)
class Cause:
    """A likely cause, and what to change: flags by name."""

    why: str
    change: str


@dataclass(frozen=True)
class Finding:
    """Something is wrong, and where it shows. A check tells what it sees; the rest is that of the rule, see `Rule`.

    Attributes:
        tag: the figure that betrays it.
        step: the first step at which it holds.
        value: the figure there.
        low, high: the range of healthy values, None where it is open.
        notes: further evidence, a sentence each.
        case: what {case} stands for in the title and the causes of the rule.
        of: the record that the figures come from, when it is not that of the run itself.
    """

    tag: str
    step: int
    value: float
    low: float | None = None
    high: float | None = None
    notes: tuple[str, ...] = ()
    case: str = ""
    of: RunRecord | None = None
    causes: tuple[Cause, ...] = ()
    code: str = ""
    title: str = ""
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sign:
    """A check that a figure is in its range.

    Attributes:
        tag: the figure.
        healthy: its range, or how that follows from the figure's values. A range that counts from the start takes the
            mean of the first three values.
        in_a_row: so many values have to be outside one after the other.
        or_all: all of them, when there are fewer.
        mean: if not 0, the mean of so many has to be outside instead.
        at_end: the last value has to be outside, too.
        steps: first and last step that count.
        half: the upper limit in half precision, when it is another one.
        least: values that the figure must have, or nothing is judged.
        missing: what is said then.
        floor: what the figure cannot fall below: told as the lower limit, not judged.
        digits: places to which the limits are rounded where they are told.
    """

    tag: str
    healthy: Range | Callable[[np.ndarray], Range]
    in_a_row: int = 1
    or_all: bool = False
    mean: int = 0
    at_end: bool = False
    steps: tuple[float, float] = (0, math.inf)
    half: float | None = None
    least: int = 1
    missing: str = ""
    floor: float | None = None
    digits: int | None = None

    def __call__(self, record: RunRecord) -> Finding | str | None:
        """What this sign shows in a run."""
        series = record[self.tag]
        if len(series) < self.least:
            return self.missing or None
        healthy = self.healthy if isinstance(self.healthy, Range) else self.healthy(series.values)
        if self.half is not None and record.precision != "fp32":
            healthy = replace(healthy, high=self.half)
        limits = healthy.limits(start=float(series.values[:3].mean()))
        if limits is None:
            return None
        series = series.kept((series.steps >= self.steps[0]) & (series.steps <= self.steps[1]))
        bad = (series.values < limits[0]) | (series.values > limits[1])
        count = min(self.in_a_row, len(bad)) if self.or_all else self.in_a_row
        at = mean_outside(series.values, self.mean, *limits) if self.mean else lasting(bad, count)
        if at is None or (self.at_end and not bad[-1]):
            return None
        told = [limit if self.digits is None else round(limit, self.digits) for limit in limits]
        low, high = (limit if math.isfinite(limit) else None for limit in told)
        return Finding(self.tag, *series.point(at), low if self.floor is None else self.floor, high)


def lasting(bad: np.ndarray, count: int) -> int | None:
    """The index at which `bad` [N] holds for the first time and then for `count` points in a row, or None."""
    return next((i for i in range(len(bad) - count + 1) if count and bad[i : i + count].all()), None)


def trailing_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Mean of each value and its `count` - 1 predecessors, [N] -> [N - count + 1]; nothing for fewer values."""
    return np.convolve(values, np.full(count, 1 / count), mode="valid") if len(values) >= count else np.zeros(0)


def mean_outside(values: np.ndarray, count: int, low: float = -math.inf, high: float = math.inf) -> int | None:
    """Where a mean of `count` values [N] leaves [low, high] for the first time: the first of them that is outside
    itself."""
    smooth = trailing_mean(values, count)
    left = np.flatnonzero((smooth < low) | (smooth > high))
    if not len(left):
        return None
    window = values[left[0] : left[0] + count]
    return int(left[0] + np.flatnonzero((window < low) | (window > high))[0])
