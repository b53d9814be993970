"""The scaling laws of over-optimisation: reward over d = sqrt(KL to the initial policy) (Gao et al. 2022, section 3).

    best-of-n   R(d) = d (a - b d)
    RL          R(d) = d (a - b log d)

Both start at R(0) = 0, so rewards are measured from the mean of the initial policy. Both are linear in (a, b): the
least-squares fit has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best_of_n_curve(d: Sequence[float] | float, a: float, b: float) -> np.ndarray:
    """R(d) = d (a - b d)."""
    d = np.asarray(d, dtype=np.float64)
    return d * (a - b * d)


def rl_curve(d: Sequence[float] | float, a: float, b: float) -> np.ndarray:
    """R(d) = d (a - b log d), and its limit 0 at d = 0."""
    d = np.asarray(d, dtype=np.float64)
    return a * d - b * _d_log_d(d)


def fit_best_of_n(d: Sequence[float], r: Sequence[float]) -> tuple[float, float]:
    """Least-squares (a, b) of the best-of-n curve from points d, r [N].

    Raises:
        ValueError: a negative d, or fewer than two different positive ones.
    """
    d, r = _points(d, r)
    return _least_squares(d, -d * d, r)


def fit_rl(d: Sequence[float], r: Sequence[float]) -> tuple[float, float]:
    """Least-squares (a, b) of the RL curve from points d, r [N]; a point at d = 0 carries no information.

    Raises:
        ValueError: a negative d, or fewer than two different positive ones.
    """
    d, r = _points(d, r)
    return _least_squares(d, -_d_log_d(d), r)


def best_of_n_peak(a: float, b: float) -> float:
    """The d of the highest reward, a / (2 b); infinity when the curve does not turn down, 0 when it only falls."""
    if b <= 0:
        return math.inf if a > 0 or b < 0 else 0.0
    return max(0.0, a / (2 * b))


def rl_peak(a: float, b: float) -> float:
    """The d of the highest reward, exp(a / b - 1); infinity when the curve does not turn down."""
    if b <= 0:
        return math.inf if a > 0 or b < 0 else 0.0
    # Beyond this exponent the peak is no longer a number that a float holds.
    return math.exp(a / b - 1) if a / b < 700 else math.inf


def _points(d: Sequence[float], r: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    d, r = np.asarray(d, dtype=np.float64), np.asarray(r, dtype=np.float64)
    if d.shape != r.shape or d.ndim != 1:
        raise ValueError(f"one reward per distance is needed, not shapes {d.shape} and {r.shape}")
    if (d < 0).any() or len(np.unique(d[d > 0])) < 2:
        raise ValueError("a fit needs distances of at least 0, and two different ones above 0")
    return d, r


def _least_squares(first: np.ndarray, second: np.ndarray, r: np.ndarray) -> tuple[float, float]:
    (a, b), *_ = np.linalg.lstsq(np.stack([first, second], axis=1), r, rcond=None)
    return float(a), float(b)


def _d_log_d(d: np.ndarray) -> np.ndarray:
    return d * np.log(np.where(d > 0, d, 1.0))
