"""Best-of-n: sample n responses, keep the one that the reward model scores highest. The baseline PPO has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best_of_n_kl(n: int) -> float:
    """KL of the best-of-n policy to the policy it samples from, in nats: log n - (n - 1) / n.

    Exact when no two responses share a score, an upper bound otherwise (Beirami et al. 2024). ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"best of {n}: n must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_weights(N: int, n: int) -> np.ndarray:
    """The share of all n-subsets of N samples in which each sample is the best: [N], from worst to best, summing to 1.

    Sample i (from 0) is the best of a subset when the other n - 1 are among the i below it: C(i, n - 1) / C(N, n)
    (Nakano et al. 2021, appendix I). ValueError where n is not between 1 and N.
    """
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} cannot be estimated from {N} samples")
    subsets = math.comb(N, n)
    return np.array([math.comb(i, n - 1) / subsets for i in range(N)])


def best_of_n_estimate(proxy: Sequence, values: Sequence, n: int) -> np.ndarray:
    """Unbiased estimate of the mean value of best-of-n from N >= n independent samples of each prompt.

    It is the average over all n-subsets of the value of the subset's best by proxy. Of equal proxies the later sample
    counts as the better one; samples come in no order, so that is as good as a coin.

    Args:
        proxy: [..., N], what ranks the samples. values: [..., N], what is estimated: the gold reward, or the proxy.

    Returns:
        [...], one estimate per prompt. ValueError where the shapes differ, or n is not between 1 and N.
    """
    proxy, values = np.asarray(proxy, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if proxy.shape != values.shape or proxy.ndim == 0:
        raise ValueError(f"proxy and values must be of one shape [..., N], not {proxy.shape} and {values.shape}")
    order = np.argsort(proxy, axis=-1, kind="stable")
    return np.take_along_axis(values, order, axis=-1) @ best_of_n_weights(proxy.shape[-1], n)
