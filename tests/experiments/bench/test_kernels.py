"""-t bench --kernels: every kernel with and without, and a table of it."""

import argparse

import pytest

from experiments.bench import kernels as bench
from experiments.bench import run
from models import kernels

pytestmark = pytest.mark.slow

MACHINE = {"cpu": "a processor", "date": "2026-01-01", "load": 0.0}


@pytest.fixture
def tiny(monkeypatch):
    """The same cases of a few numbers each, called once a round."""
    for name, value in {"HEADS": 2, "HEAD": 4, "D": 8, "LAYERS": 1}.items():
        monkeypatch.setattr(bench, name, value)
    case = bench.one_query_case
    monkeypatch.setattr(bench, "one_query_case", lambda rows, keys, dtype: case(2, 5, dtype))
    for name in ("attention_case", "linear_case", "gelu_case", "packing_case"):
        made = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda rows, *columns, made=made: made(2, *(9 for _ in columns)))
    monkeypatch.setattr(kernels, "PLAIN", {"gelu"})


def test_each_way_is_timed_with_the_kernel_in_use_and_left_out(tiny):
    seen = []
    case = bench.Case("linear", "nothing", lambda: lambda: seen.append(set(kernels.PLAIN)))
    plain, fast = bench.measure(case, rounds=2, least=0.0)
    assert plain > 0 and fast > 0
    assert seen == [{"gelu", "linear"}, {"gelu"}] * 3  # once to make ready, and two rounds
    assert {"gelu"} == kernels.PLAIN


def test_the_table_has_every_kernel_and_the_machine(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run, "describe_machine", lambda rounds: MACHINE)
    assert run.run(argparse.ArgumentParser(), ["--kernels", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[0].strip("| ") for line in lines[2:-2]} == set(kernels.KERNELS)
    assert lines[-1].startswith("a processor, ") and "medians of 1 rounds" in lines[-1]
