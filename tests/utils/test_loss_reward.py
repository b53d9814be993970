"""The ranking loss, the normalisation of the reward, the KL estimators and the reward of a token.

Shapes: B rows, T response, K completions of one prompt.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor, tensor

from utils.loss import (
    adaptive_kl_coef,
    approx_kl_sum,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_sum,
    penalise_missing_eos,
    per_token_rewards,
    preference_pairs,
    ranking_loss,
    response_mask,
    reward_affine,
)


def close(actual: Tensor, expected: Tensor | list | float, tol: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=tol)


def everything(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


# --- ranking loss ----------------------------------------------------------------------------------------------------


def ranking_loss_by_loops(
    scores: list[float], mask: list[bool], preferred: set[tuple[int, int]] | None = None
) -> float:
    """Mean over pairs, in plain Python; log(sigmoid) is safe here because the margins are small."""
    terms = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        wanted = i < j if preferred is None else (i, j) in preferred
        if wanted and mask[i] and mask[j]:
            terms.append(-math.log(1.0 / (1.0 + math.exp(-(scores[i] - scores[j])))))
    return sum(terms) / len(terms) if terms else 0.0


def test_ranking_loss_vector_and_gradient() -> None:
    scores = tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    loss = ranking_loss(scores, everything(scores))
    loss.sum().backward()
    close(loss.detach(), [0.2511505])  # dividing by C(3, 2) twice would give 0.0837168
    close(scores.grad, [[-0.1293814, 0.0, 0.1293814]])


def test_two_completions_give_the_pairwise_logistic_loss() -> None:
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(ranking_loss(scores, everything(scores)), -torch.log(torch.sigmoid(scores[:, 0] - scores[:, 1])), 1e-12)


@pytest.mark.parametrize("k", range(2, 10))
def test_equal_scores_give_ln_2_for_every_k(k: int) -> None:
    scores = torch.full((3, k), 1.7)
    close(ranking_loss(scores, everything(scores)), math.log(2))


@pytest.mark.parametrize("seed", range(8))
def test_ranking_loss_matches_loops(seed: int) -> None:
    rng = random.Random(seed)
    rows, k = rng.randint(1, 5), rng.randint(2, 6)
    scores = [[rng.gauss(0, 2) for _ in range(k)] for _ in range(rows)]
    mask = [[rng.random() < 0.7 for _ in range(k)] for _ in range(rows)]
    mask[0] = [i == 0 for i in range(k)]  # a prompt without a pair
    loss = ranking_loss(tensor(scores, dtype=torch.float64), tensor(mask))
    close(loss, [ranking_loss_by_loops(s, m) for s, m in zip(scores, mask, strict=True)], 1e-12)
    assert float(loss[0]) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_ranking_loss_of_partial_rankings_matches_loops(seed: int) -> None:
    rng = random.Random(100 + seed)
    k = rng.randint(2, 6)
    scores, mask = [rng.gauss(0, 2) for _ in range(k)], [rng.random() < 0.8 for _ in range(k)]
    grade = [rng.randint(0, 2) for _ in range(k)]  # equal grades are ties and give no pair; the order is arbitrary
    preferred = {(i, j) for i in range(k) for j in range(k) if grade[i] > grade[j]}
    pair_mask = tensor([[[(i, j) in preferred for j in range(k)] for i in range(k)]])
    loss = ranking_loss(tensor([scores], dtype=torch.float64), tensor([mask]), pair_mask)
    close(loss, [ranking_loss_by_loops(scores, mask, preferred)], 1e-12)


def test_a_pair_mask_of_the_rank_order_changes_nothing_and_the_diagonal_never_counts() -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    order = torch.ones(4, 5, 5, dtype=torch.bool).triu()  # with the diagonal
    close(ranking_loss(scores, everything(scores), order), ranking_loss(scores, everything(scores)), 1e-7)
    assert int(preference_pairs(everything(scores)).sum()) == 4 * 10


def test_ranking_loss_is_shift_invariant() -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(ranking_loss(scores + 37.0, everything(scores)), ranking_loss(scores, everything(scores)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("margin", [18.0, 20.0, 50.0, 120.0, -18.0, -50.0, -120.0])
def test_large_margins_have_a_finite_loss_and_gradient(margin: float, dtype: torch.dtype) -> None:
    scores = tensor([[margin, 0.0, -margin]], dtype=dtype, requires_grad=True)
    loss = ranking_loss(scores, everything(scores))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(scores.grad).all())
    if margin > 0:
        close(loss.detach(), [0.0], 1e-6)
    else:
        close(loss.detach(), [-4 * margin / 3], 1e-3)
        close(scores.grad.float(), [[-2 / 3, 0.0, 2 / 3]], 4e-3)


@pytest.mark.parametrize("garbage", [1e3, math.inf, math.nan])
def test_a_slot_that_does_not_exist_has_no_influence(garbage: float) -> None:
    full = tensor([[1.0, 0.5, garbage]], requires_grad=True)
    loss = ranking_loss(full, tensor([[True, True, False]]))
    loss.sum().backward()
    close(loss.detach(), ranking_loss(tensor([[1.0, 0.5]]), tensor([[True, True]])), 1e-7)
    assert bool(torch.isfinite(full.grad).all()) and float(full.grad[0, 2]) == 0.0


def test_ranking_loss_gradient() -> None:
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    mask = tensor([[True] * 4, [True, True, False, True], [True, False, False, False]])
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, mask), scores)


@pytest.mark.parametrize(("sd", "expected"), [(1e-4, 0.6931), (1.0, 0.9027)])
def test_expected_loss_of_an_untrained_head(sd: float, expected: float) -> None:
    scores = sd * torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    assert float(ranking_loss(scores, everything(scores)).mean()) == pytest.approx(expected, abs=0.005)


# --- normalisation of the reward -------------------------------------------------------------------------------------


def test_reward_affine_vector() -> None:
    scores = tensor([2.0, 4.0, 6.0, 8.0])
    gain, bias = reward_affine(scores)
    close(gain, 0.4472136)
    close(bias, -2.2360680)
    close(gain * scores + bias, [-1.3416408, -0.4472136, 0.4472136, 1.3416408])


def test_reward_affine_normalises_and_keeps_every_preference() -> None:
    scores = 5.0 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) - 40.0
    gain, bias = reward_affine(scores.flatten())
    normal = gain * scores + bias
    assert gain.dtype == torch.float32 and float(gain) > 0
    close(normal.mean(), 0.0, 1e-5)
    close(normal.var(correction=0), 1.0, 1e-5)
    assert torch.equal(normal[:, 0] > normal[:, 1], scores[:, 0] > scores[:, 1])


@pytest.mark.parametrize("scores", [[3.0, 3.0, 3.0], [1.0, math.nan], [1.0, math.inf], [1000.0, 1000.0], [5.0]])
def test_scores_that_cannot_be_normalised_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot normalise scores"):
        reward_affine(tensor(scores))


# --- the penalty for a missing EOS -----------------------------------------------------------------------------------


def test_missing_eos_penalty_is_subtracted() -> None:
    scores, has_eos = tensor([0.5, 0.5, -3.0]), tensor([True, False, False])
    penalised = penalise_missing_eos(scores, has_eos, 1.0)
    close(penalised, [0.5, -0.5, -4.0])  # replacement by -1 would raise the last one
    assert bool((penalised[~has_eos] < scores[~has_eos]).all())
    close(penalise_missing_eos(scores, has_eos, 0.0), scores)
    with pytest.raises(ValueError, match="must not be negative"):
        penalise_missing_eos(scores, has_eos, -1.0)


# --- KL estimators ---------------------------------------------------------------------------------------------------


def test_kl_estimators_vector() -> None:
    logp, ref = tensor(-1.0), tensor(-1.5)
    close(kl_k1(logp, ref), 0.5)
    close(kl_k2(logp, ref), 0.125)
    close(kl_k3(logp, ref), 0.1065307)
    close(kl_k3(ref, logp), 0.1487213)  # the wrong direction


@pytest.mark.parametrize(
    ("policy", "reference", "kl", "k2", "wrong"),
    [
        ((0.7, 0.3), (0.5, 0.5), 0.0822829, 0.0787662, 0.0777171),
        ((0.99, 0.01), (0.01, 0.99), 4.503217, 10.5576, 92.5069),
    ],
)
def test_expectations_of_the_kl_estimators(policy: tuple, reference: tuple, kl: float, k2: float, wrong: float) -> None:
    p, q = tensor(policy, dtype=torch.float64), tensor(reference, dtype=torch.float64)
    close((p * kl_k1(p.log(), q.log())).sum(), kl, 1e-6)
    close((p * kl_k3(p.log(), q.log())).sum(), kl, 1e-6)
    close((p * kl_k2(p.log(), q.log())).sum(), k2, 1e-4)
    inverted = (p * kl_k3(q.log(), p.log())).sum()
    close(inverted, wrong, 1e-4)
    close(inverted, float((p * p / q).sum() - 1) - kl, 1e-5)  # chi^2 - KL


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased_for_any_two_distributions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp, ref = torch.log_softmax(2 * torch.randn(2, 12, generator=generator, dtype=torch.float64), dim=-1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logp), torch.distributions.Categorical(logits=ref)
    )
    close((logp.exp() * kl_k1(logp, ref)).sum(), kl, 1e-12)
    close((logp.exp() * kl_k3(logp, ref)).sum(), kl, 1e-12)
    assert bool((kl_k3(logp, ref) >= 0).all())


def test_k3_is_exact_near_zero_and_finite_far_out() -> None:
    x = tensor([0.0, 1e-4, -1e-4])
    close(kl_k3(x, torch.zeros(3)), [0.0, 5e-9, 5e-9], 1e-11)  # exp(-x) - 1 in float32 would lose it
    far = kl_k3(tensor([-500.0, 500.0]), torch.zeros(2))
    assert bool(torch.isfinite(far).all())
    close(far[1], 19.0, 1e-4)


def test_kl_of_a_policy_with_itself_is_exactly_zero() -> None:
    logp = -5 * torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert bool((estimator(logp, logp) == 0).all())
    assert float(approx_kl_sum(logp, logp, response_mask(tensor([4, 1, 2]), 4))) == 0.0


def test_sequence_kl_sums_over_the_response_only() -> None:
    logp, ref = tensor([[-1.0, -2.0, -1.0, 1e3]]), tensor([[-1.5, -1.0, -3.0, -1e3]])
    mask = response_mask(tensor([3]), 4)
    assert masked_sum(kl_k1(logp, ref), mask, dim=-1).tolist() == [1.5]
    close(masked_mean(kl_k1(logp, ref), mask), 0.5)
    close(approx_kl_sum(logp, ref, mask), 0.5 * (0.25 + 1.0 + 4.0))


# --- KL coefficient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "beta"), [(9.0, 0.202048), (6.3, 0.200512), (6.0, 0.2), (3.0, 0.197952), (0.0, 0.197952)]
)
def test_adaptive_kl_coefficient_vector(kl: float, beta: float) -> None:
    assert adaptive_kl_coef(0.2, kl, target=6.0, n=512, horizon=10_000) == pytest.approx(beta, abs=1e-9)


def test_adaptive_kl_coefficient_depends_on_episodes_and_not_on_how_they_are_cut() -> None:
    once = adaptive_kl_coef(0.2, 12.0, 6.0, n=512)
    often = 0.2
    for _ in range(8):
        often = adaptive_kl_coef(often, 12.0, 6.0, n=64)
    assert once == pytest.approx(often, rel=1e-4)
    assert adaptive_kl_coef(0.2, -3.0, 6.0, n=512) > 0


# --- the reward of a token -------------------------------------------------------------------------------------------


def test_score_lands_on_the_eos() -> None:
    n = tensor([3])  # of [11, 12, EOS, 13, 14]
    rewards = per_token_rewards(tensor([7.0]), torch.zeros(1, 5), torch.zeros(1, 5), n, beta=0.1)
    assert rewards.tolist() == [[0.0, 0.0, 7.0, 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_per_token_rewards_match_loops(seed: int) -> None:
    rng = random.Random(seed)
    rows, width, beta = rng.randint(1, 5), rng.randint(1, 6), rng.random()
    n = [1, width] + [rng.randint(1, width) for _ in range(rows)]
    rows = len(n)
    score = [rng.gauss(0, 1) for _ in range(rows)]
    logp, ref = ([[rng.gauss(-2, 1) for _ in range(width)] for _ in range(rows)] for _ in range(2))
    rewards = per_token_rewards(*(tensor(x, dtype=torch.float64) for x in (score, logp, ref)), n=tensor(n), beta=beta)
    for b in range(rows):
        kl = [logp[b][t] - ref[b][t] if t < n[b] else 0.0 for t in range(width)]
        expected = [-beta * x for x in kl]
        expected[n[b] - 1] += score[b]
        assert rewards[b].tolist() == pytest.approx(expected, abs=1e-12)
        assert float(rewards[b].sum()) == pytest.approx(score[b] - beta * sum(kl), abs=1e-12)
        differs = [abs(float(rewards[b, t]) + beta * kl[t]) > 1e-9 for t in range(width)]
        assert sum(differs) == 1 and differs[n[b] - 1]


@pytest.mark.parametrize("garbage", [1e3, math.inf, math.nan])
def test_per_token_rewards_ignore_what_follows_the_eos_and_carry_no_gradient(garbage: float) -> None:
    logp = tensor([[-1.0, -2.0, garbage]], requires_grad=True)
    score = tensor([1.0], requires_grad=True)
    rewards = per_token_rewards(score, logp, tensor([[-1.5, -2.0, -garbage]]), tensor([2]), beta=0.1)
    assert not rewards.requires_grad
    close(rewards, [[-0.05, 1.0, 0.0]])


@pytest.mark.parametrize("n", [[0, 2], [2, 4]])
def test_lengths_out_of_range_are_refused(n: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and 3 tokens"):  # column -1 would quietly be the last one
        per_token_rewards(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3), tensor(n), beta=0.1)
