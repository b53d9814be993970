"""Win rates and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def win_scores(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """1 where a[i] > b[i], one half where they are equal, else 0: [N]."""
    a, b = np.asarray(a), np.asarray(b)
    return (a > b) + 0.5 * (a == b)


def bootstrap_interval(
    scores: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one score per prompt [N] (Efron 1979).

    Prompts are what is resampled: everything measured on one prompt moves together.

    Raises:
        ValueError: no scores.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("no scores to resample")
    draws = np.random.default_rng(seed).integers(0, len(scores), size=(resamples, len(scores)))
    return percentile_interval(scores[draws].mean(axis=1), level)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(a) - mean(b), two systems measured on the same prompts [N].

    A resampled prompt brings both its scores along, so that what is hard for both systems cancels.

    Raises:
        ValueError: no scores, or not one of each per prompt.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"scores of the same prompts are needed, not {a.shape} and {b.shape}")
    return bootstrap_interval(a - b, level, resamples, seed)


def seed_bootstrap(
    scores: Sequence[Sequence[float]], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean over training seeds and prompts, both resampled.

    Every seed answers the same prompts, so seeds and prompts are drawn independently and a drawn prompt counts for all
    drawn seeds (the pigeonhole bootstrap, Owen 2007). It answers "what would another training run on other
    prompts give?", where `bootstrap_interval` speaks of other prompts only.

    Args:
        scores: [S, N], a score of each seed on each prompt.

    Raises:
        ValueError: fewer than 3 seeds, of which resampling could not tell the spread, or no prompts.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0 or len(scores) < 3:
        raise ValueError(f"scores of at least 3 seeds on the same prompts are needed, not shape {scores.shape}")
    S, N = scores.shape
    rng = np.random.default_rng(seed)
    seeds, prompts = resample_counts(rng, resamples, S), resample_counts(rng, resamples, N)
    return percentile_interval(((seeds @ scores) * prompts).sum(axis=1) / (S * N), level)


def resample_counts(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """How often each of n prompts is drawn in each bootstrap resample: [resamples, n], rows that sum to n."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def percentile_interval(estimates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap estimates [R]."""
    tail = (1 - level) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(wins: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a probability from `wins` in `n` independent decisive outcomes (Wilson 1927).

    Without any outcome it is [0, 1].

    Raises:
        ValueError: more wins than outcomes, or a negative number.
    """
    if not 0 <= wins <= n:
        raise ValueError(f"wins must be between 0 and n, not {wins} of {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
