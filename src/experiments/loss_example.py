"""The losses on an example small enough to check by hand: every number comes from utils/loss.py.

Shapes: B = 1 row, T = 4 response tokens, K = 3 completions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.loss import (
    gae,
    kl_k1,
    masked_whiten,
    per_token_rewards,
    policy_loss,
    preference_pairs,
    ranking_loss,
    value_loss,
)

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
    return [*_ranking(), "", *_advantages(), "", *_update()]


def _ranking() -> list[str]:
    lines = ["Reward model: three answers ranked best first, scores " + _numbers(SCORES[0])]
    mask = torch.ones_like(SCORES, dtype=torch.bool)
    for i, j in preference_pairs(mask)[0].nonzero().tolist():
        margin = SCORES[:, [i, j]]
        loss = float(ranking_loss(margin, torch.ones_like(margin, dtype=torch.bool)))
        difference = float(margin[0, 0] - margin[0, 1])
        lines.append(f"  {i + 1} over {j + 1}: -log sigmoid({difference:.2f}) = {loss:.4f}")
    total = float(ranking_loss(SCORES, mask))
    return [*lines, f"  ranking loss, the mean of the pairs: {total:.4f} (all scores equal: ln 2 = {math.log(2):.4f})"]


def _rollout() -> dict[str, Tensor]:
    """Everything between a scored rollout and the update, each [1, T]."""
    mask = torch.ones_like(LOGP, dtype=torch.bool)
    kl = kl_k1(LOGP, LOGP_REF)
    rewards = per_token_rewards(torch.tensor([SCORE]), LOGP, LOGP_REF, mask.sum(1), BETA)
    advantages, returns = gae(rewards, VALUES, mask, GAMMA, LAMBDA)
    following = torch.cat([VALUES[:, 1:], torch.zeros(1, 1)], dim=1)
    return {
        "log pi": LOGP,
        "log ref": LOGP_REF,
        "kl": kl,
        "reward": rewards,
        "V": VALUES,
        "delta": rewards + GAMMA * following - VALUES,
        "A": advantages,
        "A white": masked_whiten(advantages, mask),
        "R = A + V": returns,
    }


def _advantages() -> list[str]:
    found = _rollout()
    head = f"Rollout: four tokens, the last one EOS; score {SCORE}, beta {BETA}, gamma {GAMMA}, lambda {LAMBDA}"
    sums = float(found["reward"].sum()), float(found["kl"].sum())
    return [
        head,
        "  reward = -beta * kl, and the score on the EOS; delta = reward + V of the next state (0 after the EOS) - V",
        "  A = delta + gamma * lambda * A of the next token; white: mean 0 and variance 1 over the rollout batch",
        *_table(found),
        f"  the rewards sum to score - beta * KL = {SCORE} - {BETA} * {sums[1]:.2f} = {sums[0]:.4f}",
    ]


def _update() -> list[str]:
    found = _rollout()
    mask = torch.ones_like(LOGP, dtype=torch.bool)
    white, returns = found["A white"], found["R = A + V"]
    policy = policy_loss(LOGP_NEW, LOGP, white, mask, EPS, mask.sum())
    value = value_loss(VALUES_NEW, VALUES, returns, mask, EPS, mask.sum())
    each_policy, each_value, clipped = [], [], []
    for t in range(LOGP.shape[1]):
        one, at = torch.ones(1, 1, dtype=torch.bool), (slice(None), slice(t, t + 1))
        term = policy_loss(LOGP_NEW[at], LOGP[at], white[at], one, EPS, 1)
        each_policy.append(term.loss)
        clipped.append(float(term.stats.means()["clipfrac"]))
        each_value.append(value_loss(VALUES_NEW[at], VALUES[at], returns[at], one, EPS, 1).loss)
    columns = {
        "new log pi": LOGP_NEW,
        "ratio": policy.ratio,
        "A white": white,
        "policy": torch.stack(each_policy)[None],
        "clipped": torch.tensor([clipped]),
        "new V": VALUES_NEW,
        "R": returns,
        "value": torch.stack(each_value)[None],
    }
    means = policy.stats.means()
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
    rows = torch.cat(list(columns.values())).T.tolist()
    return lines + [
        f"  {t:>5}" + "".join(f"  {value:>{width}.4f}" for value, width in zip(row, widths))
        for t, row in enumerate(rows)
    ]


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())
