"""The blocks of a model one after another: what the trunks of all families have in common.

Shapes: B rows, L tokens in this call, d channels, N chosen columns. With `at` [N], indices into the B * L flattened
columns, only those are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.cache import KVCache


def select_columns(x: Tensor, at: Tensor | None) -> Tensor:
    """The columns `at` [N] of x [B, L, d] as [N, d]; all of x without `at`."""
    return x if at is None else x.flatten(0, 1)[at]


def run_blocks(
    trunk: nn.Module, blocks: Iterable[nn.Module], x: Tensor, inputs: tuple, cache: KVCache | None, at: Tensor | None
) -> Tensor:
    """x [B, L, d] through every block; [B, L, d], or [N, d] with `at`.

    Args:
        trunk: says by its config and mode whether blocks are computed again in the backward pass.
        blocks: called as `block(x, *inputs, cache, layer, at)`.
        inputs: what every block gets beside x.
    """
    blocks, columns = list(blocks), x.shape[1]
    recompute = trunk.config.activation_checkpointing and trunk.training and cache is None and torch.is_grad_enabled()
    for layer, block in enumerate(blocks):
        # Behind the last attention no column looks at another: the rest is computed where it is asked for.
        wanted = at if layer == len(blocks) - 1 else None
        if recompute:
            # Non-reentrant: the reentrant form gives adapters no gradient when the embeddings are frozen.
            x = checkpoint(block, x, *inputs, None, 0, wanted, use_reentrant=False)
        elif cache is None:
            x = block(x, *inputs, None, 0, wanted)  # always 0: for each other number torch.compile would begin anew
        else:
            # Never compiled (`training.engine.compiling`): a cache has another shape at every call.
            x = block.forward(x, *inputs, cache, layer, wanted)
    if cache is not None:
        cache.length += columns
    return x
