"""What the hardware allows: memory bandwidth and matrix rate, measured, and how much of each a work needs at least.

Counts follow the usual rules: a matrix of n weights costs 2n FLOP per token forward and 4n backward, of which LoRA
saves the 2n for the frozen weights' gradient (PaLM, Chowdhery et al. 2022, appendix B; LoRA, Hu et al. 2021). L blocks,
d channels, V vocabulary, B rows, P prompt and T response tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from experiments.bench.work import Work, median_seconds, run_child

_BF16 = 2  # bytes


@dataclass(frozen=True)
class Hardware:
    """bandwidth: bytes/s of a plain read of the model's bf16 weights. matrix_flops: bf16 FLOP/s of a large product."""

    bandwidth: float
    matrix_flops: float


def block_weights(sizes: dict[str, int]) -> int:
    """Matrix elements of all blocks: 12 L d^2."""
    return 12 * sizes["n_layer"] * sizes["n_embd"] ** 2


def head_weights(sizes: dict[str, int]) -> int:
    """Matrix elements of the output projection: V d."""
    return sizes["vocab_size"] * sizes["n_embd"]


def weight_bytes(work: Work) -> float:
    """Bytes of one pass over the bf16 weights."""
    return _BF16 * (block_weights(work.sizes) + head_weights(work.sizes))


def training_flops(work: Work) -> float:
    """FLOP of one training step per token of its rows: 6 per weight, 4 where the weights are frozen, and attention.

    A reward model has no output projection to speak of.
    """
    weights = block_weights(work.sizes) + (0 if work.kind == "rm" else head_weights(work.sizes))
    return (4 if work.preset.endswith("/lora") else 6) * weights + 6 * _attention(work)


def iteration_flops(work: Work) -> float:
    """FLOP of a PPO iteration: sampling, one look by all four roles, `epochs` passes of actor and critic.

    Only response columns meet the vocabulary, and only in actor and reference.
    """
    tokens, answers = work.batch * (work.prompt + work.new), work.batch * work.new
    trunk = tokens * (2 * block_weights(work.sizes) + 2 * _attention(work))
    head = answers * 2 * head_weights(work.sizes)
    passes = 2 if work.preset.endswith("/lora") else 3  # forward and backward in units of the forward pass
    rollout, look = trunk + head, 4 * trunk + 2 * head
    return rollout + look + work.epochs * passes * (2 * trunk + head)


def _attention(work: Work) -> float:
    """Multiply-adds of scores and weighted sum per token: L d S, a causal half of 2 L d S."""
    return work.sizes["n_layer"] * work.sizes["n_embd"] * (work.prompt + work.new)


def bound(work: Work, hardware: Hardware) -> float | None:
    """The best figure that the hardware allows for a work, in its unit; None where none is derived.

    Sampling reads every weight once per step at the measured bandwidth. Training does its FLOP at the measured matrix
    rate. A PPO iteration does both one after another: its rollout cannot be faster than sampling's bound.
    """
    if work.kind == "sampling":
        return work.batch * hardware.bandwidth / weight_bytes(work)
    if work.kind in ("sft", "rm"):
        return hardware.matrix_flops / training_flops(work)
    if work.kind == "ppo":
        rollout = work.new * weight_bytes(work) / hardware.bandwidth
        return rollout + iteration_flops(work) / hardware.matrix_flops
    return None


def flop_share(work: Work, value: float, matrix_flops: float) -> float:
    """Share of the measured matrix rate that a work's figure stands for: its model FLOP utilisation (MFU)."""
    if work.kind == "sampling":
        needed = value * (2 * (block_weights(work.sizes) + head_weights(work.sizes)) + 2 * _attention(work))
    elif work.kind == "ppo":
        needed = iteration_flops(work) / value
    else:
        needed = value * training_flops(work)
    return needed / matrix_flops


def half_type(device: str) -> torch.dtype:
    """bf16, or fp16 on a GPU that only emulates it."""
    import torch

    from config.devices import choose_dtype

    return torch.float16 if choose_dtype("auto", device) == "fp16" else torch.bfloat16


def matrix_flops(device: str = "cpu") -> float:
    """Measured FLOP/s of a product of two square matrices in half precision."""
    import torch

    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=half_type(device)) for _ in range(2))
    return 2 * n**3 / _median_seconds(lambda: a @ b, device)


def read_bandwidth(count: int) -> float:
    """Measured bytes/s of reading `count` bytes, more than the caches hold, once per pass."""
    import torch

    data = torch.ones(count // 4)
    return 4 * len(data) / _median_seconds(data.sum)


def weights_pass(sizes: dict[str, int], batch: int, packed: bool = False) -> float:
    """Measured seconds of the matrix products of one decoding step and nothing else, each weight read once.

    The plain read's bound takes arithmetic for free; this one does not. `packed`: in the layout that oneDNN reads
    fastest (`models.cpu.packing`), where there is one; else as `F.linear` does it, which rearranges a weight at every
    call.
    """
    import torch
    import torch.nn.functional as F

    from models.cpu.packing import pack, packed_linear

    d = sizes["n_embd"]
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * sizes["n_layer"] + [(sizes["vocab_size"], d)]
    inputs = {n: torch.randn(batch, n, dtype=torch.bfloat16) for n in (d, 4 * d)}
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    pairs = [(inputs[w.shape[1]], pack(w) if packed else None, w) for w in weights]
    return _median_seconds(
        lambda: [F.linear(x, w) if layout is None else packed_linear(x, layout, None) for x, layout, w in pairs]
    )


def _median_seconds(once: Callable[[], Any], device: str = "cpu") -> float:
    def finished() -> None:
        once()
        synchronise(device)

    return median_seconds(Work("bounds", "", "", warmup=2, repeats=7), finished)


def synchronise(device: str) -> None:
    """Wait for the GPU, so that a clock read afterwards has seen all work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def measure(work: Work) -> dict[str, Any]:
    """Bandwidth, matrix rate, the weights' products at batch 8 and 32 in tokens/s, and the threads all have."""
    import torch

    torch.set_grad_enabled(False)
    return {
        "bandwidth": read_bandwidth(int(weight_bytes(work))),
        "matrix_flops": matrix_flops(),
        "products_tokens_s": {str(b): b / weights_pass(work.sizes, b) for b in (8, 32)},
        "packed_tokens_s": {str(b): b / weights_pass(work.sizes, b, packed=True) for b in (8, 32)},
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    run_child(measure)
