"""Formulas in their plain form, which src/ has in a faster one: tests hold the two against each other."""

import torch
from torch import Tensor

from utils.loss import response_mask, temper


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


def response_lengths(tokens: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Number of real response tokens of each row: up to the first EOS and with it, or all T when there is none.

    Args:
        tokens: [B, T] sampled ids.
        eos_id: the end-of-text id.

    Returns: n [B] int64, has_eos [B] bool.
    """
    is_eos = tokens == eos_id
    has_eos = is_eos.any(dim=-1)
    before_eos = (is_eos.cumsum(dim=-1) == 0).sum(dim=-1)
    return before_eos + has_eos, has_eos


def pad_after_eos(tokens: Tensor, n: Tensor, pad_id: int) -> Tensor:
    """Return tokens [B, T] with everything after the first n [B] tokens of a row replaced by pad_id."""
    return torch.where(response_mask(n, tokens.shape[1]), tokens, torch.full_like(tokens, pad_id))
