"""What a model holds and what its passes keep, counted in tensors: the figures behind `training.memory.plan`.

All numbers that depend on how the models are written stand here. A test counts the tensors that autograd really saves
(`torch.autograd.graph.saved_tensors_hooks`) and the bytes of real models, and compares.

Units: d channels of the residual stream, V vocabulary; bytes, unless a name says otherwise. "Product type" is the type
of matrix products: 2 bytes per number in bf16 and fp16, 4 in fp32. "Wide" is fp32 always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from config.model_configs import GPTConfig, LlamaConfig, ModelConfig
from models.families import new_model
from models.lora import freeze_weights, is_adapter, round_frozen


@dataclass(frozen=True)
class Kept:
    """Numbers that one block keeps of each token for its backward pass, by what they are.

    Adapters change little: without them a projection's weight gradient needs its input, with them the gradient of A
    needs the same input.
    """

    in_product_type: dict[str, int]
    wide: dict[str, int]


def _gpt2(model: GPTConfig, copied_heads: bool, norms_train: bool) -> Kept:
    d = model.n_embd
    in_product_type = {
        "input of c_attn (or of its adapter)": d,
        "queries, keys, values": 3 * d,
        "attention's output, which is the input of c_proj": d,
        "input of c_fc": d,
        "input of GELU, or on a CPU its derivative": 4 * d,
        "input of the second c_proj": 4 * d,
    }
    return Kept(in_product_type, {"inputs of ln_1 and ln_2": 2 * d, "their means and deviations": 4})


def _llama(model: LlamaConfig, copied_heads: bool, norms_train: bool) -> Kept:
    d, queries = model.n_embd, model.n_head * model.head_dim
    in_product_type = {
        "input of q_proj, k_proj and v_proj": d,
        "queries": queries,  # rotated; rotations keep nothing of what they turn
        "keys, values": 2 * (queries if copied_heads else model.n_kv_head * model.head_dim),
        "attention's output, which is the input of o_proj": queries,
        "input of gate_proj and up_proj": d,
        "gate, silu(gate), up, and the input of down_proj": 4 * model.n_inner,
    }
    normed = 2 * d if norms_train else 0  # RMSNorm multiplies by its weights last
    return Kept(in_product_type, {"inputs of the two norms": 2 * d, "normed": normed, "inverse roots": 2})


BLOCK_KEEPS: dict[str, Callable[[Any, bool, bool], Kept]] = {"gpt2": _gpt2, "llama": _llama}
"""What a block of each family keeps.

Arguments: the config; whether attention takes keys and values copied to as many heads as queries have (it does but for
flash attention on a GPU: `models.kernels.attention`); whether weights of norms train.
"""
DROPOUT_MASKS = 2  # behind each of the two output projections, in the product's type
ATTENTION_DROPOUT = 3  # on a CPU: tensors [rows, heads, L, L] of attention written out (counted in fp32; fewer in bf16)

# Bytes per logit of a block (models.vocabulary): the product in half precision, taken once (SFT) or twice, or in fp32.
# What is made of a slice of it in fp32 comes on top, per logit of the slice: itself, exp of it and their product
# (entropy).
LOGIT_BYTES, LOGIT_BYTES_TAKEN_ONCE = 4, 2
SLICE_BYTES = 12
SAMPLED_LOGIT_BYTES = 12  # per logit of a sampling step: logits, tempered, exponentiated
TABLE_WORK = 2  # gradients of a token table that trains, [V, d] wide, at the same time beside the one it accumulates to

# On a CPU: what the heap loses to holes during a pass, as a share of the activations, by the bytes of the product type.
# glibc (2.36) does not reuse the place of a freed tensor for one of the same size, because torch asks for aligned
# memory; the temporaries between the tensors that stay leave such holes, most of all the two outputs of every adapter.
# Measured on GPT-2 124M, as is the fact that they vanish when every tensor is mapped by itself (docs/memory.md).
HEAP_HOLES, HEAP_HOLES_OF_ADAPTERS = {2: 0.4, 4: 0.3}, {2: 0.45, 4: 0.38}


def kept_per_token(model: ModelConfig, dtype: torch.dtype, device: str, length: int, method: str) -> int:
    """Bytes that one block keeps of one token of a row of `length`, for the backward pass.

    dtype: of the products. method: of `freeze_weights`, or "frozen".
    """
    size = dtype.itemsize
    copied_heads = device == "cpu" or dtype != torch.bfloat16  # as in models.kernels.attention
    found = BLOCK_KEEPS[model.family](model, copied_heads, method in ("none", "last_block"))
    kept = sum(found.in_product_type.values()) * size + sum(found.wide.values()) * 4
    kept += 4 * model.n_head  # attention's log-sums
    if model.dropout:
        kept += model.n_embd * DROPOUT_MASKS * size
        if device == "cpu":
            kept += ATTENTION_DROPOUT * model.n_head * length * size
    elif device == "cpu" and dtype == torch.bfloat16:
        kept -= 4 * model.n_head  # attention by blocks (models/cpu/attention.py) makes its sums again
    return kept


def stream_per_token(model: ModelConfig) -> int:
    """Bytes of one token's residual stream, which is what a recomputed block keeps."""
    return 4 * model.n_embd


def blocks_that_keep(model: ModelConfig, method: str) -> int:
    """Blocks whose tensors a backward pass needs: those from the lowest one that trains upwards."""
    return {"frozen": 0, "last_block": 1}.get(method, model.n_layer)


@dataclass(frozen=True)
class Weights:
    """Bytes and numbers of one model's parameters."""

    trained: int  # numbers, each of 4 bytes
    trained_adapters: int  # those of them in adapters
    base: int  # bytes of what is frozen and equal in every model with this base
    own: int  # bytes of frozen adapters and heads
    trained_matrices: int  # numbers in the projections' weights
    all_matrices: int
    table: int  # numbers in the table that projects onto the vocabulary
    table_trains: bool

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return 4 * self.trained + self.base + self.own


@lru_cache(maxsize=64)
def count_weights(role: str, model: ModelConfig, method: str, dtype: torch.dtype) -> Weights:
    """Build the model without memory, freeze it as `training.start` would, and count.

    Args:
        role: "lm", "critic" or "reward". method: a method of `freeze_weights`, or "frozen". dtype: of the products.
    """
    with torch.device("meta"):
        module = new_model(model, role)
    if method == "frozen":
        module.requires_grad_(False)
    else:
        freeze_weights(module, method)
    round_frozen(module, dtype)
    trains = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: p.nbytes for name, p in module.named_parameters() if not p.requires_grad}
    own = sum(size for name, size in frozen.items() if is_adapter(name) or name.startswith("head."))
    matrices = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    table = module.output_table
    return Weights(
        trained=sum(trains.values()),
        trained_adapters=sum(count for name, count in trains.items() if is_adapter(name)),
        base=sum(frozen.values()) - own,
        own=own,
        trained_matrices=sum(w.numel() for w in matrices if w.requires_grad),
        all_matrices=sum(w.numel() for w in matrices),
        table=table.numel(),
        table_trains=table.requires_grad,
    )
