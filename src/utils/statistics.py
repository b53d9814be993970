"""Win rates and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

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
    tail = (1 - level) / 2
    low, high = np.quantile(scores[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
