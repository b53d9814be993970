"""What the hardware allows: how much of its measured memory bandwidth and matrix rate a work needs at least.

Counts follow the usual rules: a matrix of n weights costs 2n FLOP per token forward and 4n backward, of which LoRA
saves the 2n for the frozen weights' gradient (PaLM, Chowdhery et al. 2022, appendix B; LoRA, Hu et al. 2021). L blocks,
d channels, V vocabulary, B rows, P prompt and T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.bench.work import Work

_BF16 = 2  # bytes


@dataclass(frozen=True)
class Hardware:
    """bandwidth: bytes/s of a plain read of the model's bf16 weights. matrix_flops: bf16 FLOP/s of a large product."""

    bandwidth: float
    matrix_flops: float


def block_weights(sizes: dict[str, Any]) -> int:
    """Matrix elements of all blocks: 12 L d^2 of a GPT-2; of a LLaMA what its heads and its inner width make."""
    d = sizes["n_embd"]
    if sizes["family"] == "gpt2":
        return 12 * sizes["n_layer"] * d**2
    heads = 2 * sizes["head_dim"] * (sizes["n_head"] + sizes["n_kv_head"])
    return sizes["n_layer"] * d * (heads + 3 * sizes["n_inner"])


def head_weights(sizes: dict[str, Any]) -> int:
    """Matrix elements of the output projection: V d."""
    return sizes["vocab_size"] * sizes["n_embd"]


def weight_bytes(work: Work) -> float:
    """Bytes of one pass over the bf16 weights."""
    return _BF16 * (block_weights(work.sizes) + head_weights(work.sizes))


def flops(work: Work) -> float:
    """FLOP that a work needs per token, or per iteration of PPO.

    Training: 6 per weight, 4 where the weights are frozen, and attention. A reward model has no output projection to
    speak of. A PPO iteration is sampling, one look by all four roles, and `epochs` passes of actor and critic; only
    response columns meet the vocabulary, and only in actor and reference.
    """
    blocks, head, lora = block_weights(work.sizes), head_weights(work.sizes), work.preset.endswith("/lora")
    # Multiply-adds of scores and weighted sum per token: L d S, a causal half of 2 L d S.
    attention = work.sizes["n_layer"] * work.sizes["n_embd"] * (work.prompt + work.new)
    if work.kind == "sampling":
        return 2 * (blocks + head) + 2 * attention
    if work.kind != "ppo":
        return (4 if lora else 6) * (blocks + (0 if work.kind == "rm" else head)) + 6 * attention
    tokens, answers = work.batch * (work.prompt + work.new), work.batch * work.new
    trunk, logits = tokens * (2 * blocks + 2 * attention), answers * 2 * head
    passes = 2 if lora else 3  # forward and backward in units of the forward pass
    rollout, look = trunk + logits, 4 * trunk + 2 * logits
    return rollout + look + work.epochs * passes * (2 * trunk + logits)


def bound(work: Work, hardware: Hardware) -> float | None:
    """The best figure that the hardware allows for a work, in its unit; None where none is derived.

    Sampling reads every weight once per step at the measured bandwidth. Training does its FLOP at the measured matrix
    rate. A PPO iteration does both one after another: its rollout cannot be faster than sampling's bound.
    """
    if work.kind == "sampling":
        return work.batch * hardware.bandwidth / weight_bytes(work)
    if work.kind in ("sft", "rm"):
        return hardware.matrix_flops / flops(work)
    if work.kind == "ppo":
        return work.new * weight_bytes(work) / hardware.bandwidth + flops(work) / hardware.matrix_flops
    return None


def flop_share(work: Work, value: float, matrix_flops: float) -> float:
    """Share of the measured matrix rate that a work's figure stands for: its model FLOP utilisation (MFU)."""
    needed = flops(work)
    return (value * needed if work.faster_is_larger else needed / value) / matrix_flops
