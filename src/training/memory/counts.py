"""What a model holds and what its passes keep, counted in tensors: the figures behind `training.memory.plan`.

All numbers that depend on how the models are written stand here. A test counts the tensors that autograd really saves
(`torch.autograd.graph.saved_tensors_hooks`) and the bytes of real models, and compares.

Units: d channels of the residual stream, V vocabulary; bytes, unless a name says otherwise. "Product type" is the type
of matrix products: 2 bytes per number in bf16 and fp16, 4 in fp32. "Wide" is fp32 always.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from config.configs import GPTConfig
from models.gpt import GPT, GPTCritic, GPTRewardModel
from models.lora import freeze_weights, is_adapter, round_frozen

HALF = (torch.bfloat16, torch.float16)

# What one block keeps of each token for its backward pass, in tensors of d channels. Adapters change nothing: without
# them a projection's weight gradient needs its input, with them the gradient of A needs the same input.
KEPT_IN_PRODUCT_TYPE = {
    "input of c_attn (or of its adapter)": 1,
    "queries, keys, values": 3,
    "attention's output, which is the input of c_proj": 1,
    "input of c_fc": 1,
    "input of GELU, or on a CPU its derivative": 4,
    "input of the second c_proj": 4,
}
KEPT_WIDE = {"input of ln_1": 1, "input of ln_2": 1}
DROPOUT_MASKS = 2  # behind each of the two output projections, in the product's type
ATTENTION_DROPOUT = 3  # on a CPU: tensors [rows, heads, L, L] of attention written out (counted in fp32; fewer in bf16)

# Bytes per logit of a block (models.vocabulary): the product in half precision, taken once or twice, or in fp32. What
# is made of a slice of it in fp32 comes on top, per logit of the slice: itself, exp of it and their product (entropy).
LOGIT_BYTES = {"once": 2, "half": 4, "wide": 4}
SLICE_BYTES = 12
SAMPLED_LOGIT_BYTES = 12  # per logit of a sampling step: logits, tempered, exponentiated
TABLE_WORK = 2  # gradients of a token table that trains, [V, d] wide, at the same time beside the one it accumulates to

# On a CPU: what the heap loses to holes during a pass, as a share of the activations. glibc (2.36) does not reuse the
# place of a freed tensor for one of the same size, because torch asks for aligned memory; the temporaries between the
# tensors that stay leave such holes, most of all the two outputs of every adapter. Measured on GPT-2 124M, as is the
# fact that they vanish when every tensor is mapped by itself (docs/memory.md).
HEAP_HOLES = {
    ("adapters", "half"): 0.45, ("adapters", "wide"): 0.38, ("plain", "half"): 0.4, ("plain", "wide"): 0.3,
}  # fmt: skip


def width(dtype: torch.dtype) -> int:
    """Bytes of a number."""
    return dtype.itemsize


def kept_per_token(model: GPTConfig, dtype: torch.dtype, device: str, length: int) -> int:
    """Bytes that one block keeps of one token of a row of `length`, for the backward pass."""
    d, size = model.n_embd, width(dtype)
    kept = d * (sum(KEPT_IN_PRODUCT_TYPE.values()) * size + sum(KEPT_WIDE.values()) * 4)
    kept += 4 * (model.n_head + 4)  # attention's log-sum per head, mean and deviation of two LayerNorms
    if model.dropout:
        kept += d * DROPOUT_MASKS * size
        if device == "cpu":
            kept += ATTENTION_DROPOUT * model.n_head * length * size
    elif device == "cpu" and dtype == torch.bfloat16:
        kept -= 4 * model.n_head  # attention by blocks (models/cpu/attention.py) makes its sums again
    return kept


def stream_per_token(model: GPTConfig) -> int:
    """Bytes of one token's residual stream, which is what a recomputed block keeps."""
    return 4 * model.n_embd


def blocks_that_keep(model: GPTConfig, method: str) -> int:
    """Blocks whose tensors a backward pass needs: those from the lowest one that trains upwards."""
    return {"frozen": 0, "last_block": 1}.get(method, model.n_layer)


@dataclass(frozen=True)
class Weights:
    """Bytes and numbers of one model's parameters.

    trained, trained_adapters: numbers (each 4 bytes) that train: all, and those of adapters. base: bytes of what is
    frozen and equal in every model with this base. own: bytes of frozen adapters and heads. trained_matrices,
    all_matrices: numbers in the projections' weights. table: numbers in the token table; table_trains.
    """

    trained: int
    trained_adapters: int
    base: int
    own: int
    trained_matrices: int
    all_matrices: int
    table: int
    table_trains: bool

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return 4 * self.trained + self.base + self.own


CLASSES = {"lm": GPT, "reward": GPTRewardModel, "critic": GPTCritic}


@lru_cache(maxsize=64)
def count_weights(role: str, model: GPTConfig, method: str, dtype: torch.dtype) -> Weights:
    """Build the model without memory, freeze it as `training.start` would, and count.

    Args:
        role: "lm", "reward" or "critic". method: a method of `freeze_weights`, or "frozen". dtype: of the products.
    """
    with torch.device("meta"):
        module = CLASSES[role](model)
    if method == "frozen":
        module.requires_grad_(False)
    else:
        freeze_weights(module, method)
    round_frozen(module, dtype)
    trained = adapters = base = own = 0
    for name, p in module.named_parameters():
        if p.requires_grad:
            trained += p.numel()
            adapters += p.numel() if is_adapter(name) else 0
        elif is_adapter(name) or name.startswith("head."):
            own += p.numel() * p.element_size()
        else:
            base += p.numel() * p.element_size()
    matrices = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    trained_matrices = sum(w.numel() for w in matrices if w.requires_grad)
    table = module.transformer.wte.weight
    return Weights(
        trained, adapters, base, own, trained_matrices, sum(w.numel() for w in matrices), table.numel(),
        table.requires_grad,
    )  # fmt: skip
