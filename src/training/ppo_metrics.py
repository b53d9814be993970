"""The figures that tell a healthy PPO run from a broken one: one dictionary per iteration, keys as in TensorBoard.

All are masked, fp32, over the whole rollout. B rollouts, T response columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.experience import Experience
from utils.loss import (
    PolicyStats,
    ValueStats,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
)
from utils.metrics import correlation, summary, text_degeneracy


def rollout_metrics(experience: Experience, penalised: Tensor, kl_coef: float) -> dict[str, float | Tensor]:
    """Figures of what was sampled: objective/*, policy/entropy and resp/*.

    Args:
        experience: with the models' outputs filled in.
        penalised: [B] scores after the penalty for a missing EOS.
        kl_coef: beta of this iteration.
    """
    rmask = experience.rmask
    k1 = kl_k1(experience.logp, experience.logp_ref)
    kl = masked_sum(k1, rmask, dim=1)  # (B,) nats per response
    score = summary(experience.scores)
    lengths = experience.n.float()
    length = summary(lengths)
    drift = torch.where(rmask, (experience.logp - experience.sampler_logp).abs(), 0.0).max()
    return {
        "objective/kl": kl.mean(),
        "objective/kl_k3": masked_sum(kl_k3(experience.logp, experience.logp_ref), rmask, dim=1).mean(),
        "objective/kl_per_token": masked_mean(k1, rmask),
        "objective/score": score.mean,
        "objective/score_sd": score.sd,
        "objective/score_p5": score.p5,
        "objective/score_p95": score.p95,
        "objective/rlhf_reward": (penalised - kl_coef * kl).mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": masked_sum(-experience.logp, rmask, dim=1).mean(),
        "policy/entropy": masked_mean(experience.entropy, rmask),
        "resp/len_mean": length.mean,
        "resp/len_p50": length.p50,
        "resp/len_p95": length.p95,
        "resp/len_score_corr": correlation(lengths, experience.scores.cpu()),
        "resp/eos_rate": experience.ended.float().mean(),
        **{f"resp/{key}": value for key, value in text_degeneracy(experience.responses(with_eos=False)).items()},
        "policy/sampler_vs_train_logp_max": drift,
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the returns the critic explains: `1 - var(R - V) / var(R)` and `1 - mean((R - V)^2) / var(R)`.

    Of values and returns [B, T] under the mask. 1 is perfect, 0 no better than a constant; only the second form sees
    a constant offset. Both are nan if the returns do not vary.
    """
    of_returns = masked_moments(returns, mask)
    residuals = masked_moments(torch.where(mask, returns, 0.0) - torch.where(mask, values, 0.0), mask)
    errors = residuals.var, residuals.total_sq / residuals.count.clamp(min=1)
    by_variance, by_error = (torch.where(of_returns.var > 0, 1.0 - x / of_returns.var, math.nan) for x in errors)
    return by_variance, by_error


def value_metrics(values: Tensor, returns: Tensor, advantages: Tensor, rmask: Tensor) -> dict[str, Tensor]:
    """Figures of the critic before the update: how much of the returns [B, T] its values [B, T] explain."""
    by_variance, by_error = explained_variance(values, returns, rmask)
    return {
        "val/explained_var": by_variance,
        "val/explained_var_mse": by_error,
        "val/mean": masked_mean(values, rmask),
        "val/return_mean": masked_mean(returns, rmask),
        "val/return_var": masked_var(returns, rmask),
        "val/advantage_var": masked_var(advantages, rmask),
    }


def update_metrics(
    epochs: list[list[tuple[PolicyStats, ValueStats]]], norms: list[dict[str, Tensor]], optimizer: Optimizer
) -> dict[str, float | Tensor]:
    """Figures of an update: its losses, and how far each role was moved.

    Args:
        epochs: statistics of each pass's steps. norms: gradient norms of all steps, by role.
        optimizer: after the last step.
    """
    passes = [add_all(stats) for stats in epochs]
    policy, value = add_all(passes)
    return {
        **loss_metrics(policy.means(), value.means()),
        **{f"policy/approxkl_epoch{e}": stats[0].means()["approx_kl"] for e, stats in enumerate(passes, 1)},
        **{f"grad_norm/{role}": torch.stack([n[role] for n in norms]).mean() for role in norms[0]},
        **{f"update_ratio/{role}": ratio for role, ratio in update_ratios(optimizer).items()},
        **{f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups},
    }


def loss_metrics(policy: dict[str, Tensor], value: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures of the losses from the means of PolicyStats and ValueStats over all minibatches."""
    return {
        "loss/policy": policy["loss"],
        "loss/value": value["loss"],
        "policy/approxkl": policy["approx_kl"],
        "policy/clipfrac": policy["clipfrac"],
        "val/clipfrac": value["clipfrac"],
        "policy/ratio_mean": policy["ratio_mean"],
        "policy/ratio_var": policy["ratio_var"],
        "policy/ratio_max": policy["ratio_max"],
    }


def add_all(stats: list[tuple[PolicyStats, ValueStats]]) -> tuple[PolicyStats, ValueStats]:
    """Statistics of several micro-batches, minibatches or passes together."""
    policy, value = zip(*stats)
    return sum(policy[1:], policy[0]), sum(value[1:], value[0])


@torch.no_grad()
def update_ratios(optimizer: Optimizer) -> dict[str, Tensor]:
    """Norm of the last AdamW step over the norm of the parameters it moved, per group name; about 1e-3 is healthy.

    Made again from the optimizer's moments, so that no copy of the weights is kept.
    """
    squares: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p not in optimizer.state:
                continue
            state = optimizer.state[p]
            step = state["step"]
            scale = (1 - beta2**step).sqrt() / (1 - beta1**step)  # both bias corrections
            denom = state["exp_avg_sq"].sqrt() + group["eps"] * (1 - beta2**step).sqrt()
            move = group["lr"] * (scale * state["exp_avg"] / denom + group["weight_decay"] * p)
            moved, size = squares.setdefault(group["name"], [move.new_zeros(()), move.new_zeros(())])
            squares[group["name"]] = [moved + move.square().sum(), size + p.square().sum()]
    return {name: (moved / size).sqrt() for name, (moved, size) in squares.items()}
