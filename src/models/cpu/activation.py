"""GPT-2's GELU, made on a CPU of operations that are fast there.

gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) is the tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415,
section 2), since (1 + tanh u) / 2 = sigmoid(2 u). torch's kernel takes a tanh, which costs ten times a sigmoid, and in
the backward pass takes it again: forward and backward of 1,024 x 3,072 numbers in bf16 take 4.4 ms there and 2.7 here
(torch 2.13, 2 cores of an AMD EPYC; to measure it again: `python src/experiments/main.py -t bench --kernels`).
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_A = 2 * math.sqrt(2 / math.pi)
_B = 0.044715
_SLICE = 2**19  # numbers worked on at a time: their three fp32 buffers stay in the cache
_kept = threading.local()


def serves(x: Tensor) -> bool:
    """Whether `gelu` is faster than torch's own."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU of x, any shape, in x's type; differentiable once."""
    return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    """Keeps the derivative for the backward pass in place of x, which then is one product."""

    @staticmethod
    def forward(ctx, x):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        slope = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        parts = (y.view(-1), *(() if slope is None else (slope.view(-1),)))
        buffers = _buffers(min(_SLICE, x.numel()))
        for i, part in enumerate(x.reshape(-1).split(_SLICE)):
            _slice(part, *(out[i * _SLICE : i * _SLICE + len(part)] for out in parts), buffers=buffers[:, : len(part)])
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def _buffers(size: int) -> Tensor:
    """Memory [3, size] in fp32 to work in: each thread's own, kept, because fresh memory costs more than the work."""
    kept = getattr(_kept, "buffers", None)
    if kept is None or kept.shape[1] < size:
        kept = _kept.buffers = torch.empty(3, size)
    return kept[:, :size]


def _slice(x: Tensor, y: Tensor, slope: Tensor | None = None, *, buffers: Tensor) -> None:
    """Write gelu(x) into y [n] and, if wanted, its derivative into slope [n]; buffers: [3, n] fp32 to work in."""
    wide, p, s = buffers
    p.fill_(_A)
    wide.copy_(x)
    p.addcmul_(wide, wide, value=_A * _B)
    torch.mul(wide, p, out=s).sigmoid_()
    wide *= s
    y.copy_(wide)
    if slope is not None:  # s + x s (1 - s) d(x p)/dx, where d(x p)/dx = 3 p - 2 A
        wide.addcmul_(wide, s, value=-1)
        s.addcmul_(wide, p, value=3)
        torch.sub(s, wide, alpha=2 * _A, out=wide)
        slope.copy_(wide)
