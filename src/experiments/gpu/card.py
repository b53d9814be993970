"""The GPU itself: its rates, its memory, and clocks that wait for it. On a CPU what can be done is done."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch

from config.devices import choose_dtype
from experiments.bench.ours import matrix_flops, probe_seconds, synchronise

# Dense products in half precision, FLOP/s, by words in the card's name, the first that fits; from NVIDIA's data sheets.
PEAKS = (
    ("H100 PCIe", 756e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12),
    ("A10", 125e12), ("RTX 4090", 165e12), ("T4", 65e12), ("V100", 125e12),
)  # fmt: skip
_COPIED = 2**31  # bytes, far more than a cache holds


class Card:
    """A device and what it can do at most.

    memory_gb: the cap under which models run; 0 for none.
    """

    def __init__(self, device: str, memory_gb: float = 0.0) -> None:
        self.device, self.memory_gb = device, memory_gb
        self.gpu = device == "cuda"
        self.dtype = "bf16" if device == "cpu" else choose_dtype("auto", device)

    @cached_property
    def measured_flops(self) -> float:
        """FLOP/s of a large product in half precision, measured."""
        return matrix_flops(self.device)

    @property
    def told_flops(self) -> float | None:
        """FLOP/s that the data sheet gives; None for a card that is not in the table."""
        name = torch.cuda.get_device_name() if self.gpu else ""
        return next((peak for words, peak in PEAKS if words in name), None)

    @property
    def peak_flops(self) -> float:
        """What MFU is a share of: the data sheet's figure, or the measured one."""
        return self.told_flops or self.measured_flops

    @cached_property
    def copy_rate(self) -> float:
        """Bytes/s, read and written, of a copy from the device to itself, measured."""
        data = torch.empty(_COPIED if self.gpu else 2**26, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(data)
        return 2 * data.numel() / probe_seconds(partial(other.copy_, data), self.device)

    def rates(self) -> dict[str, Any]:
        """For the report."""
        return {
            "copies at TB/s": round(self.copy_rate / 1e12, 4),
            "products at TFLOP/s": round(self.measured_flops / 1e12, 4),
            "data sheet's TFLOP/s": self.told_flops and self.told_flops / 1e12,
            "memory cap in GB": self.memory_gb,
        }

    @contextlib.contextmanager
    def capped(self) -> Iterator[None]:
        """Leave torch's allocator the cap's memory alone."""
        if not (self.gpu and self.memory_gb):
            yield
            return
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory_gb * 1e9 / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def free(self) -> None:
        """Give back what nobody holds any more, and begin to count peaks anew."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, float] | None:
        """Bytes of tensors and bytes taken from the GPU at their peaks since `free`; None on a CPU."""
        if not self.gpu:
            return None
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def seconds(self, once: Callable[[], Any], warmup: int = 1, repeats: int = 3, enough: float = 1.5) -> float:
        """Median of up to `repeats` durations of `once`; fewer where they have taken `enough` seconds together."""
        for _ in range(warmup):
            once()
        spent: list[float] = []
        while len(spent) < repeats and sum(spent) < enough:
            synchronise(self.device)
            started = time.perf_counter()
            once()
            synchronise(self.device)
            spent.append(time.perf_counter() - started)
        return statistics.median(spent)
