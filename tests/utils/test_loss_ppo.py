"""GAE, the clipped losses and their statistics, and what holds between them.

Shapes: B rows, T response, V vocabulary.
"""

import math
import random

import pytest
import torch
from plain_formulas import gather_logprobs
from torch import Tensor, tensor

from training.ppo_metrics import explained_variance
from utils.loss import (
    PolicyStats,
    ValueStats,
    gae,
    kl_k1,
    kl_k3,
    kl_stop_reached,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    per_token_rewards,
    policy_loss,
    response_mask,
    value_loss,
)


def close(actual: Tensor, expected: Tensor | list | float, tol: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=tol)


def random_case(seed: int) -> tuple[random.Random, Tensor, Tensor]:
    """A random generator, lengths n [B] and the mask [B, T]; one row of length 1 and one of full length."""
    rng = random.Random(seed)
    width = rng.randint(2, 8)
    n = tensor([1, width] + [rng.randint(1, width) for _ in range(rng.randint(0, 4))])
    return rng, n, response_mask(n, width)


def gaussians(rng: random.Random, mask: Tensor, scale: float = 1.0) -> Tensor:
    values = [[rng.gauss(0, scale) for _ in range(mask.shape[1])] for _ in range(mask.shape[0])]
    return tensor(values, dtype=torch.float64)


# --- GAE -------------------------------------------------------------------------------------------------------------

REWARDS = tensor([[-0.02, 0.01, -0.03, 0.98]])
VALUES = tensor([[0.5, 0.4, 0.6, 0.8]])
FULL = torch.ones(1, 4, dtype=torch.bool)


def gae_by_loops(r: list, v: list, n: int, gamma: float, lam: float) -> list[float]:
    """The definition, sum over l of (gamma lam)^l delta_{t+l}, without a recursion."""
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)] + [0.0] * (len(r) - n)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.95, [0.387252, 0.533950, 0.341, 0.18]),
        (1.0, [0.44, 0.56, 0.35, 0.18]),
        (0.0, [-0.12, 0.21, 0.17, 0.18]),
    ],
)
def test_gae_vector(lam: float, expected: list[float]) -> None:
    advantages, returns = gae(REWARDS, VALUES, FULL, 1.0, lam)
    close(advantages, [expected])
    close(returns, tensor([expected]) + VALUES)
    if lam == 0.95:
        close(returns, [[0.887252, 0.933950, 0.941, 0.98]])


def test_gae_does_not_read_past_the_last_token() -> None:
    rewards, values = tensor([[-0.02, 0.99, 0.0, 0.0]]), tensor([[0.5, 0.4, 9.0, 9.0]])
    advantages, returns = gae(rewards, values, response_mask(tensor([2]), 4), 1.0, 0.95)
    close(advantages, [[0.4405, 0.59, 0, 0]])
    close(returns, [[0.9405, 0.99, 0, 0]])
    unmasked, _ = gae(rewards, values, FULL, 1.0, 0.95)
    close(unmasked, [[1.274125, 1.4675, -8.55, -9.0]])  # the bug


def test_gae_with_the_score_on_a_virtual_step_after_the_eos() -> None:
    """How TRL places the score: one step later, with a value of its own, hence one factor of lambda more."""
    advantages, _ = gae(tensor([[-0.02, -0.01, 1.0]]), tensor([[0.5, 0.4, 0.9]]), FULL[:, :3], 1.0, 0.95)
    close(advantages, [[0.43575, 0.585, 0.1]])


@pytest.mark.parametrize("seed", range(12))
def test_gae_matches_the_definition(seed: int) -> None:
    rng, n, mask = random_case(seed)
    rewards, values = gaussians(rng, mask), gaussians(rng, mask)
    gamma, lam = rng.choice([1.0, 0.99, 0.5]), rng.choice([0.0, 0.5, 0.95, 1.0])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    single, _ = gae(rewards.float(), values.float(), mask, gamma, lam)
    for b in range(len(n)):
        expected = gae_by_loops(rewards[b].tolist(), values[b].tolist(), int(n[b]), gamma, lam)
        close(advantages[b], expected, 1e-12)
        close(single[b].double(), expected, 1e-5)
    close(returns[mask], (advantages + values)[mask], 1e-12)
    assert bool((returns[~mask] == 0).all()) and bool((advantages[~mask] == 0).all())


def test_returns_at_lambda_1_are_the_reward_to_go_whatever_the_values() -> None:
    rng, _, mask = random_case(3)
    rewards = gaussians(rng, mask).where(mask, 0.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    for _ in range(3):
        _, returns = gae(rewards, gaussians(rng, mask, 5.0), mask, 1.0, 1.0)
        close(returns[mask], to_go[mask], 1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_perfect_critic_leaves_no_advantage(gamma: float, lam: float) -> None:
    rng, n, mask = random_case(4)
    rewards = gaussians(rng, mask)
    values = torch.zeros_like(rewards)
    for b in range(len(n)):
        for t in range(int(n[b])):
            values[b, t] = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, int(n[b])))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    close(advantages, torch.zeros_like(advantages), 1e-12)
    close(returns, values, 1e-12)


def test_a_zero_critic_makes_returns_equal_to_advantages() -> None:
    advantages, returns = gae(REWARDS, torch.zeros(1, 4), FULL, 1.0, 0.95)
    assert torch.equal(advantages, returns)


def test_gae_refuses_a_mask_with_a_hole() -> None:
    with pytest.raises(ValueError, match="prefix"):
        gae(REWARDS, VALUES, tensor([[True, False, True, True]]), 1.0, 0.95)
    with pytest.raises(ValueError, match="prefix"):
        gae(REWARDS, VALUES, tensor([[False, True, True, True]]), 1.0, 0.95)


# --- policy loss -----------------------------------------------------------------------------------------------------

ONE = tensor([[True]])


def policy_loss_by_loops(new: Tensor, old: Tensor, adv: Tensor, mask: Tensor, eps: float) -> dict[str, float]:
    """Sums over tokens, one token after the other."""
    sums = dict.fromkeys(("loss", "clipped", "kl", "ratio", "ratio_sq"), 0.0)
    for b, t in mask.nonzero().tolist():
        log_ratio, a = float(new[b, t] - old[b, t]), float(adv[b, t])
        ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
        plain, cut = -a * ratio, -a * min(max(ratio, 1 - eps), 1 + eps)
        sums["loss"] += max(plain, cut)
        sums["clipped"] += cut > plain
        sums["kl"] += 0.5 * log_ratio**2
        sums["ratio"] += ratio
        sums["ratio_sq"] += ratio**2
    return sums


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.2, 0.0, 1.0),
        (1.0, 0.5, -0.5, -0.5, 0.0),
        (-1.0, 1.5, 1.5, 1.5, 0.0),
        (-1.0, 0.5, 0.8, 0.0, 1.0),
        (1.0, 1.0, -1.0, -1.0, 0.0),
        (-2.0, 1.0, 2.0, 2.0, 0.0),
    ],
)
def test_policy_loss_vector(advantage: float, ratio: float, loss: float, gradient: float, clipped: float) -> None:
    new = tensor([[math.log(ratio)]], requires_grad=True)
    result = policy_loss(new, torch.zeros(1, 1), tensor([[advantage]]), ONE, 0.2, denom=1)
    result.loss.backward()
    close(result.loss.detach(), loss)
    close(new.grad, gradient)  # d loss / d log pi = -A * ratio where the clip does not act
    close(result.ratio, ratio)
    close(result.stats.means()["clipfrac"], clipped)


@pytest.mark.parametrize("seed", range(8))
def test_policy_loss_matches_loops(seed: int) -> None:
    rng, n, mask = random_case(seed)
    new, old, adv = gaussians(rng, mask, 0.4), gaussians(rng, mask, 0.4), gaussians(rng, mask)
    result = policy_loss(new, old, adv, mask, 0.2, denom=mask.sum())
    sums, tokens = policy_loss_by_loops(new, old, adv, mask, 0.2), int(n.sum())
    means = result.stats.means()
    close(result.loss, sums["loss"] / tokens, 1e-12)
    close(means["loss"], sums["loss"] / tokens, 1e-12)
    close(means["clipfrac"], sums["clipped"] / tokens, 1e-12)
    close(means["approx_kl"], sums["kl"] / tokens, 1e-12)
    close(means["ratio_mean"], sums["ratio"] / tokens, 1e-12)
    close(means["ratio_var"], sums["ratio_sq"] / tokens - (sums["ratio"] / tokens) ** 2, 1e-10)
    ratios = (new - old).exp()[mask]
    close(means["ratio_max"], ratios.max(), 1e-12)
    close(means["ratio_drift"], (ratios - 1).abs().max(), 1e-12)
    assert bool((result.ratio[~mask] == 1).all())


def test_policy_loss_gradient_is_exact_and_reaches_the_new_policy_alone() -> None:
    rng, _, mask = random_case(1)
    new, old, adv = (gaussians(rng, mask, 0.4).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, adv, mask, 0.2, 7.0).loss, new)
    result = policy_loss(new, old, adv, mask, 0.2, denom=7.0)
    result.loss.backward()
    assert old.grad is None and adv.grad is None
    assert not result.ratio.requires_grad and not result.stats.sums.requires_grad


def test_gradient_at_ratio_1_is_that_of_reinforce() -> None:
    rng, _, mask = random_case(2)
    logits = torch.randn(*mask.shape, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.randint(0, 6, mask.shape, generator=torch.Generator().manual_seed(1))
    adv = gaussians(rng, mask)
    logits.requires_grad_()
    logp = gather_logprobs(logits, tokens, 0.7, mask)
    (ppo,) = torch.autograd.grad(policy_loss(logp, logp.detach(), adv, mask, 0.2, mask.sum()).loss, logits)
    logp = gather_logprobs(logits, tokens, 0.7)
    (reinforce,) = torch.autograd.grad(-(adv * logp)[mask].mean(), logits)
    close(ppo, reinforce, 1e-12)


def test_an_absurd_log_ratio_stays_finite() -> None:
    new = tensor([[800.0, -800.0]], requires_grad=True)
    result = policy_loss(new, torch.zeros(1, 2), tensor([[-1.0, -1.0]]), FULL[:, :2], 0.2, denom=2)
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach())) and bool(torch.isfinite(new.grad).all())
    assert all(math.isfinite(float(value)) for value in result.stats.means().values())


def test_an_infinite_clip_range_is_the_plain_surrogate() -> None:
    rng, _, mask = random_case(5)
    new, old, adv = gaussians(rng, mask), gaussians(rng, mask), gaussians(rng, mask)
    result = policy_loss(new, old, adv, mask, math.inf, denom=1)
    close(result.loss, -((new - old).exp() * adv)[mask].sum(), 1e-9)
    assert float(result.stats.means()["clipfrac"]) == 0.0


# --- value loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "target", "loss", "gradient"),
    [(1.0, 2.0, 1.5, 0.125, 0.5), (1.0, 1.5, 2.0, 0.32, 0.0), (1.0, 1.1, 2.0, 0.405, -0.9)],
)
def test_value_loss_vector(old: float, new: float, target: float, loss: float, gradient: float) -> None:
    values = tensor([[new]], requires_grad=True)
    result = value_loss(values, tensor([[old]]), tensor([[target]]), ONE, 0.2, denom=1)
    result.loss.backward()
    close(result.loss.detach(), loss)
    close(values.grad, gradient)
    close(result.stats.means()["clipfrac"], float(gradient == 0.0))


@pytest.mark.parametrize("seed", range(8))
def test_value_loss_matches_loops(seed: int) -> None:
    rng, n, mask = random_case(seed)
    values, old, returns = gaussians(rng, mask, 0.5), gaussians(rng, mask, 0.5), gaussians(rng, mask)
    total, clipped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        v, o, r = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        near = min(max(v, o - 0.2), o + 0.2)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        clipped += (near - r) ** 2 > (v - r) ** 2
    tokens = int(n.sum())
    result = value_loss(values, old, returns, mask, 0.2, denom=tokens)
    means = result.stats.means()
    close(result.loss, total / tokens, 1e-12)
    close(means["loss"], total / tokens, 1e-12)
    close(means["clipfrac"], clipped / tokens, 1e-12)
    close(means["value_mean"], values[mask].mean(), 1e-12)
    close(means["return_mean"], returns[mask].mean(), 1e-12)
    close(means["value_drift"], (values - old).abs()[mask].max(), 1e-12)


def test_value_loss_gradient_is_exact_and_reaches_the_critic_alone() -> None:
    rng, _, mask = random_case(1)
    values, old, returns = (gaussians(rng, mask, 0.5).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask, 0.2, 7.0).loss, values)
    value_loss(values, old, returns, mask, 0.2, denom=7.0).loss.backward()
    assert old.grad is None and returns.grad is None


def test_an_infinite_value_clip_is_half_the_squared_error() -> None:
    rng, _, mask = random_case(5)
    values, old, returns = gaussians(rng, mask), gaussians(rng, mask), gaussians(rng, mask)
    loss = value_loss(values, old, returns, mask, math.inf, denom=mask.sum()).loss
    close(loss, 0.5 * (values - returns)[mask].square().mean(), 1e-12)


def test_with_a_network_of_its_own_and_adam_vf_coef_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    features, returns = torch.randn(6, 4, 3, generator=generator).double(), torch.randn(6, 4, generator=generator)
    mask = response_mask(tensor([4, 1, 2, 3, 4, 2]), 4)
    deltas = []
    for vf_coef in (0.1, 1.0):
        critic = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([critic], lr=1e-2, eps=1e-30)
        for _ in range(5):
            optimizer.zero_grad()
            values = features @ critic
            (vf_coef * value_loss(values, torch.zeros_like(values), returns, mask, 0.2, mask.sum()).loss).backward()
            optimizer.step()
        deltas.append(critic.detach())
    close(deltas[1], deltas[0], 1e-9)


# --- masks, micro-batches, first minibatch ---------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [1e3, -1e3, math.inf, math.nan])
def test_what_follows_the_eos_changes_no_loss_statistic_or_gradient(garbage: float) -> None:
    rng, n, mask = random_case(7)
    clean = [gaussians(rng, mask, 0.5) for _ in range(6)]
    assert not bool(mask.all())

    def everything(fill: float | None) -> list[Tensor]:
        filled = [x if fill is None else torch.where(mask, x, fill) for x in clean]
        new, ref, old, values, old_values, noise = filled
        new, values = new.clone().requires_grad_(), values.clone().requires_grad_()
        rewards = per_token_rewards(torch.ones(len(n)).double(), old, ref, n, 0.1)
        advantages, returns = gae(torch.where(mask, rewards, noise), old_values, mask, 1.0, 0.95)
        white = masked_whiten(torch.where(mask, advantages, noise), mask)
        policy = policy_loss(new, old, torch.where(mask, white, noise), mask, 0.2, mask.sum())
        value = value_loss(values, old_values, torch.where(mask, returns, noise), mask, 0.2, mask.sum())
        (policy.loss + value.loss).backward()
        return [
            rewards, advantages, returns, white, policy.loss.detach(), policy.ratio, policy.stats.sums,
            policy.stats.maxima, value.loss.detach(), value.stats.sums, value.stats.maxima, new.grad, values.grad,
            masked_sum(kl_k1(old, ref), mask, dim=-1), masked_mean(kl_k3(old, ref), mask), masked_sum(-old, mask),
            *explained_variance(old_values, torch.where(mask, returns, noise), mask),
        ]  # fmt: skip

    for before, after in zip(everything(None), everything(garbage), strict=True):
        assert torch.equal(before, after)
        assert bool(torch.isfinite(after).all())


def test_padding_columns_change_nothing() -> None:
    rng, n, mask = random_case(6)
    new, old, adv = gaussians(rng, mask, 0.3), gaussians(rng, mask, 0.3), gaussians(rng, mask)
    wide = [torch.nn.functional.pad(x, (0, 9), value=3.0) for x in (new, old, adv)]
    wide_mask = response_mask(n, mask.shape[1] + 9)
    narrow = policy_loss(new, old, adv, mask, 0.2, mask.sum())
    padded = policy_loss(*wide, wide_mask, 0.2, wide_mask.sum())
    close(padded.loss, narrow.loss, 1e-12)
    close(padded.stats.sums, narrow.stats.sums, 1e-12)


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [2, 2], [3, 1]])
def test_micro_batches_add_up_to_the_minibatch(sizes: list[int]) -> None:
    """Losses, statistics and the parameters after a step are the same however the minibatch is cut."""
    generator = torch.Generator().manual_seed(0)
    mask = response_mask(tensor([5, 1, 3, 2]), 5)
    features = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 6, (4, 5), generator=generator)
    old = -2.0 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    adv, returns, old_values = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)

    def step(sizes: list[int]) -> tuple[Tensor, PolicyStats, ValueStats]:
        actor = torch.full((3, 6), 0.1, dtype=torch.float64).cumsum(1).requires_grad_()
        critic = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([actor, critic], lr=0.1)
        policy_stats, value_stats = [], []
        for part in torch.arange(4).split(sizes):
            logp = gather_logprobs(features[part] @ actor, tokens[part], 0.7, mask[part])
            policy = policy_loss(logp, old[part], adv[part], mask[part], 0.2, mask.sum())
            value = value_loss(features[part] @ critic, old_values[part], returns[part], mask[part], 0.2, mask.sum())
            (policy.loss + 0.1 * value.loss).backward()
            policy_stats.append(policy.stats)
            value_stats.append(value.stats)
        optimizer.step()
        total_policy, total_value = policy_stats[0], value_stats[0]
        for p, v in zip(policy_stats[1:], value_stats[1:], strict=True):
            total_policy, total_value = total_policy + p, total_value + v
        return torch.cat([actor.detach().flatten(), critic.detach()]), total_policy, total_value

    parameters, policy, value = step(sizes)
    expected_parameters, expected_policy, expected_value = step([4])
    close(parameters, expected_parameters, 1e-12)
    for key, expected in expected_policy.means().items():
        close(policy.means()[key], expected, 1e-12)
    for key, expected in expected_value.means().items():
        close(value.means()[key], expected, 1e-12)
    assert int(policy.sums[0]) == int(value.sums[0]) == int(mask.sum())


def test_ratio_statistics_are_not_diluted() -> None:
    """At ratio 1 the mean is 1 with any number of micro-batches, not 1 / their number."""
    mask = response_mask(tensor([4, 1]), 4)
    logp = torch.full((2, 4), -1.3)
    stats = policy_loss(logp, logp, torch.ones(2, 4), mask, 0.2, 5).stats
    means = (stats + stats + stats + stats).means()
    assert float(means["ratio_mean"]) == 1.0
    assert float(means["ratio_var"]) == float(means["ratio_drift"]) == 0.0


def test_maxima_are_those_of_all_micro_batches() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    low, high = (
        (policy_loss(x, torch.zeros(1, 1), x, mask, 0.2, 1).stats, value_loss(x, -x, x, mask, 0.2, 1).stats)
        for x in (tensor([[-0.1]]), tensor([[0.7]]))
    )
    for first, second in ((low, high), (high, low)):
        policy, value = ((a + b).means() for a, b in zip(first, second, strict=True))
        close(policy["ratio_max"], math.exp(0.7))
        close(policy["ratio_drift"], math.exp(0.7) - 1)
        close(value["value_drift"], 1.4)


def test_small_ratio_variances_survive_float32() -> None:
    log_ratio = 1e-3 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    stats = policy_loss(log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), mask, 0.2, 1).stats
    exact = float(masked_var(log_ratio.double().exp(), mask))
    assert float(stats.means()["ratio_var"]) == pytest.approx(exact, rel=1e-3)


def test_losses_are_token_means() -> None:
    """Token losses [1, 1, 1, 1] and [5] make 1.8; the mean of the rows' means would be 3.0."""
    mask = response_mask(tensor([4, 1]), 4)
    adv = torch.where(mask, -torch.tensor([[1.0], [5.0]]), 0.0)
    logp = torch.zeros(2, 4)
    close(policy_loss(logp, logp, adv, mask, 0.2, mask.sum()).loss, 1.8)
    errors = (2 * adv.abs()).sqrt()
    close(value_loss(errors, errors, torch.zeros(2, 4), mask, 0.2, mask.sum()).loss, 1.8)


def test_before_the_first_step_nothing_has_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = response_mask(tensor([6, 1, 3, 4]), 6)
    logp, values = -5 * torch.rand(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    white = masked_whiten(torch.randn(4, 6, generator=generator), mask)
    policy = policy_loss(logp.clone().requires_grad_(), logp, white, mask, 0.2, mask.sum())
    means = policy.stats.means()
    assert bool((policy.ratio == 1).all())
    assert float(means["ratio_drift"]) == float(means["approx_kl"]) == float(means["clipfrac"]) == 0.0
    close(policy.loss.detach(), -masked_mean(white, mask))
    close(policy.loss.detach(), 0.0)
    value = value_loss(values, values, torch.randn(4, 6, generator=generator), mask, 0.2, mask.sum())
    assert float(value.stats.means()["value_drift"]) == float(value.stats.means()["clipfrac"]) == 0.0


def test_half_precision_input_is_computed_in_float32() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    half = tensor([[-1.0, -2.0, -3.0]], dtype=torch.bfloat16)
    policy, value = policy_loss(half, half, half, mask, 0.2, 3), value_loss(half, half, half, mask, 0.2, 3)
    advantages, returns = gae(half, half, mask, 1.0, 0.95)
    rewards = per_token_rewards(half[:, 0], half, half, tensor([3]), 0.1)
    for x in (policy.loss, policy.ratio, policy.stats.sums, value.loss, value.stats.sums, advantages, returns, rewards):
        assert x.dtype == torch.float32


# --- early stop -------------------------------------------------------------------------------------------------------


def test_a_spike_of_the_ratio_stops_the_epochs() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    quiet, spike = torch.full((1, 4), 0.1), tensor([[0.1, 0.1, 0.1, 0.9]])
    kls = [float(policy_loss(x, torch.zeros(1, 4), x, mask, 0.2, 4).stats.means()["approx_kl"]) for x in (quiet, spike)]
    assert kls == pytest.approx([0.005, (3 * 0.005 + 0.405) / 4])
    assert [kl_stop_reached(kl, 0.02) for kl in kls] == [False, True]
    assert not kl_stop_reached(0.03, 0.02) and kl_stop_reached(0.0301, 0.02)  # the threshold is 1.5 * kl_stop
    assert not kl_stop_reached(1e9, None)
