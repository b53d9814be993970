"""Every formula of reward modelling and PPO as a pure function: tensors in, tensors out.

The loss of supervised fine-tuning is `models.vocabulary.token_loss_sum`: it is made where the logits are.

Shapes
    B  rows of a batch              L  columns of a row (prompt + response)
    T  columns of the response      V  vocabulary
    K  completions of one prompt

Conventions
    * A mask is a bool tensor of the shape of what it masks; True means "counts". What stands in a masked place has no
      influence on a value or a gradient: it is replaced before it meets a nonlinear function.
    * Every sum and mean goes through `masked_sum`. Losses come back as a sum over tokens divided by a `denom` of the
      caller's, the token count of the whole optimiser step, so that micro-batches and processes add up to the one big
      batch whatever their sizes (a mean of means weights a token by how few neighbours it has).
    * Log-probabilities, KL and entropy are in nats, at the sampling temperature `tau`.
    * Everything is computed in float32; float64 input stays float64.

Response token t of a row is chosen in state t: its log-probability, its value and its reward all stand in column t.
`n` is the number of real response tokens, the EOS included: `t < n` is the response mask and `n - 1` the last action.

References: InstructGPT (Ouyang et al. 2022), PPO (Schulman et al. 2017), GAE (Schulman et al. 2016), "OAI" (Ziegler et
al. 2019 and its code, openai/lm-human-preferences), "TRL" (huggingface/trl), "ORL" (OpenRLHF).
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before `exp`, so that one bad step cannot give inf (ORL loss.py)."""


# ---------------------------------------------------------------------------------------------------------------------
# Masked reductions
# ---------------------------------------------------------------------------------------------------------------------


def _real(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """Return x in float32 with 0 in masked places: `where`, because inf * 0 and nan * 0 are nan."""
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(f"mask must be bool of shape {tuple(x.shape)}, not {mask.dtype} of shape {tuple(mask.shape)}")
    x = _real(x)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of x over the places where mask is True, over all dimensions or over `dim`."""
    return _keep(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x over the places where mask is True, over all dimensions or over `dim`; 0 where nothing counts."""
    return masked_sum(x, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance (division by the count) of x over the places where mask is True; 0 where nothing counts."""
    return masked_mean((_keep(x, mask) - masked_mean(x, mask)).square(), mask)


class Moments(NamedTuple):
    """Sums that make a mean and a variance, and that may be added over micro-batches and processes.

    `Moments(*all_reduce(torch.stack(moments)))` turns the moments of one process into those of all.
    """

    count: Tensor
    """[] number of places that count."""
    total: Tensor
    """[] sum of x."""
    total_sq: Tensor
    """[] sum of x squared."""

    @property
    def mean(self) -> Tensor:
        """Mean of x; 0 for an empty set."""
        return self.total / self.count.clamp(min=1)

    @property
    def var(self) -> Tensor:
        """Biased variance of x; 0 for an empty set."""
        return (self.total_sq / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)


def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Count, sum and sum of squares of x under the mask.

    In float64 where the device has it (MPS has not): E[x^2] - E[x]^2 loses half of the digits.
    """
    wide = _keep(x, mask)
    wide = wide if wide.device.type == "mps" else wide.double()
    count = mask.sum().to(wide.dtype)
    return Moments(count, masked_sum(wide, mask), masked_sum(wide.square(), mask))


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, stats: Moments | None = None
) -> Tensor:
    """Return `(x - mean) * rsqrt(var + eps)` with biased variance, masked again (0 where mask is False).

    Args:
        x: [...] for instance the advantages [B, T] of a whole rollout.
        mask: [...] bool, same shape.
        shift_mean: False adds the mean back, so that it stays what it was; meant for rewards.
        eps: added to the variance.
        stats: `Moments` already summed over the processes, so that all whiten alike; None takes those of x itself.

    Source: OAI core.py `whiten`, which is unmasked; zeros of padding would shift the mean and favour one length.
    """
    moments = masked_moments(x, mask) if stats is None else stats
    x = _keep(x, mask)
    mean, var = moments.mean.to(x.dtype), moments.var.to(x.dtype)
    white = (x - mean) * torch.rsqrt(var + eps)
    return _keep(white if shift_mean else white + mean, mask)


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and masks
# ---------------------------------------------------------------------------------------------------------------------


def target_mask(prompt_len: Tensor, length: Tensor, width: int) -> Tensor:
    """Which of the columns `ids[:, 1:]` are a response with its EOS: what supervised fine-tuning aims at, [B, L - 1].

    Training has the same columns as indices (`training.sampling.state_columns`), so that only they are computed.
    Made of lengths and not of `ids != pad`, so that no choice of the pad id can hide the EOS.

    Args:
        prompt_len: [B] tokens of the prompt.
        length: [B] tokens of prompt + response, EOS included.
        width: L, columns of the batch.

    Returns: [B, L - 1] bool; entry j tells whether `logits[:, j]` is trained to predict `ids[:, j + 1]`.
    """
    column = torch.arange(1, width, device=length.device)
    return (prompt_len[:, None] <= column) & (column < length[:, None])


def response_mask(n: Tensor, width: int) -> Tensor:
    """Mask [B, T] of the first n tokens of each row: the EOS counts, what follows it does not."""
    return torch.arange(width, device=n.device) < n[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


def temper(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Return logits / tau in float32: cast first, for dividing bfloat16 logits loses what the cast cannot give back.

    How the sampler takes the temperature; `models.vocabulary` takes it alike for policy, old policy and reference, a
    block of logits at a time (OAI policy.py and sample.py). Raises ValueError for tau <= 0: greedy decoding has no
    log-probabilities.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    return _real(logits) if tau == 1 else _real(logits) / tau


# ---------------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------------


def preference_pairs(mask: Tensor, pair_mask: Tensor | None = None) -> Tensor:
    """Which pairs (i better than j) of each prompt count.

    Args:
        mask: [B, K] bool, which completions exist. They are ranked best first.
        pair_mask: [B, K, K] bool, "i was preferred to j", for partial rankings and ties; takes the place of the rank
            order.

    Returns: [B, K, K] bool.
    """
    both = mask[:, :, None] & mask[:, None, :]
    rank = torch.arange(mask.shape[1], device=mask.device)
    if pair_mask is None:
        return both & (rank[:, None] < rank)
    return both & pair_mask & (rank[:, None] != rank)


def ranking_loss(scores: Tensor, mask: Tensor, pair_mask: Tensor | None = None) -> Tensor:
    """Pairwise ranking loss of each prompt: mean over its pairs of `-log sigmoid(s_i - s_j)`, i better than j.

    InstructGPT eq. 1: the division by C(K, 2), here the number of pairs that count, happens once. `logsigmoid` stays
    finite where log(sigmoid(x)) is -inf with a nan gradient (already at x = -18 in float16).

    Args:
        scores: [B, K] from one forward of B * K rows, best completion first.
        mask: [B, K] bool, which completions exist.
        pair_mask: [B, K, K] bool or None, see `preference_pairs`.

    Returns: [B] nats; 0 for a prompt without a pair. The loss of a step is the sum over all its prompts divided by
    their number.
    """
    scores = _keep(scores, mask)
    difference = scores[:, :, None] - scores[:, None, :]  # (B, K, K) s_i - s_j
    return masked_mean(-F.logsigmoid(difference), preference_pairs(mask, pair_mask), dim=(1, 2))


def reward_affine(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and bias with which `gain * score + bias` has mean 0 and (biased) standard deviation 1 on these scores.

    Args:
        scores: [N] raw scores of responses sampled exactly as PPO will sample them, of all processes together.

    Returns: gain [], bias []. Raises ValueError if a score is not finite or if they are all the same.

    Source: OAI rewards.py `set_reward_norm`.
    """
    moments = masked_moments(scores, torch.ones_like(scores, dtype=torch.bool))
    sd = moments.var.sqrt()
    if not bool(torch.isfinite(sd)) or float(sd) <= 1e-6 * max(1.0, abs(float(moments.mean))):
        raise ValueError(f"cannot normalise scores of mean {float(moments.mean):.6g} and deviation {float(sd):.6g}")
    dtype = _real(scores).dtype
    return sd.reciprocal().to(dtype), (-moments.mean / sd).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# KL to the reference, and the reward of a token
# ---------------------------------------------------------------------------------------------------------------------


def kl_k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimator x = log pi - log pi_ref of KL(pi || pi_ref) on tokens sampled from pi: unbiased, may be negative.

    The penalty in the reward. The KL of a row is `masked_sum(kl_k1(...), mask, dim=-1)`. Source of k1, k2 and k3:
    Schulman, "Approximating KL divergence" (2020).
    """
    return _real(logp) - _real(logp_ref)


def kl_k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimator x^2 / 2: biased, low variance; used for the distance between the new and the old policy."""
    return 0.5 * kl_k1(logp, logp_ref).square()


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimator exp(-x) - 1 + x >= 0: unbiased, low variance. For logging only: its gradient is not that of the KL.

    The sign matters: exp(x) - 1 - x has mean chi^2 - KL under pi, and is close enough near the reference to pass.
    """
    x = kl_k1(logp, logp_ref).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-x) + x


def approx_kl_sum(new_logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Sum over tokens of (log pi_new - log pi_old)^2 / 2; divided by the token count it is policy/approxkl."""
    return masked_sum(kl_k2(new_logp, old_logp), mask)


def adaptive_kl_coef(beta: float, kl_seq: float, target: float, n: int, horizon: float = 10_000) -> float:
    """KL coefficient for the next iteration: `beta * (1 + clip(kl_seq / target - 1, -0.2, 0.2) * n / horizon)`.

    Args:
        beta: coefficient of this iteration.
        kl_seq: KL of this iteration in nats, k1 summed over the response and averaged over rows (not per token).
        target: the KL to aim at, nats per response.
        n: episodes of this iteration, over all processes.
        horizon: episodes in which beta may change by the factor e^0.2.

    Source: Ziegler et al. 2019, section 2.2; OAI train_policy.py `AdaptiveKLController`.
    """
    error = min(max(kl_seq / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * n / horizon)


def penalise_missing_eos(scores: Tensor, has_eos: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` >= 0 (in units of the normalised reward) from the score [B] of every row without EOS.

    Subtraction (TRL), not replacement by -penalty (OAI), which rewards a cut response whenever its score is lower.
    """
    if penalty < 0:
        raise ValueError(f"penalty is subtracted and must not be negative, got {penalty}")
    scores = _real(scores)
    return torch.where(has_eos, scores, scores - penalty)


@torch.no_grad()
def per_token_rewards(scores: Tensor, logp: Tensor, logp_ref: Tensor, n: Tensor, beta: float) -> Tensor:
    """Reward of each response token: `-beta * k1`, plus the score at the last real token.

    Args:
        scores: [B] one score per response, after the penalty for a missing EOS.
        logp: [B, T] log-probabilities of the sampling policy.
        logp_ref: [B, T] those of the reference.
        n: [B] real response tokens, 1 <= n <= T.
        beta: KL coefficient.

    Returns: [B, T] without gradient, 0 from column n on. A row sums to `score - beta * sum_t k1`. Raises ValueError
    if some n is out of range.

    Source: InstructGPT eq. 2, per token as in ORL models/utils.py `compute_reward`.
    """
    rows, width = logp.shape
    if not bool(((n >= 1) & (n <= width)).all()):
        raise ValueError(f"every response needs between 1 and {width} tokens")
    rewards = -beta * _keep(kl_k1(logp, logp_ref), response_mask(n, width))
    rewards[torch.arange(rows, device=n.device), n - 1] += scores.to(rewards.dtype)
    return rewards


# ---------------------------------------------------------------------------------------------------------------------
# PPO
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns.

    `delta_t = r_t + gamma V_{t+1} - V_t` and `A_t = delta_t + gamma lam A_{t+1}`, with V = A = 0 after the last real
    token (GAE, eq. 11 and 16). A response cut at the limit is terminal too, because its score is paid there.

    Args:
        rewards: [B, T] see `per_token_rewards`.
        values: [B, T] V of the state before token t.
        mask: [B, T] bool, True for the first n tokens of a row and for no others; else ValueError.
        gamma: discount, 1 for responses.
        lam: GAE's lambda.

    Returns: advantages [B, T] (not whitened) and returns = advantages + values [B, T]; both 0 where masked.
    """
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask must be a prefix: a value missing in mid-response would be taken as 0")
    rewards, values = _keep(rewards, mask), _keep(values, mask)
    next_values = F.pad(values[:, 1:], (0, 1))  # (B, T) masked values are 0, so the last real token sees 0
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages, _keep(advantages + values, mask)


@dataclass(frozen=True)
class LossStats:
    """Statistics of a loss that add up over micro-batches and processes; no host synchronisation.

    Over processes: `type(s)(all_reduce_sum(s.sums), all_reduce_max(s.maxima))`.
    """

    sums: Tensor
    """Sums over tokens."""
    maxima: Tensor
    """Maxima over tokens."""

    def __add__(self, other: Self) -> Self:
        """Statistics of the tokens of both."""
        return type(self)(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))


class PolicyStats(LossStats):
    """sums [6]: tokens, loss, clipped tokens, dlogp^2 / 2, ratio - 1, (ratio - 1)^2. maxima [2]: ratio, |ratio - 1|."""

    def means(self) -> dict[str, Tensor]:
        """Per-token means and maxima, 0-dim tensors. `ratio_drift` is max |ratio - 1|, 0 before the first step."""
        tokens, loss, clipped, kl, offset, offset_sq = self.sums
        per_token = 1.0 / tokens.clamp(min=1)
        offset = offset * per_token
        return {
            "loss": loss * per_token,
            "clipfrac": clipped * per_token,
            "approx_kl": kl * per_token,
            "ratio_mean": 1.0 + offset,
            "ratio_var": (offset_sq * per_token - offset.square()).clamp(min=0),
            "ratio_max": self.maxima[0],
            "ratio_drift": self.maxima[1],
        }


class PolicyLoss(NamedTuple):
    """What `policy_loss` gives back."""

    loss: Tensor
    """[] sum of token losses / denom; backpropagate this."""
    ratio: Tensor
    """[B, T] pi_new / pi_old without gradient, 1 where masked."""
    stats: PolicyStats
    """Without gradient; to be added over the micro-batches of a minibatch."""


def policy_loss(
    new_logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float, denom: float | Tensor
) -> PolicyLoss:
    """Clipped surrogate loss of a micro-batch: `sum max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)) / denom`.

    PPO eq. 7. The gradient reaches new_logp alone. Beyond a log-ratio of +-20 it is 0.

    Args:
        new_logp: [B, T] of the policy being trained, with gradient.
        old_logp: [B, T] of the policy that sampled, recomputed by the same forward as new_logp.
        advantages: [B, T], whitened over the rollout.
        mask: [B, T] bool.
        clip_eps: half-width of the clip range, 0.2; math.inf switches the clip off.
        denom: number of tokens of the whole minibatch (all micro-batches and processes), not of this micro-batch.
    """
    log_ratio = _keep(new_logp, mask) - _keep(old_logp.detach(), mask)  # 0 where masked, before exp
    advantages = _keep(advantages.detach(), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    total = masked_sum(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        offset = ratio - 1.0
        sums = (
            mask.sum().to(total.dtype),
            total,
            masked_sum(clipped > unclipped, mask),
            approx_kl_sum(log_ratio, torch.zeros_like(log_ratio), mask),
            masked_sum(offset, mask),
            masked_sum(offset.square(), mask),
        )
        maxima = (_keep(ratio, mask).amax(), offset.abs().amax())
        stats = PolicyStats(torch.stack([s.to(total.dtype) for s in sums]), torch.stack(maxima))
    return PolicyLoss(total / denom, ratio.detach(), stats)


class ValueStats(LossStats):
    """sums [5]: tokens, loss, clipped tokens, V, R. maxima [1]: |V - V_old|."""

    def means(self) -> dict[str, Tensor]:
        """Per-token means, 0-dim tensors, and `value_drift` = max |V - V_old|, 0 before the first step."""
        tokens = self.sums[0].clamp(min=1)
        names = ("loss", "clipfrac", "value_mean", "return_mean")
        return {name: s / tokens for name, s in zip(names, self.sums[1:], strict=True)} | {
            "value_drift": self.maxima[0]
        }


class ValueLoss(NamedTuple):
    """What `value_loss` gives back."""

    loss: Tensor
    """[] sum of token losses / denom, without vf_coef; backpropagate vf_coef times this."""
    stats: ValueStats
    """Without gradient; to be added over the micro-batches of a minibatch."""


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float, denom: float | Tensor
) -> ValueLoss:
    """Clipped value loss of a micro-batch: `1/2 sum max((V - R)^2, (clip(V, V_old +- eps) - R)^2) / denom`.

    OAI train_policy.py `loss`: the one half is part of it, and of the two errors the larger counts, so that the clip
    can only hold the critic back.

    Args:
        values: [B, T] of the critic being trained, with gradient.
        old_values: [B, T] of the critic at the rollout.
        returns: [B, T] from `gae`.
        mask: [B, T] bool.
        clip_eps: beyond this distance from its old value a value gets no gradient that leads farther away, in units of
            the normalised reward; math.inf: no clip.
        denom: number of tokens of the whole minibatch.
    """
    values, old_values = _keep(values, mask), _keep(old_values.detach(), mask)
    returns = _keep(returns.detach(), mask)
    error = (values - returns).square()
    clipped_error = (values.clamp(old_values - clip_eps, old_values + clip_eps) - returns).square()
    total = 0.5 * masked_sum(torch.maximum(error, clipped_error), mask)
    with torch.no_grad():
        sums = (
            mask.sum(),
            total,
            masked_sum(clipped_error > error, mask),
            masked_sum(values, mask),
            masked_sum(returns, mask),
        )
        drift = (values - old_values).abs().amax()
        stats = ValueStats(torch.stack([s.to(total.dtype) for s in sums]), drift[None])
    return ValueLoss(total / denom, stats)


def kl_stop_reached(approx_kl: float, kl_stop: float | None) -> bool:
    """Whether the remaining epochs of this rollout should be skipped: approx_kl > 1.5 * kl_stop. None: never.

    After OpenAI Spinning Up, ppo.py `target_kl`, which takes k1 where this takes k2 (`approx_kl_sum`).
    """
    return kl_stop is not None and approx_kl > 1.5 * kl_stop
