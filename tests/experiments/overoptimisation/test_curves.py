"""From graded answers to curves: known laws come back, intervals hold, best-of-n is the estimator's."""

import json

import numpy as np
import pytest

from experiments.graded_answers import Graded
from experiments.overoptimisation.curves import overoptimisation_curves
from experiments.overoptimisation.fit import RL
from inference.best_of_n import best_of_n_estimate, best_of_n_kl

pytestmark = pytest.mark.slow

N = 300


def graded(proxy, gold, kl=None):
    return Graded(np.asarray(gold), np.asarray(proxy), kl, np.full(len(gold), 7), np.arange(len(gold)) % 2 == 0)


def sft_samples(count, rng, hard):
    """Proxy and gold of independent samples; every prompt has its own difficulty in both."""
    quality = rng.normal(size=(count, N))
    return [graded(hard + q, 2 * hard + q + 0.5 * rng.normal(size=N) + 3) for q in quality]


def policies(kls, rng, hard, a=1.0, b=0.5):
    """Checkpoints that obey the RL law: gold d (a - b log d) above the SFT mean, proxy twice as much."""
    found = {}
    for step, kl in enumerate(kls, start=1):
        above = float(RL.curve(np.sqrt(kl), a, b))
        found[step] = graded(
            hard + 2 * above + 0.1 * rng.normal(size=N), 2 * hard + above + 3 + 0.1 * rng.normal(size=N),
            kl + 0.3 * rng.normal(size=N) * np.sqrt(kl),
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=N)
    return policies([0.3, 1.0, 2.5, 5.0, 9.0], rng, hard), sft_samples(16, rng, hard)


def test_a_known_law_comes_back(data):
    found = overoptimisation_curves(*data)
    fit = found["fits"]["ppo"]["gold"]
    assert (fit["a"], fit["b"]) == pytest.approx((1, 0.5), abs=0.06)
    assert fit["peak_d"] == pytest.approx(np.e, abs=0.25) and fit["peak_within_data"]
    assert fit["peak_d_ci"][0] < np.e < fit["peak_d_ci"][1]
    assert fit["peak_reward"] == pytest.approx(0.5 * np.e, abs=0.1)
    low, high, r = (np.array(x) for x in (fit["band"]["low"], fit["band"]["high"], fit["curve"]["r"]))
    truth = RL.curve(np.array(fit["curve"]["d"]), 1, 0.5)
    assert (low <= r).all() and (r <= high).all()
    assert (low - 0.01 <= truth).all() and (truth <= high + 0.01).all()
    assert found["fits"]["ppo"]["proxy"]["a"] == pytest.approx(2, abs=0.12)


def test_rewards_are_measured_from_the_sft_mean_prompt_by_prompt(data):
    checkpoints, samples = data
    found = overoptimisation_curves(checkpoints, samples)
    base = np.mean([s.gold for s in samples], axis=0)
    for step, row in zip(sorted(checkpoints), found["ppo"]):
        gained = checkpoints[step].gold - base
        assert row["step"] == step and row["gold"] == pytest.approx(gained.mean())
        # The difficulty of the prompts, of deviation 2, is not in the interval.
        half = 1.96 * gained.std() / N**0.5
        assert row["gold_ci"] == pytest.approx((row["gold"] - half, row["gold"] + half), abs=0.2 * half)
        assert row["kl_ci"][0] < row["kl"] == pytest.approx(checkpoints[step].kl.mean())
        assert row["d"] ** 2 == pytest.approx(row["kl"]) and row["d_ci"][0] ** 2 == pytest.approx(row["kl_ci"][0])
        assert (row["tokens"], row["eos_rate"]) == (7, 0.5)
        expected = np.corrcoef(checkpoints[step].proxy, checkpoints[step].gold)[0, 1]
        assert row["correlation"] == pytest.approx(expected)
    assert found["sft"]["gold"]["mean"] == pytest.approx(base.mean())


@pytest.mark.parametrize(("count", "sizes"), [(16, [1, 2, 4, 8, 16]), (6, [1, 2, 4, 6]), (2, [1, 2])])
def test_best_of_n(data, count, sizes):
    checkpoints, samples = data
    rows = overoptimisation_curves(checkpoints, samples[:count])["best_of_n"]
    assert [row["n"] for row in rows] == sizes
    proxy, gold = (np.stack([getattr(s, name) for s in samples[:count]], axis=1) for name in ("proxy", "gold"))
    for row in rows:
        assert row["kl"] == pytest.approx(best_of_n_kl(row["n"])) == row["kl_ci"][0]
        assert row["gold"] == pytest.approx(best_of_n_estimate(proxy, gold, row["n"]).mean() - gold.mean())
        assert row["gold_ci"][0] <= row["gold"] <= row["gold_ci"][1]
    assert rows[0]["proxy"] == pytest.approx(0) and rows[0]["d"] == 0
    assert [r["proxy"] for r in rows] == sorted(r["proxy"] for r in rows)


def test_two_points_are_not_fitted(data):
    checkpoints, samples = data
    few = overoptimisation_curves({step: checkpoints[step] for step in (2, 4)}, samples[:2])
    assert few["fits"] == {"ppo": {"proxy": None, "gold": None}, "best_of_n": {"proxy": None, "gold": None}}
    assert len(few["ppo"]) == 2


def test_a_policy_that_has_not_moved(data):
    """KL 0, and samples of it below 0: a distance of 0 and no NaN anywhere."""
    checkpoints, samples = data
    still = graded(checkpoints[1].proxy, checkpoints[1].gold, np.full(N, -0.01))
    found = overoptimisation_curves({0: still, **checkpoints}, samples)
    assert found["ppo"][0]["d"] == 0 and found["ppo"][0]["kl"] == pytest.approx(-0.01)
    assert found["fits"]["ppo"]["gold"]["a"] == pytest.approx(1, abs=0.06)
    json.dumps(found, allow_nan=False)


def test_a_curve_that_only_rises_has_no_peak_and_is_plain_json(data):
    checkpoints, samples = data
    rng = np.random.default_rng(1)
    hard = samples[0].proxy * 0
    rising = policies([0.3, 1, 4], rng, hard, a=1.0, b=-0.3)
    fit = overoptimisation_curves(rising, samples)["fits"]["ppo"]["gold"]
    assert fit["b"] < 0 and fit["peak_d"] is None and fit["peak_reward"] is None and not fit["peak_within_data"]
    json.dumps(fit, allow_nan=False)
