"""A piece of work on a GPU recorded as a CUDA graph: replayed, its kernels follow each other without Python in between.

A decoding step of GPT-2 124M is some 240 kernels and one of SmolLM2-135M over a thousand, each of a few microseconds:
the GPU waits for their launches three quarters of the time (an H100, docs/gpu.md). Recorded, GPT-2's sampling
was 2.9 times faster there, with the tokens of a growing cache; PPO has not been run with it. Until it has, it is off,
and RLHF_GRAPHS=1 in the environment switches it on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def serves(device: torch.device) -> bool:
    """Whether work on a device is recorded."""
    return device.type == "cuda" and os.environ.get("RLHF_GRAPHS", "") == "1"


def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record `work` and return what replays it; where that fails, `work` itself, and a line on stderr.

    Args:
        work: reads and writes the same memory whenever it is called, waits for nothing, and was called before (so that
            libraries have what they need). Its result is overwritten by the next replay.
    """
    graph, pool, now, beside = torch.cuda.CUDAGraph(), _pool(), torch.cuda.current_stream(), _stream()
    beside.wait_stream(now)
    try:
        # Not `torch.cuda.graph`, which gives all unused memory back first: the next pass would ask for it anew.
        with torch.cuda.stream(beside):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        _tell(" ".join(str(error).split())[:200])
        return work
    finally:
        now.wait_stream(beside)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@cache
def _pool() -> tuple[int, int]:
    """Memory that all recordings share; it stays as long as one recording in it does, and the first always does."""
    pool, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, pool=pool):
        torch.zeros(1, device="cuda")
    _keepers.append(keeper)
    return pool


_keepers: list[torch.cuda.CUDAGraph] = []


@cache
def _tell(reason: str) -> None:
    print(f"sampling goes on without a CUDA graph, several times slower ({reason})", file=sys.stderr)
