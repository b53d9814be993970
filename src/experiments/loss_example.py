"""The losses on an example small enough to check by hand: every number comes from utils/loss.py.

Shapes: B = 1 row, T = 4 response tokens, K = 3 completions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils import loss

SCORES = torch.tensor([[2.0, 1.0, 0.0]])
"""[1, K] of three answers to one prompt, ranked best first."""
SCORE, BETA, GAMMA, LAMBDA, EPS = 1.0, 0.05, 1.0, 0.95, 0.2
LOGP = torch.tensor([[-0.9, -1.6, -0.5, -0.2]])
"""[1, T] log-probabilities of a sampled answer under the policy; the last token is the EOS."""
LOGP_REF = torch.tensor([[-1.3, -1.4, -1.1, -0.6]])
"""[1, T] under the reference."""
VALUES = torch.tensor([[0.5, 0.4, 0.6, 0.8]])
"""[1, T] of the critic, before each token."""
LOGP_NEW = torch.tensor([[-0.92, -1.3, -0.55, -0.6]])
"""[1, T] of the policy some optimizer steps later."""
VALUES_NEW = torch.tensor([[0.6, 0.7, 0.65, 1.2]])
"""[1, T] of the critic some optimizer steps later."""


def loss_example() -> list[str]:
    """The worked example as lines of text."""
    mask = torch.ones_like(LOGP, dtype=torch.bool)
    kl = loss.kl_k1(LOGP, LOGP_REF)
    rewards = loss.per_token_rewards(torch.tensor([SCORE]), LOGP, LOGP_REF, mask.sum(1), BETA)
    advantages, returns = loss.gae(rewards, VALUES, mask, GAMMA, LAMBDA)
    white = loss.masked_whiten(advantages, mask)
    following = torch.cat([VALUES[:, 1:], torch.zeros(1, 1)], dim=1)
    rollout = {
        "log pi": LOGP, "log ref": LOGP_REF, "kl": kl, "reward": rewards, "V": VALUES,
        "delta": rewards + GAMMA * following - VALUES, "A": advantages, "A white": white, "R = A + V": returns,
    }  # fmt: skip
    return [
        *_ranking(),
        "",
        f"Rollout: four tokens, the last one EOS; score {SCORE}, beta {BETA}, gamma {GAMMA}, lambda {LAMBDA}",
        "  reward = -beta * kl, and the score on the EOS; delta = reward + V of the next state (0 after the EOS) - V",
        "  A = delta + gamma * lambda * A of the next token; white: mean 0 and variance 1 over the rollout batch",
        *_table(rollout),
        f"  the rewards sum to score - beta * KL = {SCORE} - {BETA} * {kl.sum():.2f} = {rewards.sum():.4f}",
        "",
        *_update(white, returns),
    ]


def _ranking() -> list[str]:
    scores = ", ".join(f"{score:.2f}" for score in SCORES[0].tolist())
    lines = [f"Reward model: three answers ranked best first, scores {scores}"]
    mask = torch.ones_like(SCORES, dtype=torch.bool)
    for i, j in loss.preference_pairs(mask)[0].nonzero().tolist():
        pair = SCORES[:, [i, j]]
        of_pair = float(loss.ranking_loss(pair, torch.ones_like(pair, dtype=torch.bool)))
        lines.append(f"  {i + 1} over {j + 1}: -log sigmoid({float(pair[0, 0] - pair[0, 1]):.2f}) = {of_pair:.4f}")
    total = float(loss.ranking_loss(SCORES, mask))
    return [*lines, f"  ranking loss, the mean of the pairs: {total:.4f} (all scores equal: ln 2 = {math.log(2):.4f})"]


def _update(white: Tensor, returns: Tensor) -> list[str]:
    """The losses of the update, token by token and over all; white: whitened advantages, [1, T] like returns."""

    def losses(at: slice) -> tuple[loss.PolicyLoss, loss.ValueLoss]:
        mask = torch.ones_like(LOGP[:, at], dtype=torch.bool)
        policy = loss.policy_loss(LOGP_NEW[:, at], LOGP[:, at], white[:, at], mask, EPS, mask.sum())
        return policy, loss.value_loss(VALUES_NEW[:, at], VALUES[:, at], returns[:, at], mask, EPS, mask.sum())

    policy, value = losses(slice(None))
    means = policy.stats.means()
    policies, values = zip(*(losses(slice(t, t + 1)) for t in range(LOGP.shape[1])))
    columns = {
        "new log pi": LOGP_NEW, "ratio": policy.ratio, "A white": white,
        "policy": torch.stack([token.loss for token in policies])[None],
        "clipped": torch.tensor([[float(token.stats.means()["clipfrac"]) for token in policies]]),
        "new V": VALUES_NEW, "R": returns, "value": torch.stack([token.loss for token in values])[None],
    }  # fmt: skip
    return [
        f"Update: the same tokens some steps later, clip {EPS}",
        "  policy = max(-A * ratio, -A * clip(ratio)); value = 1/2 max((V - R)^2, (clip(V, old V) - R)^2)",
        *_table(columns),
        f"  policy loss {float(policy.loss):.4f}, clip fraction {float(means['clipfrac']):.2f}, approximate KL "
        f"{float(means['approx_kl']):.4f}; value loss {float(value.loss):.4f}: means over the tokens",
    ]


def _table(columns: dict[str, Tensor]) -> list[str]:
    widths = [max(9, len(name)) for name in columns]
    lines = ["  token" + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths))]
    for t, row in enumerate(torch.cat(list(columns.values())).T.tolist()):
        lines.append(f"  {t:>5}" + "".join(f"  {value:>{width}.4f}" for value, width in zip(row, widths)))
    return lines
