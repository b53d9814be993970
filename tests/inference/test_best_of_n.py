"""Best-of-n: the table of its KL, and the estimator against every subset."""

from itertools import combinations

import numpy as np
import pytest

from inference.best_of_n import best_of_n_estimate, best_of_n_kl, best_of_n_weights


@pytest.mark.parametrize(
    ("n", "kl", "root"),
    [
        (1, 0, 0),
        (2, 0.193147, 0.439485),
        (4, 0.636294, 0.797681),
        (16, 1.835089, 1.354655),
        (64, 3.174508, 1.781715),
        (256, 4.549084, 2.132858),
    ],
)
def test_kl(n, kl, root):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    assert best_of_n_kl(n) ** 0.5 == pytest.approx(root, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_kl_is_that_of_the_best_of_many_outcomes(n):
    """By definition: of m equally likely outcomes, number i is the best of n with probability (i/m)^n - ((i-1)/m)^n."""
    m = 200_000
    i = np.arange(1, m + 1) / m
    p = i**n - (i - 1 / m) ** n
    assert (p * np.log(p * m)).sum() == pytest.approx(best_of_n_kl(n), abs=1e-3)


def test_weights_of_the_example():
    assert best_of_n_weights(4, 2) == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    assert best_of_n_estimate([0, 1, 2, 3], [0, 1, 0.5, 0.25], 2) == pytest.approx(0.4583333, abs=1e-7)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("tied", [False, True])
def test_estimate_is_the_average_over_all_subsets(n, tied):
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    if tied:
        proxy = proxy.round()
    expected = []
    for p, g in zip(proxy, gold):
        # Of equal proxies the later sample wins.
        best = [max(subset, key=lambda i: (p[i], i)) for subset in combinations(range(7), n)]
        expected.append(g[best].mean())
    assert best_of_n_estimate(proxy, gold, n) == pytest.approx(expected)


@pytest.mark.parametrize("N", [1, 16, 1024])
def test_ends_of_the_scale(N):
    """n = 1 is the mean of all samples, n = N the best of them; large binomials do not overflow."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=N), rng.normal(size=N)
    assert best_of_n_weights(N, max(1, N // 2)).sum() == pytest.approx(1)
    assert best_of_n_estimate(proxy, gold, 1) == pytest.approx(gold.mean())
    assert best_of_n_estimate(proxy, gold, N) == pytest.approx(gold[proxy.argmax()])


def test_estimate_is_unbiased_with_ties():
    """Against fresh draws of 3, of which a random one of the best wins."""
    rng = np.random.default_rng(0)
    proxy = rng.integers(0, 3, size=(100_000, 8))
    gold = proxy * (proxy < 2) + rng.normal(size=proxy.shape)
    drawn = (proxy[:, :3] + 0.5 * rng.random((100_000, 3))).argmax(1)
    expected = gold[np.arange(100_000), drawn].mean()
    assert best_of_n_estimate(proxy, gold, 3).mean() == pytest.approx(expected, abs=0.02)


def test_half_precision_is_not_added_up_in():
    """Scores as a GPU gives them."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 16)).astype(np.float16), rng.normal(size=(2, 16)).astype(np.float16)
    found = best_of_n_estimate(proxy, gold, 4)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, best_of_n_estimate(proxy.astype(float), gold.astype(float), 4), atol=1e-12)
    assert best_of_n_estimate([1, 0], [3, 5], 1) == 4  # whole numbers, one prompt


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)
    for n in (0, 5):
        with pytest.raises(ValueError, match="cannot be estimated from 4 samples"):
            best_of_n_weights(4, n)
    with pytest.raises(ValueError, match="one shape"):
        best_of_n_estimate([1, 2], [1, 2, 3], 1)
