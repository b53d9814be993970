"""Weights in the layout that oneDNN reads fastest when it multiplies them with a few rows.

On a CPU `F.linear` rearranges a bf16 weight at every call. A decoding step multiplies each weight with a handful of
rows, so that takes longer than the product: packed, the products of GPT-2 124M with 8 rows took 0.4 of the time (to
measure it again: `python src/experiments/main.py -t bench --kernels`). Weights that are packed already serve every
forward pass that wants no gradient of them: the prompts', and those of PPO's roles on their frozen base; a copy for
these alone is not worth its memory. The operators are those to which torch.compile's freezing lowers a linear layer
(torch/_inductor/fx_passes/mkldnn_fusion.py); where torch lacks them everything falls back to `F.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has a packed layout for weights of this type here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor | None:
    """A matrix [out, in] in the packed layout, or None where there is none."""
    if not serves(weight.device, weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x [N, in] -> [N, out], with GPT-2's tanh form of GELU behind it when asked for."""
    after = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *after)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
    """x W^T + b [N, out] by the packed copy of `weight`, differentiable by x; the bits are those of `F.linear`."""
    return _FrozenLinear.apply(x, weight, bias, packed)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.save_for_backward(weight)
        return packed_linear(x, packed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None, None
