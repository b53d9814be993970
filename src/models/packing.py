"""Weights in the type and layout that decoding reads fastest, made once and kept with the parameter.

On a CPU `F.linear` rearranges a bf16 weight at every call. A decoding step multiplies each weight with a handful of
rows, so that takes longer than the product: packed, the products of GPT-2 124M with 8 rows took 0.4 of the time. The
operators are those to which torch.compile's freezing lowers a linear layer (torch/_inductor/fx_passes/
mkldnn_fusion.py); where torch lacks them everything falls back to `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


def kept_with(parameter: nn.Parameter, name: str, key: Any, make: Callable[[], Made]) -> Made:
    """`make()`, remembered as attribute `name` of a parameter until that, or `key`, changes.

    Roles that share a parameter share what was made of it. Optimizers and loads change it in place, which its version
    counter tells; moving it to a device gives it other memory.
    """
    state = (parameter._version, parameter.data_ptr(), parameter.dtype, key)
    kept = getattr(parameter, name, None)
    if kept is None or kept[0] != state:
        setattr(parameter, name, None)  # the old one goes before the new one is made, not after
        kept = (state, make())
        setattr(parameter, name, kept)
    return kept[1]


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
