"""Ranges of a run's figures, for the doctor and for the notebook's curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SAMPLER_DRIFT = "policy/sampler_vs_train_logp_max"


@dataclass(frozen=True)
class Range:
    """Where a curve is when all is well; None is no limit on that side."""

    low: float | None = None
    high: float | None = None
    of: Literal["values", "times the start", "above the start"] = "values"
    """What the limits count: values, multiples of the curve's start, or what has been added to it."""

    def limits(self, start: float) -> tuple[float, float] | None:
        """Lower and upper limit as values, infinite where there is none; None if `start` gives no scale.

        Args:
            start: where the curve begins.
        """
        if self.of == "times the start" and start <= 0:
            return None
        factor = start if self.of == "times the start" else 1.0
        added = start if self.of == "above the start" else 0.0
        low = -math.inf if self.low is None else factor * self.low + added
        high = math.inf if self.high is None else factor * self.high + added
        return low, high

    @property
    def edges(self) -> tuple[float, ...]:
        """The limits that there are."""
        return tuple(limit for limit in (self.low, self.high) if limit is not None)

    def __str__(self) -> str:
        unit = "" if self.of == "values" else f" {self.of}"
        if self.low is None:
            return f"at most {self.high:g}{unit}"
        if self.high is None:
            return f"at least {self.low:g}{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"


# Beyond these something is wrong, for responses of some 50 tokens and a reward of deviation 1 on SFT samples: findings
# of the doctor, and dashed lines in the notebook.
ALARM = {
    "objective/kl": Range(-0.5, 30.0),
    "objective/entropy": Range(low=0.0),
    "policy/approxkl": Range(high=0.03),
    "policy/clipfrac": Range(high=0.3),
    "val/clipfrac": Range(high=0.3),
    "policy/ratio_mean": Range(0.95, 1.05),
    "policy/ratio_max": Range(high=10.0),
    "resp/len_score_corr": Range(high=0.5),
}
# Sampler and training forward round differently: the largest difference of two log-probabilities, by precision.
SAMPLER_FP32, SAMPLER_HALF = Range(high=1e-4), Range(high=5e-2)
# The share of responses that end by themselves, and lengths, where all is well.
ENDS = Range(0.95, 1)
KEEPS_LENGTH = Range(0.5, 1.3, "times the start")
