"""Batched sampling with a KV cache: used by PPO's rollouts, by evaluation and by `-t gpt`.

Shapes: B prompts, P padded prompt width, T longest response, V vocabulary.

All rows write the same cache column at each step. The model reads the prompts right-padded, where causal attention
needs no mask; what is behind a shorter prompt stays in the cache and is hidden from every step. A row stops at EOS;
once a quarter of the rows still in work have stopped, the stopped ones are dropped from the batch and the cache. The
loop ends when all have. Stop strings end a row like EOS.

Every row draws from a random stream of its own, so that what a row says depends on its seed and not on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.cache import KVCache
from models.gpu import graphs
from models.kernels import cache_dtype, product_dtype
from models.stop_strings import StopStrings
from models.vocabulary import exp_
from utils.data.batching import left_pad, right_pad
from utils.loss import temper


@dataclass
class Generation:
    """What was sampled.

    prompts: [B, P] int64, left-padded. prompt_len: [B] int64.
    responses: [B, T] int64, EOS included, PAD behind it; T is the longest response of the batch.
    n: [B] int64, real response tokens. ended: [B] bool, whether the row stopped at EOS. stopped: [B] bool, whether at a
    stop string, whose last token is the row's last (`StopStrings.cut` takes it off the text).
    logprobs: [B, T] fp32, the sampler's own log-probability of each token under the distribution it was drawn from, 0
    behind the end.
    """

    prompts: Tensor
    prompt_len: Tensor
    responses: Tensor
    n: Tensor
    ended: Tensor
    stopped: Tensor
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
    eos_id: int | Sequence[int],
    pad_id: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop: StopStrings | None = None,
) -> Generation:
    """Sample one response per prompt.

    Args:
        model: a language model; its train/eval mode is put back afterwards (dropout is off while sampling).
        prompts: B prompts of at least one token each.
        max_new_tokens: responses end here at the latest; prompt and response together must fit the context.
        eos_id: the id that ends a row, or several that do (Llama 3 has three).
        pad_id: what stands behind it (default: the first id outside the vocabulary).
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample among the k most likely ids only (and those as likely as the k-th); 0: all.
        top_p: sample among the smallest set of most likely ids with at least this mass; 1: all. PPO uses neither: it
            needs samples from the very distribution whose log-probabilities it takes.
        seeds: one per row; None draws from torch's global generator.
        stop: texts that end a row, beside EOS; the newest tokens of each row are then decoded at every step.

    Raises:
        ValueError: no prompt, a prompt that is empty, holds ids outside the vocabulary or leaves no room for
            max_new_tokens, or an argument out of range.
    """
    config = model.config
    device = next(model.parameters()).device
    pad_id = config.vocab_size if pad_id is None else pad_id
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    if not len(prompts):
        raise ValueError("there is no prompt to continue")
    prompts = [_prompt_array(prompt, config.vocab_size) for prompt in prompts]
    prompt_ids, att = left_pad(prompts, pad_id)
    B, P = prompt_ids.shape
    if P + max_new_tokens > config.block_size:
        raise ValueError(
            f"a prompt of {P} tokens and {max_new_tokens} new ones do not fit the context of {config.block_size}"
        )
    prompt_ids, att = prompt_ids.to(device), att.to(device)
    uniforms = _row_uniforms(seeds, B, max_new_tokens, device) if temperature > 0 else None

    # The last sampled token is never fed back, so the cache is one column short of the whole sequence.
    dtype = cache_dtype(device.type, product_dtype(next(model.parameters())))
    cache = KVCache.allocate(config, B, P + max_new_tokens - 1, device, dtype)
    responses = torch.full((B, max_new_tokens), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    n = torch.full((B,), max_new_tokens, dtype=torch.long, device=device)
    ended, at_string = (torch.zeros(B, dtype=torch.bool, device=device) for _ in range(2))

    ends = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=device)
    rows = torch.arange(B, device=device)  # which rows of the batch are still in work
    alive = torch.ones(B, dtype=torch.bool, device=device)
    asked_every = _asked_every(device)
    # Other numbers of rows mean another recording, which takes as long as some steps.
    kept_above = 0.5 if graphs.serves(device) else 0.75
    was_training = model.training
    model.eval()
    try:
        logits = model.lm_head(_read(model, prompts, cache))  # (rows, V)
        decoder = model.decoder(cache)
        for t in range(max_new_tokens):
            token, logp = sample(logits, temperature, top_k, top_p, None if uniforms is None else uniforms[rows, t])
            responses[rows, t] = torch.where(alive, token, pad_id)
            logprobs[rows, t] = torch.where(alive, logp, 0.0)
            ended[rows] |= alive & torch.isin(token, ends)
            if stop is not None:
                at_string[rows] |= alive & ~ended[rows] & _reached(stop, responses[rows, : t + 1], alive)
            stopped = alive & (ended | at_string)[rows]
            n[rows] = torch.where(stopped, t + 1, n[rows])
            alive = alive & ~stopped
            if t + 1 == max_new_tokens:
                break
            # Rows that have ended and were not asked about are worked on for nothing.
            left = int(alive.sum()) if (t + 1) % asked_every == 0 else len(rows)
            if left == 0:
                break
            if left <= kept_above * len(rows):
                keep = alive.nonzero().squeeze(1)
                rows, token, alive = rows[keep], token[keep], alive[keep]
                decoder.keep_rows(keep)
            logits = decoder.step(token)
    finally:
        model.train(was_training)
    width = int(n.max())
    return Generation(prompt_ids, att.sum(1), responses[:, :width], n, ended, at_string, logprobs[:, :width])


def _asked_every(device: torch.device) -> int:
    """Tokens between two questions whether rows have ended: a GPU works off its queue before it can answer."""
    return 1 if device.type == "cpu" else 8


def _read(model: nn.Module, prompts: Sequence[np.ndarray], cache: KVCache) -> Tensor:
    """Fill the cache with prompts; returns the states [B, d] behind them."""
    device = cache.att.device
    ids, att = (x.to(device) for x in right_pad(prompts, 0))
    last = torch.arange(len(ids), device=device) * ids.shape[1] + att.sum(1) - 1
    states = model.hidden(ids, att, cache, right_padded=True, at=last)
    torch.clear_autocast_cache()  # its copies of the weights; the steps have theirs from `models.kernels`
    return states


def _reached(stop: StopStrings, responses: Tensor, alive: Tensor) -> Tensor:
    """Which of the rows [b, t] still in work [b] have come to a stop string with their last token."""
    newest = responses[:, -stop.window :].tolist()
    found = [live and stop.reached(ids) for ids, live in zip(newest, alive.tolist(), strict=True)]
    return torch.tensor(found, device=responses.device)


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
    z = temper(logits, temperature or 1.0)
    if temperature == 0:
        best = z.argmax(-1)
        return best, (z.gather(-1, best[:, None]) - z.logsumexp(-1, keepdim=True)).squeeze(-1)
    if 0 < top_k < z.shape[-1]:
        kth = z.topk(top_k, dim=-1).values[:, -1:]
        z = z.masked_fill(z < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = z.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        # The id that crosses top_p is kept: the set must have at least that mass.
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
        z = torch.empty_like(z).scatter(-1, order, ordered)
    top = z.amax(-1, keepdim=True)
    token, total = _invert(exp_(z - top), uniform[:, None])
    return token.squeeze(-1), (z.gather(-1, token) - top - total.log()).squeeze(-1).float()


_SLICE = 128


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The id at which the cumulative weights pass `uniform` times their total.

    First the slice of 128 ids is found and then the id within it, so that no sum runs over the whole vocabulary id by
    id. Both searches sum in float64: in fp32 a sum near 1 would swallow ids of less than 6e-8, of which a vocabulary of
    50,257 has many.

    Args:
        weights: [B, V], 0 or more, not normalised. uniform: [B, 1] in [0, 1).

    Returns:
        id [B, 1] and the total [B, 1].
    """
    B, V = weights.shape
    whole = V - V % _SLICE
    slices = weights[:, :whole].view(B, -1, _SLICE).sum(-1)
    if whole < V:
        slices = torch.cat([slices, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    ends = slices.cumsum(-1, dtype=_wide(weights.device))  # (B, slices)
    target = uniform * ends[:, -1:]
    # The clamps are for targets that rounding puts at the very end, and for weights that are NaN: their rows end in a
    # NaN log-probability instead of an index error.
    chosen = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    before = ends.gather(1, chosen) - slices.gather(1, chosen)
    ids = chosen * _SLICE + torch.arange(_SLICE, device=weights.device)  # (B, 128)
    inside = weights.gather(1, ids.clamp(max=V - 1)).masked_fill(ids >= V, 0)
    steps = inside.cumsum(-1, dtype=_wide(weights.device))
    # Strictly below the slice's own sum, so that no id without any weight behind the last one with some is taken.
    last = steps[:, -1:]
    target = torch.minimum(target - before, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(steps, target.clamp(min=0), right=True).clamp(max=_SLICE - 1)
    return ids.gather(1, place).clamp(max=V - 1), ends[:, -1:]


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be 0 (off) or more and top_p in (0, 1], not {top_k} and {top_p}")


def _prompt_array(prompt: np.ndarray | Tensor | list[int], vocab_size: int) -> np.ndarray:
    """A prompt as int64 array [P]; an id without a row in the token table would crash a GPU without a reason."""
    ids = np.asarray(prompt.cpu() if isinstance(prompt, Tensor) else prompt)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"every prompt needs at least one token, and ids in one dimension; this has shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"prompt ids must be in [0, {vocab_size}), not {ids.min()} .. {ids.max()}")
    return ids.astype(np.int64)


def _row_uniforms(seeds: Sequence[int] | None, rows: int, width: int, device: torch.device) -> Tensor:
    """[B, T] uniforms, each row from its own stream; a longer row begins with the numbers of a shorter one."""
    if seeds is None:
        return torch.rand(rows, width, dtype=torch.float64).to(_wide(device)).to(device)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts")
    generator = torch.Generator()
    streams = [torch.rand(width, generator=generator.manual_seed(int(seed)), dtype=torch.float64) for seed in seeds]
    return torch.stack(streams).to(_wide(device)).to(device)


def _wide(device: torch.device) -> torch.dtype:
    """The most exact dtype there is: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
