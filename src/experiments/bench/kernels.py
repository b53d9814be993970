"""What the faster forms behind `models.kernels` gain on this processor: each with and without, in turn.

    python src/experiments/main.py -t bench --kernels

The shapes are those that the modules of `models.cpu` quote. A form that does not serve on this processor or at a shape
(a product in fp32 on an Intel processor, say) shows a gain of about 1: both columns are then torch's own way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments import markdown
from experiments.bench.host import Stolen
from models import kernels

HEADS, HEAD, D, LAYERS = 12, 64, 768, 12  # GPT-2 124M


@dataclass(frozen=True)
class Case:
    """A row of the table: a kernel's name in RLHF_PLAIN, what is timed, and how that is made ready to be called."""

    kernel: str
    what: str
    make: Callable[[], Callable[[], object]]


def random(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    """Random numbers of a shape."""
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def attention_case(rows: int, columns: int) -> Callable[[], object]:
    """Causal attention of one layer, forward and backward."""
    q, k, v = (random(rows, HEADS, columns, HEAD, dtype=torch.bfloat16, grad=True) for _ in range(3))
    grad = torch.ones_like(q)
    return lambda: kernels.attention(q, k, v, None, causal=True).backward(grad)


def one_query_case(rows: int, keys: int, dtype: torch.dtype) -> Callable[[], object]:
    """A query per row against keys in the cache, of all layers, as a decoding step has them."""
    q, cpu = random(rows, HEADS, 1, HEAD, dtype=dtype), torch.device("cpu")
    cache = []
    for _ in range(LAYERS):
        k = kernels.empty_keys(rows, HEADS, keys + 1, HEAD, cpu, dtype).normal_()
        cache.append((k[:, :, :keys], random(rows, HEADS, keys + 1, HEAD, dtype=dtype)[:, :, :keys]))
    return lambda: [kernels.attention_of_one(q, k, v, None) for k, v in cache]


def linear_case(rows: int) -> Callable[[], object]:
    """A linear layer in fp32, forward and backward."""
    x, weight = (random(n, D, dtype=torch.float32, grad=True) for n in (rows, 4 * D))
    bias, grad = random(4 * D, dtype=torch.float32, grad=True), torch.ones(rows, 4 * D)
    return lambda: kernels.linear(x, weight, bias).backward(grad)


def gelu_case(rows: int) -> Callable[[], object]:
    """GELU of a feed-forward layer, forward and backward."""
    x = random(rows, 4 * D, dtype=torch.bfloat16, grad=True)
    grad = torch.ones_like(x)
    return lambda: kernels.gelu(x).backward(grad)


def packing_case(rows: int) -> Callable[[], object]:
    """The products of all blocks in one decoding step."""
    inputs = {n: random(rows, n, dtype=torch.bfloat16) for n in (D, 4 * D)}
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * LAYERS
    plain = [random(*shape, dtype=torch.bfloat16) for shape in shapes]
    weights = [kernels.decoding_weight(weight, torch.bfloat16) for weight in plain]
    return lambda: [kernels.decoding_linear(inputs[w.shape[1]], w) for w in weights]


def cases() -> list[Case]:
    """The table's rows."""
    both, query = "forward and backward", f"a query for each of 32 rows, 127 keys, {LAYERS} layers"
    return [
        Case("attention", f"4 x 512 tokens, bf16, {both}", partial(attention_case, 4, 512)),
        Case("attention", f"8 x 128 tokens, bf16, {both}", partial(attention_case, 8, 128)),
        Case("attention", f"{query}, float32", partial(one_query_case, 32, 127, torch.float32)),
        Case("attention", f"{query}, bfloat16", partial(one_query_case, 32, 127, torch.bfloat16)),
        Case("linear", f"1024 x {D} -> {4 * D}, fp32, {both}", partial(linear_case, 1024)),
        Case("gelu", f"1024 x {4 * D} numbers, bf16, {both}", partial(gelu_case, 1024)),
        Case("packing", f"products of {LAYERS} blocks with 8 rows, bf16", partial(packing_case, 8)),
    ]


@contextmanager
def left_out(kernel: str, out: bool) -> Iterator[None]:
    """Within it the kernel is left out, or in use."""
    before = kernels.PLAIN
    kernels.PLAIN = before - {kernel} | ({kernel} if out else set())
    try:
        yield
    finally:
        kernels.PLAIN = before


def measure(case: Case, rounds: int, least: float = 0.05) -> tuple[float, float]:
    """Median seconds of a call by torch's own way and by ours, in turn, each time at least once and for `least`."""
    ways, spent = {}, {True: [], False: []}
    for plain in spent:
        torch.manual_seed(0)
        with left_out(case.kernel, plain):
            ways[plain] = case.make()
            ways[plain]()  # what is made at the first call
    for _ in range(rounds):
        for plain, once in ways.items():
            with left_out(case.kernel, plain):
                started, calls = time.perf_counter(), 0
                while not calls or time.perf_counter() - started < least:
                    once()
                    calls += 1
                spent[plain].append((time.perf_counter() - started) / calls)
    return statistics.median(spent[True]), statistics.median(spent[False])


def table(rounds: int, machine: dict[str, Any]) -> str:
    """Measure all cases; the table as Markdown, and the machine of `describe_machine`."""
    stolen = Stolen()
    rows = []
    for case in cases():
        plain, fast = measure(case, rounds)
        rows.append((case.kernel, case.what, f"{1e3 * plain:.2f} ms", f"{1e3 * fast:.2f} ms", f"{plain / fast:.2f}"))
    share = stolen.share()
    lost = "" if share is None else f", {share:.0%} of the cores' time stolen by other guests of the host"
    return (
        markdown.table("kernel | what | torch's own way | with it | gain", rows)
        + f"\n\n{machine['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {machine['date']}; "
        f"medians of {rounds} rounds; load {machine['load']:.1f} at the start{lost}."
    )
