"""The length-controlled win rate: what must hold by symmetry, against another optimiser, and on judges with a bias."""

import numpy as np
import pytest
import torch

from utils.judging.length_control import length_controlled_win_rate
from utils.statistics import bootstrap_interval

pytestmark = pytest.mark.slow


def answers(n=800, seed=0, longer_by=15):
    """Lengths in words; those of a are longer on average."""
    rng = np.random.default_rng(seed)
    return rng.integers(10, 100, n) + longer_by, rng.integers(10, 100, n), rng


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("certain", [True, False])
def test_a_judge_of_length_alone_says_nothing_about_quality(certain):
    """The raw win rate is the judge's length bias; the controlled interval holds one half 19 times in 20."""
    held = 0
    for seed in range(20):
        a, b, rng = answers(seed=seed)
        p = sigmoid(2 * np.tanh((a - b) / (a - b).std()))
        scores = (a > b) + 0.5 * (a == b) if certain else (rng.random((2, 800)) < p).mean(0)  # two orders
        found = length_controlled_win_rate(scores, a, b, resamples=300, seed=seed)
        assert bootstrap_interval(scores, resamples=300)[0] > 0.53
        assert scores.mean() == pytest.approx((a > b if certain else p).mean(), abs=0.04)
        assert found.ci[0] < found.win_rate < found.ci[1] and found.gamma > 1
        held += found.ci[0] < 0.5 < found.ci[1]
    assert held >= 17


@pytest.mark.parametrize("longer_by", [0, 40, 200])
def test_swapping_the_systems(longer_by):
    a, b, rng = answers(longer_by=longer_by)
    scores = rng.choice([0, 0.25, 0.5, 0.75, 1], size=800)
    ab, ba = length_controlled_win_rate(scores, a, b), length_controlled_win_rate(1 - scores, b, a)
    assert ab.win_rate + ba.win_rate == pytest.approx(1, abs=1e-9)
    assert ab.ci == pytest.approx((1 - ba.ci[1], 1 - ba.ci[0]), abs=1e-9)
    assert ab.gamma == pytest.approx(ba.gamma, abs=1e-6)


@pytest.mark.parametrize("wins", [0, 37, 100])
def test_equal_lengths_give_the_raw_win_rate(wins):
    scores = np.arange(100) < wins
    found = length_controlled_win_rate(scores, np.full(100, 7), np.full(100, 7), resamples=10_000)
    assert found.win_rate == pytest.approx(wins / 100, abs=1e-9)
    assert found.ci == pytest.approx(bootstrap_interval(scores), abs=0.011)
    assert found.gamma == 0


def test_a_judge_of_quality_alone_is_left_as_it_is():
    a, b, rng = answers(2000)
    scores = (rng.random(2000) < 0.7).astype(float)
    found = length_controlled_win_rate(scores, a, b)
    assert found.win_rate == pytest.approx(scores.mean(), abs=0.02)
    assert abs(found.gamma) < 0.3


@pytest.mark.parametrize("separable", [True, False])
def test_the_fit_is_the_maximum_that_another_optimiser_finds(separable):
    a, b, rng = answers(120)
    z = np.tanh((a - b) / (a - b).std())
    scores = (z > 0.1) * 1.0 if separable else rng.choice([0, 0.25, 0.5, 0.75, 1], size=120)
    theta, gamma = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, x = torch.tensor(scores), torch.tensor(z)
    optimiser = torch.optim.LBFGS([theta, gamma], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logits = theta + gamma * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + 0.005 * gamma**2
        value.backward()
        return value

    optimiser.step(loss)
    found = length_controlled_win_rate(scores, a, b, resamples=10)
    assert found.win_rate == pytest.approx(torch.sigmoid(theta).item(), abs=1e-5)
    assert found.gamma == pytest.approx(gamma.item(), abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(200):
        a, b, rng = answers(200, seed)
        p = sigmoid(0.4 + 1.5 * np.tanh((a - b) / (a - b).std()))
        low, high = length_controlled_win_rate(rng.random(200) < p, a, b, resamples=200, seed=seed).ci
        held += low <= sigmoid(0.4) <= high
    assert 0.88 < held / 200 <= 0.99


def test_level_resamples_and_seed_are_those_of_the_call():
    a, b, rng = answers(60)
    scores = rng.choice([0, 0.5, 1], size=60)

    def width(**options):
        low, high = length_controlled_win_rate(scores, a, b, **{"resamples": 100, **options}).ci
        return high - low

    assert width(level=0.5) < 0.6 * width() and width(level=0.95) == width()
    assert width(resamples=1) == 0 and width(seed=1) != width(seed=0) == width()
    assert length_controlled_win_rate(scores, a, b).ci == length_controlled_win_rate(scores, a, b, resamples=1_000).ci


def test_what_cannot_be_told_apart():
    assert length_controlled_win_rate([0, 1, 1], [5, 6, 7], [3, 4, 5]) is None


@pytest.mark.parametrize("scores", [[1, 1, 1, 0], [1, 0, 0, 0], [0.5, 1, 0.25, 0]])
def test_few_prompts_give_finite_figures(scores):
    found = length_controlled_win_rate(scores, [9, 1, 4, 3], [2, 2, 2, 2])
    assert 0 <= found.ci[0] <= found.win_rate <= found.ci[1] <= 1 and np.isfinite(found.gamma)


@pytest.mark.parametrize(
    ("scores", "a", "b", "told"),
    [
        ([], [], [], "a score and two lengths"), ([1, 0], [1], [1], "a score and two lengths"),
        ([[1, 0]], [[1, 2]], [[1, 3]], "a score and two lengths"), ([1, 0], [1, 2], [1], "a score and two lengths"),
        ([1.5], [1], [1], "between 0 and 1"), ([-0.1], [1], [1], "between 0 and 1"), ([np.nan], [1], [1], "between 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(scores, a, b, told):
    with pytest.raises(ValueError, match=told):
        length_controlled_win_rate(scores, a, b)
