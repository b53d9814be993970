"""What was made of a parameter (a copy in another type or layout), kept with it until the parameter changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")


def kept_with(parameter: Tensor, name: str, key: Any, make: Callable[[], Made]) -> Made:
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


def find_kept(parameter: Tensor, name: str, key: Any) -> Any:
    """What `kept_with` would give without making it; None where there is nothing or it is out of date."""
    kept = getattr(parameter, name, None)
    return kept[1] if kept is not None and kept[0] == _state(parameter, key) else None


def _state(parameter: Tensor, key: Any) -> tuple:
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
