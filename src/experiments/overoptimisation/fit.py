"""The scaling laws of over-optimisation: reward over d = sqrt(KL to the initial policy) (Gao et al. 2022, section 3).

    best-of-n   R(d) = d (a - b d)
    RL          R(d) = d (a - b log d)

Both start at R(0) = 0, so rewards are measured from the mean of the initial policy. Both are linear in (a, b): the
least-squares fit has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """One law: `rewards` is R of (d, a, b), `bend` what b multiplies in it, `top` the d of its highest point, b > 0."""

    rewards: Callable[[np.ndarray, float, float], np.ndarray]
    bend: Callable[[np.ndarray], np.ndarray]
    top: Callable[[float, float], float]

    def curve(self, d: Sequence[float] | float, a: float, b: float) -> np.ndarray:
        """Rewards at d, of the shape of d; 0 at d = 0."""
        return self.rewards(np.asarray(d, dtype=np.float64), a, b)

    def fit(self, d: Sequence[float], r: Sequence[float]) -> tuple[float, float]:
        """Least-squares (a, b) from points d, r [N]; a point at d = 0 carries no information.

        Raises:
            ValueError: a negative d, or fewer than two different positive ones.
        """
        d, r = np.asarray(d, dtype=np.float64), np.asarray(r, dtype=np.float64)
        if d.shape != r.shape or d.ndim != 1:
            raise ValueError(f"one reward per distance is needed, not shapes {d.shape} and {r.shape}")
        if (d < 0).any() or len(np.unique(d[d > 0])) < 2:
            raise ValueError("a fit needs distances of at least 0, and two different ones above 0")
        (a, b), *_ = np.linalg.lstsq(np.stack([d, -self.bend(d)], axis=1), r, rcond=None)
        return float(a), float(b)

    def peak(self, a: float, b: float) -> float:
        """The d of the highest reward; infinity when the curve does not turn down, 0 when it only falls."""
        if b <= 0:
            return math.inf if a > 0 or b < 0 else 0.0
        return self.top(a, b)


def _d_log_d(d: np.ndarray) -> np.ndarray:
    return d * np.log(np.where(d > 0, d, 1.0))


def _rl_rewards(d: np.ndarray, a: float, b: float) -> np.ndarray:
    return a * d - b * _d_log_d(d)


def _rl_top(a: float, b: float) -> float:
    # Beyond this exponent the peak is no longer a number that a float holds.
    return math.exp(a / b - 1) if a / b < 700 else math.inf


def _best_of_n_rewards(d: np.ndarray, a: float, b: float) -> np.ndarray:
    return d * (a - b * d)


def _best_of_n_top(a: float, b: float) -> float:
    return max(0.0, a / (2 * b))


RL = Law(_rl_rewards, _d_log_d, _rl_top)
BEST_OF_N = Law(_best_of_n_rewards, np.square, _best_of_n_top)
