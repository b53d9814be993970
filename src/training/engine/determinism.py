"""The same bits again: what --deterministic switches on, and what that costs."""

from __future__ import annotations

import os

import torch


def set_deterministic(on: bool) -> None:
    """Choose kernels whose sums have one order, or let torch choose the fastest.

    With it on, an operation that has no such kernel raises instead of giving other bits from run to run.
    """
    if on == torch.are_deterministic_algorithms_enabled():
        return  # setting it makes torch import its compiler, a second or two
    if on:
        # cuBLAS reads it when it starts; with its own choice of workspaces streams may add in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    # Of the fused attention kernels flash and memory-efficient have a backward pass of fixed order, which torch takes
    # now; cuDNN's is left out.
    torch.backends.cuda.enable_cudnn_sdp(not on)


def cost_of_determinism(device: torch.device) -> str:
    """One line on the price and the reach of the promise."""
    if device.type == "cpu":
        return (
            f"the same bits with {torch.get_num_threads()} threads on this machine with these versions; on a CPU it "
            "costs no time to speak of"
        )
    return (
        "the same bits on this kind of GPU with these versions; attention's backward pass, scatter and index sums take "
        "slower kernels"
    )
