"""Win rate with the advantage of longer answers taken out (length-controlled AlpacaEval, Dubois et al. 2024).

    logit P(a wins on prompt i) = theta + gamma * tanh((len_a[i] - len_b[i]) / sd)

sd is the standard deviation of the length differences. The length-controlled win rate is sigmoid(theta): what the judge
would say if the two answers were of equal length. Their third term, the difficulty of each prompt, is fitted on many
systems at once; with one pair there is nothing to fit it on, and it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.statistics import percentile_interval, resample_counts

# Gaussian prior of standard deviation 10 on gamma. It matters only where the longer answer always wins: there the
# likelihood has no maximum. tanh is within 1, so a gamma of 10 is already odds of 22,000 to 1.
_RIDGE = 0.01
_ITERATIONS, _TOLERANCE = 100, 1e-9


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate of a over b.

    win_rate: sigmoid(theta). ci: its bootstrap interval over prompts. gamma: how much the judge likes length, in logits
    for an answer that is much longer; below 0 it likes short ones.
    """

    win_rate: float
    ci: tuple[float, float]
    gamma: float


def length_controlled_win_rate(
    scores: Sequence[float],
    lengths_a: Sequence[float],
    lengths_b: Sequence[float],
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> LengthControlled | None:
    """Fit the model of this file to one score per prompt.

    Args:
        scores: [N] in [0, 1], 1 where a wins; values between are fractional labels.
        lengths_a, lengths_b: [N], lengths of the two answers in any one unit.
        level, resamples, seed: of the percentile bootstrap over prompts, which fits the model anew each time.

    Returns:
        None when all answers of a are longer than those of b by one and the same amount, or shorter: quality and
        length cannot be told apart.

    Raises:
        ValueError: no scores, scores outside [0, 1], or not one length each.
    """
    y, a, b = (np.asarray(x, dtype=np.float64) for x in (scores, lengths_a, lengths_b))
    if not (y.ndim == 1 and y.size and y.shape == a.shape == b.shape):
        raise ValueError(f"a score and two lengths per prompt are needed, not shapes {y.shape}, {a.shape}, {b.shape}")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("scores must be between 0 and 1; leave prompts out that were not judged")
    difference = a - b
    spread = difference.std()
    if spread == 0 and difference[0] != 0:
        return None
    z = np.tanh(difference / spread) if spread > 0 else np.zeros(len(y))
    theta, gamma = _fit(y, z, np.ones((1, len(y))))
    counts = resample_counts(np.random.default_rng(seed), resamples, len(y))
    resampled, _ = _fit(y, z, counts, (theta[0], gamma[0]) if np.isfinite(theta[0]) else (0.0, 0.0))
    return LengthControlled(float(_sigmoid(theta)[0]), percentile_interval(_sigmoid(resampled), level), float(gamma[0]))


def _fit(
    y: np.ndarray, z: np.ndarray, counts: np.ndarray, start: tuple[float, float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of the penalised likelihood by Newton's method, for all resamples at once.

    Args:
        y, z: [N] labels and tanh terms. counts: [R, N], how often each prompt counts.
        start: theta and gamma to begin from: near the end, the separable resamples take a quarter of the time.

    Returns:
        theta and gamma [R]; theta is infinite (and gamma 0) where all labels are 0 or all are 1.
    """
    theta, gamma = (np.full(len(counts), x) for x in start)
    wins, total = counts @ y, counts.sum(axis=1)
    for one_sided, limit in ((wins <= 0, -np.inf), (wins >= total, np.inf)):
        theta[one_sided], gamma[one_sided] = limit, 0.0
    # A resample leaves the work when it has converged: most need three steps, the separable ones tens.
    work = np.flatnonzero(np.isfinite(theta))
    columns = np.stack([np.ones_like(z), z, z * z], axis=1)  # (N, 3)
    for _ in range(_ITERATIONS):
        if not len(work):
            break
        W, t, g = counts[work], theta[work], gamma[work]
        p = _sigmoid(t[:, None] + g[:, None] * z)  # (r, N)
        slope_t, slope_g, _ = ((W * (y - p)) @ columns).T
        h_tt, h_tg, h_gg = ((W * p * (1 - p)) @ columns).T
        slope_g, h_gg = slope_g - _RIDGE * g, h_gg + _RIDGE
        determinant = h_tt * h_gg - h_tg**2
        step_t = (h_gg * slope_t - h_tg * slope_g) / determinant
        step_g = (h_tt * slope_g - h_tg * slope_t) / determinant
        # Newton's step may overshoot where the sigmoids are nearly flat; a bounded one keeps to the concave slope.
        scale = np.minimum(1.0, 2.0 / np.maximum(np.hypot(step_t, step_g), 1e-300))
        theta[work], gamma[work] = t + scale * step_t, g + scale * step_g
        work = work[np.hypot(step_t, step_g) > _TOLERANCE]
    return theta, gamma


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # tanh neither overflows nor warns, and 1 - _sigmoid(x) is exactly _sigmoid(-x) up to rounding.
    return 0.5 * (1 + np.tanh(0.5 * x))
