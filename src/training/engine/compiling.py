"""`--compile`: the blocks of the models that train through torch.compile, or as they are where that does not work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch._dynamo
from torch import nn

from config.model_configs import ModelConfig
from models.causal_lm import CausalLM

# Rows and columns of the trials: lengths vary from batch to batch, and few tokens take other ways (models.kernels).
_TRIALS = ((16, 5), (24, 7))


def compile_blocks(module: nn.Module, autocast: Callable[[], AbstractContextManager]) -> bool:
    """Compile every transformer block inside a module, in place; names of parameters stay as they are.

    A forward and a backward pass on made-up rows find out whether it works here; gradients are cleared and random
    generators put back.

    Args:
        module: on its device. autocast: makes the context of its forward passes.

    Returns:
        Whether the blocks are compiled now; if not, a line on stderr says why.
    """
    # By trunk: actor and critic may have the same (--share-adapter).
    models = {m.trunk: m for m in module.modules() if isinstance(m, CausalLM)}
    blocks = [block for model in models.values() for block in model.blocks]
    for block in blocks:
        block.compile(dynamic=True)
    try:
        for trunk, model in models.items():
            device = model.token_table.device
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                _try(trunk, model.config, device, autocast)
    except Exception as error:  # whatever a compiler may say
        for block in blocks:
            block._compiled_call_impl = None
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"--compile: torch.compile does not work here ({reason[:200]}); going on without it", file=sys.stderr)
        return False
    finally:
        module.zero_grad(set_to_none=True)
    torch._dynamo.config.suppress_errors = True  # a shape that still fails runs as it is, with torch's warning
    return True


def _try(
    trunk: nn.Module, config: ModelConfig, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> None:
    for rows, columns in _TRIALS:
        columns = min(columns, config.block_size)
        ids = torch.arange(rows * columns, device=device).view(rows, columns) % config.vocab_size
        for at in (None, torch.arange(0, rows * columns, 3, device=device)):  # the last block's two forms
            with autocast():
                out = trunk(ids, None, None, True, at)
            out.float().sum().backward()
