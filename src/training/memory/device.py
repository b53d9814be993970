"""Which device is planned for, how much memory it has, and how much this process takes of it: free memory, control
groups, fractions of a GPU."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from config.configs import RunConfig
from config.devices import choose_device, choose_dtype
from training.engine.host_memory import resident_bytes

# What a process on a CPU takes later beside what is planned: lazy imports, a tokenizer, the scratch of threads and
# oneDNN. Measured, see docs/memory.md.
CPU_LATER = 0.12e9
# A GPU's context, kernels and cuBLAS workspaces: an estimate, not measured here.
CUDA_CONTEXT = 0.6e9


def target(config: RunConfig) -> tuple[str, str]:
    """Device and precision that are planned for. --plan-gb means a GPU with bf16 unless other flags say otherwise."""
    if not config.plan_gb:
        device = choose_device(config.device)
        return device, choose_dtype(config.dtype, device)
    device = "cuda" if config.device == "auto" else config.device
    return device, config.dtype if config.dtype != "auto" else "bf16" if device == "cuda" else "fp32"


def base_bytes(device: str) -> float:
    """What is taken beside models and their passes: this process with its imports done, or the GPU's context."""
    return CUDA_CONTEXT if device != "cpu" else resident_bytes() + CPU_LATER


def available_bytes(device: str) -> float:
    """What this process may hold in all on a device, with what it holds now; 0 where nobody tells.

    CPU: free memory, or what the control group (a container's) leaves where that is less. CUDA: free memory, or the
    fraction set with `torch.cuda.set_per_process_memory_fraction`.
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved()
        cap = torch.cuda.get_per_process_memory_fraction() * total
        return min(free, cap) + CUDA_CONTEXT  # the context exists by now: `free` is without it
    if device == "mps":
        return float(torch.mps.recommended_max_memory())
    told = [x for x in (free_bytes(), control_group_bytes()) if x is not None]
    return min(told) + resident_bytes() if told else 0.0


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024.0 if found else None


def control_group_bytes(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """What the control group leaves, its file cache counted as free; None without a limit."""
    for folder, limit, usage, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            found = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.M)
            return None if most >= 2**60 else max(0.0, most - used + (int(found[1]) if found else 0))
    return None
