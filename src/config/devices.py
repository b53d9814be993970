"""Which device a command runs on, and in which precision: --device and --dtype of every script."""

from __future__ import annotations

import torch

from config.user_error import UserError

TORCH_TYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str) -> str:
    """The device type for --device: auto takes CUDA, then MPS, then the CPU. UserError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, present in there.items() if present)
    if not there[wanted]:
        raise UserError(f"--device {wanted}: this machine has none that torch can see; use --device auto or cpu")
    return wanted


def choose_dtype(wanted: str, device: str) -> str:
    """The matrix precision for --dtype on a device type: fp32, bf16 or fp16.

    auto takes bf16 only where the hardware computes it: a T4 (compute capability 7.5) says that it supports bf16 and
    emulates it.

    Raises:
        UserError: fp16 without CUDA, or bf16 on a GPU without it.
    """
    native_bf16 = device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if wanted == "auto":
        return "fp32" if device != "cuda" else "bf16" if native_bf16 else "fp16"
    if wanted == "fp16" and device != "cuda":
        raise UserError(f"--dtype fp16: needs CUDA for loss scaling, not {device}; use fp32 or bf16")
    if wanted == "bf16" and device == "cuda" and not native_bf16:
        raise UserError("--dtype bf16: this GPU only emulates it (compute capability below 8.0); use fp16 or auto")
    return wanted


def sum_in_full_precision() -> None:
    """Keep cuBLAS from adding up partial sums in half precision, which log-probabilities do not survive."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def describe_device(device: torch.device, dtype: str) -> str:
    """One line for the start of a run and its record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({name}), {dtype}"
