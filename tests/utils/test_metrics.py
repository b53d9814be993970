"""Figures of the reward model (accuracy, calibration, rank correlation, length) and of sampled text.

Shapes: B prompts, K completions, M pairs.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor, tensor

from utils.metrics import (
    accuracy_of_margins,
    correlation,
    distinct_n,
    duplicate_rate,
    expected_calibration_error,
    kendall_tau,
    pair_margins,
    ranking_accuracy,
    ranking_report,
    repetition,
    summary,
    text_degeneracy,
)


def everything(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def calibrated_margins(count: int, scale: float = 1.5) -> Tensor:
    """Margins whose winner is drawn with probability sigmoid(margin); the sign says whether the scores were right."""
    generator = torch.Generator().manual_seed(0)
    delta = scale * torch.randn(count, generator=generator, dtype=torch.float64)
    first_wins = torch.rand(count, generator=generator, dtype=torch.float64) < delta.sigmoid()
    return torch.where(first_wins, delta, -delta)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_summary_vector() -> None:
    result = summary(torch.arange(101.0))
    assert (result.mean, result.p5, result.p50, result.p95) == (50.0, 5.0, 50.0, 95.0)
    assert result.sd == pytest.approx(math.sqrt(850.0))
    assert summary(tensor([3, 1])) == (2.0, 1.0, pytest.approx(1.1), 2.0, pytest.approx(2.9))
    assert summary(tensor([4.0])) == (4.0, 0.0, 4.0, 4.0, 4.0)
    assert all(math.isnan(x) for x in summary(torch.zeros(0)))


@pytest.mark.parametrize("seed", range(5))
def test_correlation_matches_loops(seed: int) -> None:
    rng = random.Random(seed)
    x = [rng.gauss(0, 1) for _ in range(20)]
    y = [a * rng.uniform(-1, 1) + rng.gauss(0, 1) for a in x]
    mx, my = sum(x) / 20, sum(y) / 20
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    norm = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    tx, ty = tensor(x, dtype=torch.float64), tensor(y, dtype=torch.float64)
    assert correlation(tx, ty) == pytest.approx(cov / norm, abs=1e-12)
    assert correlation(ty, tx) == pytest.approx(cov / norm, abs=1e-12)
    assert correlation(3 * tx - 7, -2 * ty) == pytest.approx(-cov / norm, abs=1e-12)
    assert correlation(tx, tx) == pytest.approx(1.0)


def test_correlation_without_variation_is_undefined() -> None:
    assert math.isnan(correlation(tensor([0.1, 0.1, 0.1]), tensor([1.0, 2.0, 3.0])))
    assert math.isnan(correlation(tensor([1, 2]), tensor([3, 3])))
    never = torch.full((3,), 0.1, dtype=torch.float64)  # its mean is not quite 0.1
    assert math.isnan(correlation(never, tensor([1.0, 2.0, 3.0]))) and math.isnan(correlation(tensor([1, 2, 3]), never))
    assert math.isnan(correlation(torch.zeros(0), torch.zeros(0)))
    with pytest.raises(ValueError, match="two vectors of one length"):
        correlation(torch.zeros(3), torch.zeros(4))


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy_counts_a_tie_as_half() -> None:
    scores = tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 3.0], [5.0, -5.0]])
    assert ranking_accuracy(scores, everything(scores)) == 2.5 / 4
    assert ranking_accuracy(torch.zeros(7, 2), torch.ones(7, 2, dtype=torch.bool)) == 0.5
    assert accuracy_of_margins(tensor([1.0, -1.0, 0.0])) == 0.5
    assert math.isnan(accuracy_of_margins(torch.zeros(0)))
    assert math.isnan(ranking_accuracy(tensor([[1.0, 2.0]]), tensor([[True, False]])))


@pytest.mark.parametrize("seed", range(6))
def test_margins_accuracy_and_kendall_match_loops(seed: int) -> None:
    rng = random.Random(seed)
    rows, k = rng.randint(2, 5), rng.randint(2, 6)
    scores = [[float(rng.randint(0, 3)) for _ in range(k)] for _ in range(rows)]  # with ties
    mask = [[rng.random() < 0.7 for _ in range(k)] for _ in range(rows)]
    mask[0], mask[1] = [True] * k, [False] * k
    margins, taus = [], []
    for s, m in zip(scores, mask, strict=True):
        row = [s[i] - s[j] for i, j in itertools.combinations(range(k), 2) if m[i] and m[j]]
        margins += row
        if row:
            taus.append((sum(x > 0 for x in row) - sum(x < 0 for x in row)) / len(row))
    wins = sum(1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in margins)
    s, m = tensor(scores), tensor(mask)
    s = torch.where(m, s, math.nan)  # a slot that does not exist is never read
    assert pair_margins(s, m).tolist() == margins
    assert ranking_accuracy(s, m) == pytest.approx(wins / len(margins))
    assert kendall_tau(s, m) == pytest.approx(sum(taus) / len(taus))


def test_kendall_tau_of_known_orders() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert kendall_tau(tensor([[4.0, 3.0, 2.0, 1.0]]), mask) == 1.0
    assert kendall_tau(tensor([[1.0, 2.0, 3.0, 4.0]]), mask) == -1.0
    assert kendall_tau(tensor([[4.0, 3.0, 1.0, 2.0]]), mask) == pytest.approx(4 / 6)
    scores = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    assert kendall_tau(scores, mask) == pytest.approx(2 * ranking_accuracy(scores, mask) - 1)
    assert math.isnan(kendall_tau(scores, torch.zeros_like(mask)))


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_calibrated_model_has_no_calibration_error_and_doubling_its_scores_makes_one() -> None:
    margins = calibrated_margins(100_000)
    assert expected_calibration_error(margins) < 0.01
    assert accuracy_of_margins(2 * margins) == accuracy_of_margins(margins)
    assert expected_calibration_error(2 * margins) > 0.05
    assert expected_calibration_error(0.5 * margins) > 0.05


def test_expected_calibration_error_matches_loops() -> None:
    margins = calibrated_margins(500)
    bins: dict[int, list[tuple[float, float]]] = {}
    for m in margins.tolist():
        confidence = 1 / (1 + math.exp(-abs(m)))
        bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((confidence, float(m > 0)))
    expected = sum(abs(sum(c for c, _ in pairs) - sum(a for _, a in pairs)) for pairs in bins.values()) / 500
    assert expected_calibration_error(margins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_every_bin_weighs_as_its_pairs_do(seed: int) -> None:
    """Confidences on the edges of 4 bins over [0.5, 1] and beside them; a tie is half right, an edge opens its bin."""
    rng = random.Random(seed)
    confidence = [rng.choice([0.5, 0.625, 0.75, 0.875, 0.5 + 0.5 * rng.random()]) for _ in range(200)]
    margins = [rng.choice([-1, 1]) * math.log(c / (1 - c)) for c in confidence]
    claimed = tensor(margins, dtype=torch.float64).abs().sigmoid().tolist()
    bins: dict[int, list[float]] = {}
    for margin, c in zip(margins, claimed, strict=True):
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        bins.setdefault(min(int((c - 0.5) * 8), 3), []).append(right - c)
    expected = sum(abs(sum(gaps)) for gaps in bins.values()) / 200
    assert len(bins) == 4
    assert expected_calibration_error(tensor(margins, dtype=torch.float64), 4) == pytest.approx(expected, abs=1e-12)


def test_calibration_covers_every_pair() -> None:
    assert expected_calibration_error(tensor([0.0, -1e6])) == 0.5  # the confidences 0.5 and 1 are in a bin each
    assert math.isnan(expected_calibration_error(torch.zeros(0)))
    assert expected_calibration_error(torch.full((4,), -1e6)) == 1.0  # sure and wrong


# --- report ----------------------------------------------------------------------------------------------------------


def test_ranking_report_of_a_model_that_likes_length() -> None:
    lengths = tensor([[10, 5], [3, 9], [8, 2], [7, 7]])
    report = ranking_report(lengths / 2, lengths, everything(lengths))
    assert report["accuracy"] == report["longer_wins"] == 2.5 / 4
    assert report["length_corr"] == pytest.approx(1.0)
    margins = [2.5, -3.0, 3.0, 0.0]
    assert report["margin_mean"] == pytest.approx(0.625)
    assert report["nll"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4)
    assert report["kendall_tau"] == pytest.approx(0.25)
    assert report["score_mean"] == pytest.approx(lengths.float().mean().item() / 2)


def test_ranking_report_of_a_model_that_knows_nothing() -> None:
    scores = torch.zeros(20, 4, dtype=torch.bfloat16)
    lengths = torch.randint(1, 9, (20, 4), generator=torch.Generator().manual_seed(0))
    report = ranking_report(scores, lengths, everything(scores))
    assert report["nll"] == pytest.approx(math.log(2))
    assert (report["accuracy"], report["margin_sd"], report["ece"], report["kendall_tau"]) == (0.5, 0.0, 0.0, 0.0)
    assert math.isnan(report["length_corr"])


def test_ranking_report_leaves_out_what_does_not_exist() -> None:
    scores, lengths = tensor([[2.0, 1.0, math.nan], [9.0, math.nan, math.nan]]), tensor([[4, 6, 0], [5, 0, 0]])
    mask = tensor([[True, True, False], [True, False, False]])
    report = ranking_report(scores, lengths, mask)
    assert report["nll"] == pytest.approx(math.log1p(math.exp(-1)))  # the prompt without a pair is no zero
    assert (report["accuracy"], report["longer_wins"]) == (1.0, 0.0)
    assert report["score_mean"] == pytest.approx(4.0)


def test_ranking_report_is_of_every_pair_of_a_ranking() -> None:
    scores, lengths = tensor([[1.0, 3.0, 2.0]]), tensor([[5, 9, 5]])
    report = ranking_report(scores, lengths, everything(scores))
    margins = [1.0 - 3.0, 1.0 - 2.0, 3.0 - 2.0]
    assert (report["accuracy"], report["kendall_tau"], report["longer_wins"]) == (1 / 3, pytest.approx(-1 / 3), 0.5)
    assert report["margin_mean"] == pytest.approx(sum(margins) / 3)
    assert report["nll"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3)
    assert report["ece"] == expected_calibration_error(tensor(margins))
    nothing = ranking_report(scores, lengths, tensor([[True, False, False]]))
    assert math.isnan(nothing["accuracy"]) and math.isnan(nothing["nll"]) and nothing["score_mean"] == 1.0


# --- text ------------------------------------------------------------------------------------------------------------


def test_distinct_n_vector() -> None:
    assert distinct_n([[1, 2, 1, 2]], 1) == 0.5
    assert distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1, 2], [1, 2], [2, 1]], 2) == pytest.approx(2 / 3)
    assert distinct_n([["the", "cat", "sat"], ["the", "dog", "sat"]], 1) == pytest.approx(4 / 6)
    assert math.isnan(distinct_n([[1], []], 2))
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n([[1, 2]], 0)


def test_repetition_vector() -> None:
    assert repetition([[1, 2, 3, 4, 5]], 2) == 0.0
    assert repetition([[7] * 5], 2) == 0.75
    assert repetition([[7] * 5, [1, 2, 3]], 2) == 0.375
    assert repetition([[7] * 5, [1]], 2) == 0.75  # too short to say
    assert math.isnan(repetition([[1, 2, 3]], 4))


def test_lengths_of_the_ngrams_where_none_is_given() -> None:
    text = [[1, 2, 1, 2, 3, 1, 2, 1, 2, 4]]
    assert distinct_n(text) == distinct_n(text, 2) != distinct_n(text, 3)
    assert repetition(text) == repetition(text, 4) != repetition(text, 5)
    assert text_degeneracy(text) == {
        "distinct_2": distinct_n(text, 2), "repetition": repetition(text, 4), "duplicate_rate": 0.0,
    }  # fmt: skip


def test_duplicate_rate_vector() -> None:
    assert duplicate_rate([[1, 2], [1, 2], [3], [1, 2]]) == 0.5
    assert duplicate_rate([[1], [2]]) == 0.0
    assert math.isnan(duplicate_rate([]))


def test_collapse_shows_in_every_figure() -> None:
    rng = random.Random(0)
    healthy = [[rng.randrange(1000) for _ in range(30)] for _ in range(20)]
    collapsed = [[rng.randrange(3)] * 30 for _ in range(20)]
    good, bad = text_degeneracy(healthy), text_degeneracy(collapsed)
    assert good["distinct_2"] > 0.9 > 0.1 > bad["distinct_2"]
    assert good["repetition"] < 0.1 < 0.9 < bad["repetition"]
    assert good["duplicate_rate"] == 0.0 and bad["duplicate_rate"] > 0.5
