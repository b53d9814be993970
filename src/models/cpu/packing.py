"""Weights in the type and layout that decoding reads fastest, made once and kept with the parameter.

On a CPU `F.linear` rearranges a bf16 weight at every call. A decoding step multiplies each weight with a handful of
rows, so that takes longer than the product: packed, the products of GPT-2 124M with 8 rows took 0.4 of the time.
Weights that are packed already serve every forward pass that wants no gradient of them: the prompts', and those of
PPO's roles on their frozen base. The operators are those to which torch.compile's freezing lowers a linear layer
(torch/_inductor/fx_passes/mkldnn_fusion.py); where torch lacks them everything falls back to `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")


def kept_with(parameter: nn.Parameter, name: str, key: Any, make: Callable[[], Made]) -> Made:
    """`make()`, remembered as attribute `name` of a parameter until that, or `key`, changes.

    Roles that share a parameter share what was made of it. Optimizers and loads change it in place, which its version
    counter tells (for fused optimizers `_count_fused_steps` sees to that); moving it to a device gives it other memory.
    """
    kept = getattr(parameter, name, None)
    if kept is None or kept[0] != _state(parameter, key):
        setattr(parameter, name, None)  # the old one goes before the new one is made, not after
        kept = (_state(parameter, key), make())
        setattr(parameter, name, kept)
    return kept[1]


def _state(parameter: nn.Parameter, key: Any) -> tuple:
    return parameter._version, parameter.data_ptr(), parameter.dtype, key


def _count_fused_steps(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Have the version counters of parameters tell a fused step, too.

    torch's fused kernels write to parameters behind autograd's back: `_version` stays what it was (AdamW of torch 2.13;
    its other implementations count). What was made of a weight before the step would be taken for what it is now.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_steps)  # of every optimizer, whoever makes it


def decoding_weight(weight: nn.Parameter, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A weight as decoding wants it, kept with it: (in `dtype`, None), or (None, packed) where there is a layout."""
    return kept_with(weight, "decoding_weight", dtype, lambda: _prepare(weight.detach().to(dtype)))


def _prepare(weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    packed = pack(weight)
    return (weight, None) if packed is None else (None, packed)


def frozen_linear(x: Tensor, weight: nn.Parameter, bias: nn.Parameter) -> Tensor | None:
    """x W^T + b [N, out] of x [N, in] by the packed copy of a weight that wants no gradient, differentiable by x.

    None where decoding has left no such copy: it is not worth memory of its own. The bits are those of `F.linear`.
    """
    if torch.compiler.is_compiling():  # it cannot look into a packed tensor
        return None
    state, (_, packed) = getattr(weight, "decoding_weight", None) or (None, (None, None))
    if packed is None or state != _state(weight, x.dtype):
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        return None
    return _FrozenLinear.apply(x, weight, bias, packed)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.save_for_backward(weight)
        return packed_linear(x, packed, bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None, None


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has a packed layout for weights of this type here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor | None:
    """A matrix [out, in] in the packed layout, or None where there is none."""
    if not can_pack(weight.device, weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x [N, in] -> [N, out], with GPT-2's tanh form of GELU behind it when asked for."""
    after = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *after)
