"""Formulas in their plain form, which src/ has in a faster one: tests hold the two against each other."""

import torch
from torch import Tensor

from utils.loss import temper


def gather_logprobs(logits: Tensor, tokens: Tensor, tau: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each token under the tempered softmax.

    Args:
        logits: [..., V] any float type; row j already aligned with token j (`logits[:, P-1:P-1+T]` for a response).
        tokens: [...] int64 in [0, V).
        tau: sampling temperature.
        mask: [...] bool. Where False the token may be any id, even a pad id outside the vocabulary, and the result
            is 0. Without a mask an id outside the vocabulary is an error.

    Returns: [...] float32, nats.
    """
    if mask is not None:
        tokens = torch.where(mask, tokens, torch.zeros_like(tokens))
    logp = torch.log_softmax(temper(logits, tau), dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
    return logp if mask is None else torch.where(mask, logp, 0.0)


def entropy_from_logits(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Exact entropy [...] in nats of the tempered softmax of logits [..., V]; a logit may be -inf (a forbidden id)."""
    logp = torch.log_softmax(temper(logits, tau), dim=-1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)  # the clamp makes 0 * -inf = 0
