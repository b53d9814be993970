"""Intervals: published vectors, and how often they hold what they claim to hold."""

import numpy as np
import pytest

from utils.statistics import bootstrap_interval, paired_bootstrap, seed_bootstrap, wilson_interval, win_scores


def test_win_scores_count_ties_as_half():
    assert win_scores([1, 2, 3], [0, 2, 4]).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("wins", "n", "expected"),
    [(60, 100, (0.502003, 0.690599)), (0, 10, (0, 0.277533)), (120, 200, (0.530837, 0.665394)), (0, 0, (0, 1))],
)
def test_wilson(wins, n, expected):
    assert wilson_interval(wins, n) == pytest.approx(expected, abs=1e-6)
    low, high = wilson_interval(n - wins, n)
    assert (1 - high, 1 - low) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("wins", "n"), [(3, 2), (-1, 2)])
def test_wilson_refuses_what_cannot_be(wins, n):
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(wins, n)


@pytest.mark.parametrize(("n", "half"), [(64, 0.1225), (200, 0.0693), (500, 0.0438), (805, 0.0345)])
def test_half_width_of_the_bootstrap_at_one_half(n, half):
    scores = np.arange(n) % 2 if n % 2 == 0 else np.r_[np.arange(n - 1) % 2, 0.5]
    low, high = bootstrap_interval(scores)
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(0.5, abs=0.01)


def test_the_bootstrap_interval_holds_the_truth_as_often_as_it_says():
    """400 experiments of 100 prompts with two judgements each, which agree in half of the prompts."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(400):
        first, second = (rng.random((2, 100)) < 0.7) * 1.0
        score = np.where(rng.random(100) < 0.5, first, (first + second) / 2)
        low, high = bootstrap_interval(score, resamples=500, seed=trial)
        held += low <= 0.7 <= high
    assert 0.91 < held / 400 < 0.98


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)
    a, b = hard + 0.2 + 0.1 * rng.normal(size=300), hard + 0.1 * rng.normal(size=300)
    low, high = paired_bootstrap(a, b)
    assert 0.15 < low < 0.2 < high < 0.25
    assert paired_bootstrap(b, a) == pytest.approx((-high, -low))
    unpaired = bootstrap_interval(a)
    assert unpaired[1] - unpaired[0] > 5 * (high - low)
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap(a, b[:1])


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 200))
    same = seed_bootstrap(noise)
    apart = seed_bootstrap(noise + np.array([[-1.0], [0.0], [1.0]]))
    assert apart[1] - apart[0] > 3 * (same[1] - same[0])
    low, high = seed_bootstrap(np.repeat(noise[:1], 3, axis=0))  # three equal seeds: prompts alone
    assert (low, high) == pytest.approx(bootstrap_interval(noise[0]), abs=0.02)


def test_seed_bootstrap_is_the_resampling_of_rows_and_columns():
    """Against a loop that draws seeds and prompts by index."""
    scores = np.random.default_rng(2).normal(size=(4, 30)) + np.arange(4)[:, None]
    rng = np.random.default_rng(3)
    drawn = [scores[np.ix_(rng.integers(4, size=4), rng.integers(30, size=30))].mean() for _ in range(10_000)]
    assert seed_bootstrap(scores) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.05)


SCORES = np.random.default_rng(7).normal(size=(3, 40))


@pytest.mark.parametrize(
    "interval",
    [
        lambda **options: bootstrap_interval(SCORES[0], **options),
        lambda **options: paired_bootstrap(SCORES[0], SCORES[1], **options),
        lambda **options: seed_bootstrap(SCORES, **options),
    ],
    ids=["one", "paired", "seeds"],
)
def test_level_resamples_and_seed_are_those_of_the_call(interval):
    def width(**options):
        low, high = interval(**options)
        return high - low

    assert width(level=0.5) < 0.5 * width() and width(level=0.99) > 1.1 * width(level=0.95) == 1.1 * width()
    assert width(resamples=1) == 0 < width(resamples=2)
    assert interval(seed=1) != interval(seed=0) == interval() == interval(resamples=10_000)


def test_half_precision_and_verdicts_are_taken_as_floats():
    half = SCORES.astype(np.float16)
    assert bootstrap_interval(half[0], resamples=50) == bootstrap_interval(half[0].astype(float), resamples=50)
    assert seed_bootstrap(half, resamples=50) == seed_bootstrap(half.astype(float), resamples=50)
    wins, losses = half[0] > 0, half[0] < 0
    assert paired_bootstrap(wins, losses, resamples=50) == paired_bootstrap(wins * 1.0, losses * 1.0, resamples=50)


def test_wilson_at_another_level():
    low, high = wilson_interval(60, 100, level=0.9)
    assert (low, high) == pytest.approx((0.517, 0.677), abs=1e-3)


@pytest.mark.parametrize("shape", [(2, 10), (10,), (3, 0)])
def test_seed_bootstrap_needs_three_seeds(shape):
    with pytest.raises(ValueError, match="at least 3 seeds"):
        seed_bootstrap(np.ones(shape))


def test_no_scores():
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval([])
