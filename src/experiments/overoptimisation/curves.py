"""From graded answers to over-optimisation curves: means, intervals over prompts, the fits and their peaks.

Shapes: N prompts, S samples of the SFT model per prompt, K checkpoints, R bootstrap resamples, G points of a drawn
curve.

Rewards are measured from the SFT model's mean, prompt by prompt, so that hard prompts do not blur the difference.
Distances are d = sqrt(KL to the SFT model): for PPO the KL is the mean log-ratio of its own samples (k1) at the
sampling temperature, for best-of-n it is known. Every interval resamples prompts: a drawn prompt brings along its
samples, its rewards and its KL at all checkpoints, and the curves are fitted anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from experiments.graded_answers import Graded
from experiments.overoptimisation.fit import BEST_OF_N, RL, Law
from inference.best_of_n import best_of_n_estimate, best_of_n_kl
from utils.metrics import correlation
from utils.statistics import percentile_interval, resample_counts

REWARDS = ("proxy", "gold")
_RESAMPLES, _DRAWN_POINTS = 1_000, 80
_FEWEST_DISTANCES = 3  # two coefficients go through any two points, which says nothing about the law


def overoptimisation_curves(checkpoints: dict[int, Graded], samples: Sequence[Graded], seed: int = 0) -> dict[str, Any]:
    """Everything that the picture shows, ready for JSON.

    Args:
        checkpoints: graded samples of the policy after each step, on the prompts of `samples`.
        samples: S graded answers of the SFT model per prompt.
        seed: of the bootstrap.

    Returns:
        "prompts" N, "samples" S; "sft": both rewards' mean and standard deviation over the SFT model's samples;
        "ppo": a row per step; "best_of_n": a row per n; "fits": by "ppo" and "best_of_n", then by reward; None where
        there are fewer than three different distances.
    """
    sft = {reward: np.stack([getattr(s, reward) for s in samples], axis=1) for reward in REWARDS}  # (N, S)
    N, S = sft["proxy"].shape
    base = {reward: values.mean(axis=1) for reward, values in sft.items()}  # (N,)
    weights = resample_counts(np.random.default_rng(seed), _RESAMPLES, N) / N

    steps = sorted(checkpoints)
    kl = np.stack([checkpoints[step].kl for step in steps])  # (K, N)
    ppo = _Family(RL, weights, kl)
    sizes = [2**i for i in range(S.bit_length())] + ([S] if S & (S - 1) else [])
    best = _Family(BEST_OF_N, weights, np.array([[best_of_n_kl(n)] * N for n in sizes]))
    for reward in REWARDS:
        ppo.add(reward, np.stack([getattr(checkpoints[step], reward) for step in steps]) - base[reward])
        estimates = np.stack([best_of_n_estimate(sft["proxy"], sft[reward], n) for n in sizes])
        best.add(reward, estimates - base[reward])
    spread = {r: {"mean": float(x.mean()), "standard_deviation": float(x.std())} for r, x in sft.items()}
    return {
        "prompts": N,
        "samples": S,
        "sft": spread | _figures_of(samples[0]),
        "ppo": [
            {"step": step, "source": "checkpoint", **row, **_figures_of(checkpoints[step])}
            for step, row in zip(steps, ppo.rows)
        ],
        "best_of_n": [{"n": n, **row} for n, row in zip(sizes, best.rows)],
        "fits": {"ppo": ppo.fits, "best_of_n": best.fits},
    }


def by_step(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """All points of the policy: graded checkpoints, and before the first one the run's own evaluations."""
    return sorted([*figures["ppo"], *figures["evaluations"]], key=itemgetter("step"))


def highest_gold(policies: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the policy's points the one with the highest gold reward."""
    return max((row for row in policies if row["gold"] is not None), key=itemgetter("gold"))


def _figures_of(graded: Graded) -> dict[str, float | None]:
    """Mean length, share of ended answers, and the correlation of proxy and gold over prompts (None when one is
    constant): it falls when a policy begins to find what the proxy likes by mistake."""
    correlated = correlation(torch.tensor(graded.proxy), torch.tensor(graded.gold))
    return {
        "tokens": float(graded.tokens.mean()),
        "eos_rate": float(graded.ended.mean()),
        "correlation": _finite(correlated),
    }


class _Family:
    """The points of one law, and their bootstrap copies; `fits` by reward."""

    def __init__(self, law: Law, weights: np.ndarray, kl: np.ndarray) -> None:
        """weights: [R, N] shares of the prompts in each resample. kl: [K, N] nats."""
        self.law, self.weights = law, weights
        self.fits: dict[str, dict[str, Any] | None] = {}
        mean, resampled = kl.mean(axis=1), weights @ kl.T  # (K,), (R, K)
        # A sample mean of log-ratios can fall below 0 where the KL is hardly above it.
        self.d, self.d_resampled = np.sqrt(mean.clip(0)), np.sqrt(resampled.clip(0))
        self.rows: list[dict[str, Any]] = [{} for _ in kl]
        self._enter("kl", mean, resampled)
        self._enter("d", self.d, self.d_resampled)

    def add(self, reward: str, gained: np.ndarray) -> None:
        """Enter rewards above the SFT model [K, N] into the rows, and fit them."""
        r, resampled = gained.mean(axis=1), self.weights @ gained.T  # (K,), (R, K)
        self._enter(reward, r, resampled)
        enough = len(np.unique(self.d[self.d > 0])) >= _FEWEST_DISTANCES
        self.fits[reward] = self._describe(*self.law.fit(self.d, r), resampled) if enough else None

    def _enter(self, name: str, values: np.ndarray, resampled: np.ndarray) -> None:
        for k, row in enumerate(self.rows):
            row[name], row[f"{name}_ci"] = float(values[k]), percentile_interval(resampled[:, k])

    def _describe(self, a: float, b: float, resampled: np.ndarray) -> dict[str, Any]:
        """Coefficients, the peak with its interval, and the curve with its band over the distances that were seen."""
        grid = np.linspace(0, self.d.max(), _DRAWN_POINTS)
        coefficients = []
        for d, r in zip(self.d_resampled, resampled):
            try:
                coefficients.append(self.law.fit(d, r))
            except ValueError:  # a resample in which the first checkpoints have not moved
                continue
        curves = np.stack([self.law.curve(grid, *ab) for ab in coefficients])  # (R, G)
        low, high = np.quantile(curves, [0.025, 0.975], axis=0)
        peak = self.law.peak(a, b)
        # An infinite peak has no mean with its neighbour: take the nearest resample, not a value between two.
        ends = np.quantile([self.law.peak(*ab) for ab in coefficients], [0.025, 0.975], method="nearest")
        return {
            "a": a,
            "b": b,
            "peak_d": _finite(peak),
            "peak_d_ci": [_finite(x) for x in ends],
            "peak_reward": float(self.law.curve(np.array(peak), a, b)) if math.isfinite(peak) else None,
            "peak_within_data": bool(0 < peak <= self.d.max()),
            "curve": {"d": _rounded(grid), "r": _rounded(self.law.curve(grid, a, b))},
            "band": {"low": _rounded(low), "high": _rounded(high)},
        }


def _finite(x: float) -> float | None:
    """JSON has neither infinity (a peak that never comes) nor NaN: None."""
    return float(x) if math.isfinite(x) else None


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]
