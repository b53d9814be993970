"""What must hold while PPO runs. A violation stops the run: a curve would only hint at it.

Every check raises `InvariantError`, whose message lists the usual causes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.weights.checkpoint import weights_digest
from training.experience import Experience
from utils.loss import masked_mean

# Largest |ratio - 1| of any token, and of their mean, before the first step of an iteration. fp32 leaves rounding only.
_DRIFT = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-2}
_MEAN_DRIFT = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}

# Cached keys and other kernels leave rounding, so that single tokens of a large model may be off by more than a clip
# range in half precision; their mean is not.
_SAMPLER_GAP = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


class InvariantError(RuntimeError):
    """The training code or its inputs break an assumption that PPO rests on."""


def check_first_minibatch(policy: dict[str, Tensor], value: dict[str, Tensor], dtype: str) -> None:
    """Before the first step of an iteration the policy is the one that sampled: ratio 1, nothing clipped, V unchanged.

    Args:
        policy, value: means of PolicyStats and ValueStats over the first minibatch. dtype: fp32, bf16 or fp16.
    """
    figures = policy["ratio_drift"], policy["ratio_mean"] - 1, policy["clipfrac"], value["value_drift"]
    drift, mean_off, clipfrac, value_drift = torch.stack(figures).tolist()
    limit = _DRIFT[dtype]
    if not (drift <= limit and abs(mean_off) <= _MEAN_DRIFT[dtype] and clipfrac == 0 and value_drift <= 10 * limit):
        raise InvariantError(
            "before the first step of an iteration the importance ratio must be 1 and the values unchanged, but max "
            f"|ratio - 1| is {drift:.2e} (limit {limit:.0e}), the mean ratio is off by {mean_off:.2e}, the clip "
            f"fraction is {clipfrac:.3f}, and max |V - V_old| is {value_drift:.2e}. Usual causes: dropout left on, "
            "another temperature or other position ids in one of the two forwards, weights changed between rollout and "
            "update"
        )


def check_reference(experience: Experience, dtype: str) -> None:
    """At the first iteration policy and reference are one model: the KL is 0 for every token."""
    gap = float((experience.logp - experience.logp_ref).abs().max())
    if not gap <= _DRIFT[dtype]:
        raise InvariantError(
            "at the first iteration policy and reference must agree, but their log-probabilities differ by up to "
            f"{gap:.2e}. Usual causes: two different checkpoints, adapters that do not start at zero, an adapter left "
            "on in the reference, dropout"
        )


def check_sampler(experience: Experience, dtype: str) -> None:
    """Responses were sampled from the policy that is trained: mean |log-probability then - now| over their tokens."""
    gap = float(masked_mean((experience.logp - experience.sampler_logp).abs(), experience.rmask))
    if not gap <= _SAMPLER_GAP[dtype]:
        raise InvariantError(
            "the sampler and the training forward give the same tokens log-probabilities that differ by "
            f"{gap:.2e} on average (limit {_SAMPLER_GAP[dtype]:.0e}): responses are not sampled from the policy that "
            "is trained. Usual causes: dropout, another temperature or other position ids in one of the two, weights "
            "of before an optimizer step in the sampler, a sampler that cuts the distribution"
        )


def digests(models: dict[str, nn.Module]) -> dict[str, str]:
    """`weights_digest` of each model, for `check_frozen`."""
    return {name: weights_digest(model) for name, model in models.items()}


def check_frozen(before: dict[str, str], after: dict[str, str]) -> None:
    """The reference and the reward model must end with the bits they started with."""
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise InvariantError(
            f"frozen weights changed during training: {', '.join(changed)}; KL and scores of this run mean nothing"
        )
