"""Attention on a CPU by plain matrix products, where they are faster than torch's fused kernel.

Measured with torch 2.13 on an AMD EPYC at the shapes of GPT-2 124M; to measure it again:
`python src/experiments/main.py -t bench --kernels`.

- Causal rows in bf16, where the fused kernel takes two to four times as long: forward and backward of one layer on one
  core 124 to 134 against 55 to 63 ms for 4 x 512 tokens, 34 against 9 ms for 8 x 128.
- One query per row, if the keys of a head lie in memory as [hd, S]: 0.59 against 0.36 ms in fp32 and 3.2 against 0.57
  ms in bf16 for 32 rows with 127 keys in the cache, on two cores. Sampling of 32 rows gained 15 %, of 8 rows nothing.

Shapes: B rows, nh heads, L queries, S keys, hd channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


def serves(q: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> bool:
    """Whether `causal_by_blocks` computes what is wanted, and faster."""
    bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bf16 and causal and mask is None and dropout == 0.0 and q.shape[2] > 1


def one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What the queries of one token per row attend to [B, nh, g, hd], without gradients: g for each head of k and v
    [B, nh, S, hd]; bias [B, 1, 1, S] is added to the scores."""
    B, nh, S, hd = k.shape
    q, k_t, v = q.reshape(B * nh, -1, hd), k.transpose(2, 3).reshape(-1, hd, S), v.reshape(-1, S, hd)
    scores = torch.baddbmm(q.new_empty(()), q, k_t, beta=0, alpha=hd**-0.5)  # (B * nh, g, S)
    if bias is not None:
        scores.view(B, nh, -1, S).add_(bias)
    return torch.bmm(scores.softmax(-1), v).view(B, nh, -1, hd)


def causal_by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [B, nh, L, hd]: a block of queries at a time, against the keys that it may see.

    As in torch's kernel, the weights are made again in the backward pass: memory grows with L, not with L squared.
    """
    return _CausalByBlocks.apply(q, k, v)


class _CausalByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        shape = q.shape
        q, k, v = (x.reshape(-1, *shape[2:]) for x in (q, k, v))  # (B * nh, L, hd)
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for at, seen in _blocks(shape[2]):
            torch.bmm(_weights(q[:, at], k[:, seen]), v[:, seen], out=y[:, at])
        return y.view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        shape, scale = grad.shape, q.shape[-1] ** -0.5
        grad = grad.reshape(q.shape)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at, seen in _blocks(shape[2]):
            weights = _weights(q[:, at], k[:, seen])  # (B * nh, queries, keys seen)
            to_v[:, seen].baddbmm_(weights.transpose(1, 2), grad[:, at])
            to_weights = torch.bmm(grad[:, at], v[:, seen].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            torch.baddbmm(to_q[:, at], to_scores, k[:, seen], beta=0, alpha=scale, out=to_q[:, at])
            to_k[:, seen].baddbmm_(to_scores.transpose(1, 2), q[:, at], alpha=scale)
        return to_q.view(shape), to_k.view(shape), to_v.view(shape)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that the last of each may see."""
    size = 64 if length <= 128 else 128
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(0, end)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights [n, L, S] of the last L of S positions, from q [n, L, hd] and k [n, S, hd]."""
    n, L, hd = q.shape
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=hd**-0.5)
    scores[:, :, -L:] += _ahead(L, q.dtype)
    return scores.softmax(-1)  # in fp32 inside, rounded at the end


@lru_cache(maxsize=64)
def _ahead(length: int, dtype: torch.dtype) -> Tensor:
    """[L, L], minus infinity where the key lies ahead of the query and 0 elsewhere."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
