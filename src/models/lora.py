"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on the projections of a model, through `loralib`.

Adapters are built with `merge_weights=False`: loralib otherwise folds them into the weights on `eval()`, and a checkpoint written then
applies them twice when it is loaded. `merge_lora` folds them in on purpose, into a new plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import loralib
import torch
from torch import nn

from config.configs import GPTConfig
from config.user_error import UserError

Model = TypeVar("Model", bound=nn.Module)

FREEZE_METHODS = ("none", "lora", "last_block")


def projection(config: GPTConfig, n_in: int, n_out: int) -> nn.Linear:
    """A linear layer n_in -> n_out, with an adapter beside it when the config asks for one.

    The adapter starts at zero (B = 0), so that a model with fresh adapters computes exactly what it computed without them.
    """
    if config.lora_rank == 0:
        return nn.Linear(n_in, n_out)
    return loralib.Linear(
        n_in,
        n_out,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        merge_weights=False,
    )


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a model's state belongs to an adapter."""
    return parameter_name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")


def freeze_weights(model: nn.Module, method: str) -> None:
    """Set `requires_grad` on every parameter of a model. Heads (`head.*`) always train.

    `none` freezes nothing, `lora` everything but the adapters, `last_block` everything but the last block (whichever that is) and the
    final LayerNorm.

    Raises:
        UserError: an unknown method, or `lora` on a model without adapters.
    """
    if method not in FREEZE_METHODS:
        raise UserError(f"--freeze {method}: no such method; there are {', '.join(FREEZE_METHODS)}")
    config: GPTConfig = model.config
    if method == "lora" and config.lora_rank == 0:
        raise UserError(
            f"--freeze lora: the model has no adapters (lora_rank 0); use a preset such as {config.name.split('/')[0]}/lora"
        )
    last_block = f"transformer.h.{config.n_layer - 1}."
    for name, parameter in model.named_parameters():
        if name.startswith("head.") or method == "none":
            trains = True
        elif method == "lora":
            trains = is_adapter(name)
        else:
            trains = name.startswith((last_block, "transformer.ln_f."))
        parameter.requires_grad_(trains)


@torch.no_grad()
def merge_lora(model: Model) -> Model:
    """A plain copy of a model with W + (alpha / r) B A in place of each adapted weight; the original is left as it is."""
    if model.config.lora_rank == 0:
        return copy.deepcopy(model)
    plain = type(model)(replace(model.config, lora_rank=0, lora_dropout=0.0))
    state = model.state_dict()
    merged = {key: value for key, value in state.items() if not is_adapter(key)}
    for key in merged:
        stem = key.removesuffix(".weight")
        if f"{stem}.lora_A" in state:
            delta = state[f"{stem}.lora_B"].float() @ state[f"{stem}.lora_A"].float()
            merged[key] = (merged[key].float() + model.config.lora_scaling * delta).to(merged[key].dtype)
    plain.load_state_dict(merged)
    return plain.to(next(model.parameters()).device).train(model.training)


def share_base(models: Iterable[nn.Module]) -> int:
    """Let models hold one copy of the frozen tensors that are equal in all bits; returns the bytes freed.

    Sharing is decided by comparing tensors of the same name against the first model, never assumed: a reward model whose trunk was
    trained in full keeps its own. Parameters that train are never shared.
    """
    first, *others = list(models)
    base = dict(first.named_parameters())
    freed = 0
    for other in others:
        for name, parameter in list(other.named_parameters()):
            twin = base.get(name)
            if twin is None or twin is parameter or twin.requires_grad or parameter.requires_grad:
                continue
            if twin.shape == parameter.shape and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
                owner, _, leaf = name.rpartition(".")
                setattr(other.get_submodule(owner), leaf, twin)
                freed += parameter.numel() * parameter.element_size()
    return freed
