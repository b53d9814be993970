"""Figures that are read and not trained on: how well a reward model ranks, and how degenerate sampled text is.

Shapes: B prompts, K completions of one prompt (ranked best first), M pairs of an evaluation set, N values.

All but `right_and_all_pairs` is computed in float64 on the CPU and comes back as Python floats, over one whole
evaluation set: collect the scores of all batches and processes first. A figure that does not exist (no pair, no
variance) is nan and never 0.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.loss import masked_mean, masked_sum, preference_pairs, ranking_loss

# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Location and spread of N values, in their unit."""

    mean: float
    sd: float
    """Biased: division by N."""
    p5: float
    p50: float
    p95: float


def summary(values: Tensor) -> Summary:
    """Mean, standard deviation and percentiles (linear interpolation) of values [N]; all nan for N = 0."""
    values = values.detach().cpu().double()
    if values.numel() == 0:
        return Summary(*[math.nan] * 5)
    quantiles = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return Summary(float(values.mean()), float(values.std(correction=0)), *quantiles.tolist())


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of x [N] and y [N]; nan if one of them does not vary."""
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected two vectors of one length, not {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    if x.numel() == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


# ---------------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------------


def pair_margins(scores: Tensor, mask: Tensor) -> Tensor:
    """Score of the better minus score of the worse completion, for every pair.

    Args:
        scores: [B, K] best first; any other number of a completion will do, for instance its length.
        mask: [B, K] bool, which completions exist.

    Returns: [M] float64 on the CPU, ordered by prompt, then i, then j.
    """
    scores = scores.detach().cpu().double()
    pairs = preference_pairs(mask).cpu()
    return (scores[:, :, None] - scores[:, None, :])[pairs]


def accuracy_of_margins(margins: Tensor) -> float:
    """Share of margins [M] above 0; a tie counts one half, as a guess would. nan for M = 0."""
    margins = margins.cpu().double()
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def ranking_accuracy(scores: Tensor, mask: Tensor) -> float:
    """Share of all pairs that the scores [B, K] order rightly, ties one half; arguments as `pair_margins`.

    Of the lengths of the completions it is the accuracy of the baseline "the longer one wins".
    """
    return accuracy_of_margins(pair_margins(scores, mask))


@torch.no_grad()
def right_and_all_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """How many pairs the scores [B, K] order as they are ranked, ties one half, and how many there are: [2].

    On the scores' device, to be added up over micro-batches and processes without waiting for it.
    """
    margins, pairs = scores[:, :, None] - scores[:, None, :], preference_pairs(mask)
    right = masked_sum((margins > 0).float() + 0.5 * (margins == 0).float(), pairs)
    return torch.stack([right, pairs.sum().float()])


def kendall_tau(scores: Tensor, mask: Tensor) -> float:
    """Kendall's tau-a between scores and ranking, mean over prompts that have a pair; arguments as `pair_margins`.

    Concordant minus discordant pairs over all pairs of the prompt: -1 reversed, 0 unrelated, 1 the same order. For one
    prompt it equals twice the accuracy minus 1.
    """
    scores, mask = scores.detach().cpu().double(), mask.cpu()
    pairs = preference_pairs(mask)
    tau = masked_mean((scores[:, :, None] - scores[:, None, :]).sign(), pairs, dim=(1, 2))  # (B)
    return float(tau[pairs.any(dim=2).any(dim=1)].mean())


def expected_calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Mean over pairs of |accuracy - confidence| of the pair's bin (Guo et al. 2017, eq. 3); nan without pairs.

    A pair's confidence, sigmoid(|margin|), is the accuracy that its scores claim; the bins divide [0.5, 1] evenly.
    0 means that a margin of m is right in sigmoid(m) of the cases, which is what the ranking loss aims at.
    """
    if len(margins) == 0:
        return math.nan
    margins = margins.cpu().double()
    confidence = margins.abs().sigmoid()
    inner_edges = torch.tensor([0.5 + 0.5 * k / bins for k in range(1, bins)], dtype=torch.float64)
    bin_of = torch.bucketize(confidence, inner_edges, right=True)  # a pair on an edge is in the bin above it
    gaps = 0.0
    for k in bin_of.unique():
        inside = bin_of == k
        gaps += int(inside.sum()) * abs(accuracy_of_margins(margins[inside]) - float(confidence[inside].mean()))
    return gaps / len(margins)


def ranking_report(scores: Tensor, lengths: Tensor, mask: Tensor) -> dict[str, float]:
    """All figures of a reward model on one evaluation set.

    Args:
        scores: [B, K] best first.
        lengths: [B, K] tokens of each response.
        mask: [B, K] bool, which completions exist.

    Returns:
        accuracy, over pairs, ties one half; nll, the ranking loss per prompt (ln 2 = 0.6931 knows nothing);
        margin_mean and margin_sd over pairs; ece with 10 bins; kendall_tau; score_mean and score_sd over completions;
        length_corr, correlation of score and length; longer_wins, the accuracy of always choosing the longer one.
    """
    scores, lengths, mask = scores.detach().cpu().double(), lengths.cpu().double(), mask.cpu()
    margins = pair_margins(scores, mask)
    ranked = preference_pairs(mask).any(dim=2).any(dim=1)  # (B) prompts that have a pair
    margin, score = summary(margins), summary(scores[mask])
    return {
        "accuracy": accuracy_of_margins(margins),
        "nll": float(ranking_loss(scores, mask)[ranked].mean()),
        "margin_mean": margin.mean,
        "margin_sd": margin.sd,
        "ece": expected_calibration_error(margins),
        "kendall_tau": kendall_tau(scores, mask),
        "score_mean": score.mean,
        "score_sd": score.sd,
        "length_corr": correlation(scores[mask], lengths[mask]),
        "longer_wins": ranking_accuracy(lengths, mask),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Degeneracy of sampled text. A response is a sequence of token ids or of words, without EOS and padding.
# ---------------------------------------------------------------------------------------------------------------------


def _ngrams(response: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Different n-grams of all responses together over all their n-grams; nan without any.

    After Li et al. 2016, who divide by the number of tokens: here 1 means no repetition, for every n.
    Falls with the amount of text, so compare equal numbers of responses of like length.
    """
    ngrams = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(responses: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Share of the n-grams of a response that repeat an earlier one of it, mean over responses; 0 is best.

    seq-rep-n of Welleck et al. 2020. Responses shorter than n tokens have no n-gram and are left out; nan if all are.
    """
    ngrams = [grams for response in responses if (grams := _ngrams(response, n))]
    return sum(1 - len(set(grams)) / len(grams) for grams in ngrams) / len(ngrams) if ngrams else math.nan


def duplicate_rate(responses: Sequence[Sequence[Hashable]]) -> float:
    """Share of the responses that are a copy of an earlier one, whatever the prompt; nan without responses."""
    return 1 - len({tuple(response) for response in responses}) / len(responses) if responses else math.nan


def text_degeneracy(responses: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    """distinct_2, repetition (4-grams) and duplicate_rate of responses: a drop or rise says that a policy collapses."""
    return {
        "distinct_2": distinct_n(responses, 2),
        "repetition": repetition(responses, 4),
        "duplicate_rate": duplicate_rate(responses),
    }
