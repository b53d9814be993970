"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on the projections of a model, through `loralib`.

Adapters are built with `merge_weights=False`: loralib otherwise folds them into the weights on `eval()`, and a
checkpoint written then applies them twice when it is loaded. `merge_lora` folds them in on purpose, into a new plain
model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import loralib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.model_configs import ModelConfig
from config.user_error import UserError
from models.kernels import adapted_linear, linear, product_dtype

Model = TypeVar("Model", bound=nn.Module)

FREEZE_METHODS = ("none", "lora", "last_block")


class AdaptedLinear(loralib.Linear):
    """loralib's linear layer, with x W^T + b + scaling (x A^T) B^T in fewer passes over its output.

    The adapter's product is added by the matrix product itself; loralib scales it and adds it in two passes more, which
    on short rows cost as much as the adapter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1]).to(product_dtype(x))  # once, and not for each of the two products
        narrow = F.linear(self.lora_dropout(flat), self.lora_A)  # (N, r)
        y = adapted_linear(flat, self.weight, self.bias, narrow, self.lora_B.t(), self.scaling)
        return y.view(*x.shape[:-1], self.out_features)


class PlainLinear(nn.Linear):
    """`nn.Linear` by way of `models.kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        return linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def projection(config: ModelConfig, n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer n_in -> n_out, with an adapter beside it when the config asks for one.

    The adapter starts at zero (B = 0): a model with fresh adapters computes exactly what it computed without them.
    """
    if config.lora_rank == 0:
        return PlainLinear(n_in, n_out, bias)
    adapter = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
    return AdaptedLinear(n_in, n_out, **adapter, merge_weights=False, bias=bias)


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a model's state belongs to an adapter."""
    return parameter_name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")


@torch.no_grad()
def init_adapters(model: nn.Module) -> None:
    """Give every adapter the start that loralib gives it: A uniform as in `nn.Linear`, B zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name.endswith(".lora_B"):
            parameter.zero_()


def freeze_weights(model: nn.Module, method: str) -> None:
    """Set `requires_grad` on every parameter of a model. Heads (`head.*`) always train.

    `none` freezes nothing, `lora` everything but the adapters, `last_block` everything but the last block (whichever
    that is) and the final LayerNorm.

    Raises:
        UserError: an unknown method, or `lora` on a model without adapters.
    """
    if method not in FREEZE_METHODS:
        raise UserError(f"--freeze {method}: no such method; there are {', '.join(FREEZE_METHODS)}")
    config: ModelConfig = model.config
    if method == "lora" and config.lora_rank == 0:
        raise UserError("--freeze lora: the model has no adapters (lora_rank 0); give a --config that ends in /lora")
    last = {id(p) for module in (model.blocks[-1], model.final_norm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        chosen = {"none": True, "lora": is_adapter(name), "last_block": id(parameter) in last}[method]
        parameter.requires_grad_(chosen or name.startswith("head."))


@torch.no_grad()
def merge_adapters(state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The state of a plain model from that of one with adapters: W + scaling * B A in place of each adapted weight."""
    merged = {key: value for key, value in state.items() if not is_adapter(key)}
    for key in state:
        if key.endswith(".lora_A"):
            stem = key.removesuffix(".lora_A")
            weight = state[f"{stem}.weight"]
            delta = state[f"{stem}.lora_B"].float() @ state[key].float()
            # Into at least fp32: rounded to bf16 the sum would lose most of a small update.
            merged[f"{stem}.weight"] = weight.float() + scaling * delta
    return merged


def merge_lora(model: Model) -> Model:
    """A plain copy of a model, its adapters merged into the weights; the original is left as it is."""
    if model.config.lora_rank == 0:
        return copy.deepcopy(model)
    with torch.device("meta"):
        plain = type(model)(replace(model.config, lora_rank=0, lora_dropout=0.0))
    plain.to_empty(device=next(model.parameters()).device)
    plain.load_state_dict(merge_adapters(model.state_dict(), model.config.lora_scaling))
    return plain.train(model.training)


def round_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of the projections in the type of the matrix products.

    Autocast rounds them to it at every use; rounded once, the same numbers take half the memory and no time. Token
    tables, LayerNorms and biases stay in fp32, as does everything that trains. With fp32 products nothing changes.
    """
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def share_base(models: Iterable[nn.Module]) -> int:
    """Let models hold one copy of the frozen tensors that are equal in all bits; returns the bytes freed.

    Sharing is decided by comparing tensors of the same name against the first model, never assumed: a reward model
    whose trunk was trained in full keeps its own. Parameters that train are never shared.
    """
    first, *others = list(models)
    base = dict(first.named_parameters())
    freed = 0
    for other in others:
        for name, parameter in list(other.named_parameters()):
            twin = base.get(name)
            if twin is None or twin is parameter or twin.requires_grad or parameter.requires_grad:
                continue
            if _same_bits(twin, parameter):
                owner, _, leaf = name.rpartition(".")
                setattr(other.get_submodule(owner), leaf, twin)
                freed += parameter.numel() * parameter.element_size()
    return freed


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of the bytes: `==` takes 0 for -0, and no NaN for itself."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    a, b = (x.detach().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)
