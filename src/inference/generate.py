"""Batched sampling with a KV cache: used by PPO's rollouts, by evaluation and by chat.

Shapes: B prompts, P padded prompt width, T longest response, V vocabulary.

Prompts are left-padded, so that all rows write the same cache column at each step. A row stops at EOS; once a quarter of the rows
still in work have stopped, the stopped ones are dropped from the batch and the cache, so at most a quarter of any step's work is spent on rows
that have ended. The loop ends when all have.

Every row draws from a random stream of its own, so that what a row says depends on its seed and not on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.gpt import KVCache
from utils.batching import left_pad
from utils.loss import temper


@dataclass
class Generation:
    """What was sampled.

    prompts: [B, P] int64, left-padded. prompt_len: [B]. responses: [B, T] int64, EOS included, PAD behind it; T is the longest
    response of the batch. n: [B] int64, real response tokens. ended: [B] bool, whether the row stopped at EOS (or a stop id).
    logprobs: [B, T] fp32, the sampler's own log-probability of each token under the distribution it was drawn from, 0 behind the end.
    """

    prompts: Tensor
    prompt_len: Tensor
    responses: Tensor
    n: Tensor
    ended: Tensor
    logprobs: Tensor

    def row(self, b: int) -> Tensor:
        """The response of row b without padding [n]."""
        return self.responses[b, : int(self.n[b])]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[np.ndarray | Tensor | list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Generation:
    """Sample one response per prompt.

    Args:
        model: a GPT; its train/eval mode is put back afterwards (dropout is off while sampling).
        prompts: B prompts of at least one token each.
        max_new_tokens: responses end here at the latest; prompt and response together must fit the context.
        eos_id: the id that ends a row. pad_id: what stands behind it (default: the first id outside the vocabulary).
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample among the k most likely ids only; 0: all. top_p: among the smallest set with at least this mass; 1: all.
            PPO uses neither: it needs samples from the very distribution whose log-probabilities it takes.
        seeds: one per row; None draws them from torch's global generator.
        cache_dtype: dtype of keys and values; None: that of the active autocast, else of the weights.

    Raises:
        ValueError: an empty prompt, or a prompt that leaves no room for max_new_tokens.
    """
    config = model.config
    device = next(model.parameters()).device
    pad_id = config.vocab_size if pad_id is None else pad_id
    if not len(prompts) or min(len(p) for p in prompts) == 0:
        raise ValueError("every prompt needs at least one token")
    prompt_ids, att = (x.to(device) for x in left_pad([np.asarray(p) for p in prompts], pad_id))
    B, P = prompt_ids.shape
    if P + max_new_tokens > config.block_size:
        raise ValueError(
            f"a prompt of {P} tokens and {max_new_tokens} new ones do not fit the context of {config.block_size}"
        )
    uniforms = _row_uniforms(seeds, B, max_new_tokens).to(device) if temperature > 0 else None

    was_training = model.training
    model.eval()
    dtype = cache_dtype or _compute_dtype(model, device)
    # The last sampled token is never fed back, so the cache is one column short of the whole sequence.
    cache = KVCache.allocate(config, B, P + max_new_tokens - 1, device, dtype)
    responses = torch.full((B, max_new_tokens), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    n = torch.full((B,), max_new_tokens, dtype=torch.long, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)

    rows = torch.arange(B, device=device)  # which rows of the batch are still in work
    alive = torch.ones(B, dtype=torch.bool, device=device)
    hidden = model.hidden(prompt_ids, att, cache)[:, -1]
    for t in range(max_new_tokens):
        logits = model.lm_head(hidden)  # (rows, V)
        token, logp = sample(logits, temperature, top_k, top_p, None if uniforms is None else uniforms[rows, t])
        responses[rows, t] = torch.where(alive, token, pad_id)
        logprobs[rows, t] = torch.where(alive, logp, 0.0)
        stopped = alive & (token == eos_id)
        n[rows[stopped]] = t + 1
        ended[rows[stopped]] = True
        alive = alive & ~stopped
        left = int(alive.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= 0.75 * len(rows):
            keep = alive.nonzero().squeeze(1)
            rows, token, alive = rows[keep], token[keep], alive[keep]
            cache.keep_rows(keep)
        hidden = model.hidden(token[:, None], None, cache)[:, -1]
    model.train(was_training)
    width = int(n.max())
    return Generation(prompt_ids, att.sum(1), responses[:, :width], n, ended, logprobs[:, :width])


def sample(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one id per row by inverting the cumulative distribution.

    Args:
        logits: [B, V]. temperature: 0 takes the most likely id. top_k, top_p: see `generate`.
        uniform: [B] in [0, 1), the rows' random numbers.

    Returns:
        ids [B] and their log-probabilities [B] fp32 under the distribution drawn from (greedy: under temperature 1).
    """
    if temperature == 0:
        logp = torch.log_softmax(logits.float(), dim=-1)
        best = logp.argmax(-1)
        return best, logp.gather(-1, best[:, None]).squeeze(-1)
    logits = temper(logits, temperature)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        # The id that crosses top_p is kept: the set must have at least that mass.
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    logp = torch.log_softmax(logits, dim=-1)
    cumulative = logp.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding never lands on an id behind the last one with any probability.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, target, right=True)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)


def _row_uniforms(seeds: Sequence[int] | None, rows: int, width: int) -> Tensor:
    """[B, T] uniforms, each row from its own stream."""
    if seeds is None:
        return torch.rand(rows, width)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts")
    generator = torch.Generator()
    return torch.stack([torch.rand(width, generator=generator.manual_seed(int(seed))) for seed in seeds])


def _compute_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(model.parameters()).dtype
