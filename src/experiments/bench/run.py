"""The benchmark: ours against the peers, alternating, every measurement in a process of its own.

    make bench                                                    # the peers' environment, then the whole table
    python src/experiments/main.py -t bench --only sampling_b8    # one row
    python src/experiments/main.py -t bench --kernels             # what the forms of models/cpu gain, each by itself
    python src/experiments/main.py -t bench --device cuda         # every preset on a GPU under a 16 GB cap
    python src/experiments/main.py -t bench --merge A.json B.json # the ratios of several hosts, from their --json files

Each peer is measured twice: tuned, with what ours has and it can have too (peers.py), and with its defaults.

This file loads neither torch nor a peer: a process's peak memory begins with that of the one that started it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config.model_configs import get_configs
from config.user_error import UserError
from experiments.bench.host import TOO_MUCH, Stolen, describe_machine
from experiments.bench.table import Figures, Row, as_json, gpu_markdown, hosts_markdown, markdown, scaling_markdown
from experiments.bench.work import WORKS, Work, gpu_works, scaling_works
from utils.runs.folder import REPO

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = REPO / ".venv-bench/bin/python"
OURS, PEERS = "ours.py", "peers.py"
BUSY = 0.7  # a load above this means that somebody else is computing
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""What `training.engine.host_memory` sets for ours, for a tuned peer: freed memory is kept (man mallopt)."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `-t bench`."""
    names = ", ".join(work.name for work in WORKS)
    parser.add_argument("--only", default="", help=f"rows to measure, with commas between them, of: {names}")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours and the peer are measured in turn")
    parser.add_argument("--json", default="", metavar="FILE", help="write the results there as well")
    parser.add_argument("--merge", nargs="+", default=[], metavar="FILE", help="only make a table of such files")
    parser.add_argument("--scaling", action="store_true", help="cost against batch, response length and model size")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: every preset, ours alone")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="cap of the GPU's memory, with --device cuda")
    parser.add_argument("--kernels", action="store_true", help="only what each of the CPU's faster forms gains")
    parser.add_argument("--peers", default=str(PEERS_PYTHON), help="the peers' Python, made by `make bench`")
    parser.add_argument("--nanogpt", default="", metavar="FOLDER", help="a clone of nanoGPT, for its row")


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Parse the flags of `-t bench` and run it."""
    add_flags(parser)
    return measure_all(parser.parse_args(rest))


def measure_all(flags: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON; 1 when a work of ours failed, UserError for wrong flags."""
    check(flags)
    if flags.merge:
        print(hosts_markdown([(name, report_in(name)) for name in flags.merge]))
        return 0
    works = chosen(gpu_works(flags.memory_gb) if flags.device == "cuda" else WORKS, flags.only)
    machine, stolen = describe_machine(flags.rounds), Stolen()
    if machine["load"] > BUSY:
        print(f"warning: the load is {machine['load']:.1f}; other work makes these timings worthless", file=sys.stderr)
    if flags.kernels:
        print(importlib.import_module("experiments.bench.kernels").table(flags.rounds, machine))  # loads torch
        return 0
    if flags.device == "cuda":
        rows = [measure_row(work, flags) for work in works]
        machine["stolen"] = told(stolen, "the whole run")
        machine["mfu"] = {row.work.name: row.utilisation for row in rows}
        print(gpu_markdown(rows, machine))
    else:
        bounds = [measure_bounds()]
        rows = [measure_row(work, flags) for work in works]
        bounds.append(measure_bounds())  # before and after: they have to hold for the whole of the run
        machine |= {"bounds": middle(bounds), "stolen": told(stolen, "the whole run")}
        print(markdown(rows, machine))
    scaling = []
    if flags.scaling:
        alone = argparse.Namespace(**{**vars(flags), "rounds": 1})
        scaling = [measure_row(work, alone) for work in scaling_works()]
        print("\n" + scaling_markdown(scaling, machine))
    if flags.json:
        Path(flags.json).write_text(json.dumps(as_json(rows, machine, scaling), indent=2) + "\n")
    # A preset that does not fit the cap is a result of the GPU's table.
    failed = [row.ours.missing for row in [*rows, *scaling] if row.ours.missing]
    return 1 if any(flags.device == "cpu" or "OutOfMemoryError" not in reason for reason in failed) else 0


def check(flags: argparse.Namespace) -> None:
    """Refuse what would only fail after minutes."""
    if flags.rounds < 1:
        raise UserError(f"--rounds {flags.rounds}: must be 1 or more")
    if flags.json and not Path(flags.json).absolute().parent.is_dir():
        raise UserError(f"--json {flags.json}: its folder is not there; give a file in a folder that is")
    if flags.nanogpt and not (Path(flags.nanogpt) / "model.py").is_file():
        raise UserError(f"--nanogpt {flags.nanogpt}: holds no model.py; give a clone of nanoGPT")
    if flags.device == "cuda":
        if flags.scaling:
            raise UserError("--scaling: is measured on the CPU; leave --device cuda out")
        code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", code]).returncode:
            raise UserError("--device cuda: this machine has none that torch can see")


def report_in(file: str) -> dict[str, Any]:
    """What an earlier run's --json wrote; UserError where the file is not there, or not such a report."""
    try:
        report = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--merge {file}: cannot be read ({error}); give files that --json wrote") from None
    if not isinstance(report, dict) or not {"machine", "rows"} <= set(report):
        raise UserError(f"--merge {file}: is no report of this benchmark; give files that --json wrote")
    return report


def chosen(works: Sequence[Work], only: str) -> list[Work]:
    """The works that --only names, in the table's order; all when it is empty."""
    if not only:
        return list(works)
    names = only.split(",")
    unknown = sorted(set(names) - {work.name for work in works})
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: there are {', '.join(work.name for work in works)}")
    return [work for work in works if work.name in names]


def measure_row(work: Work, flags: argparse.Namespace) -> Row:
    """All rounds of one work, ours and both peers in turn; a side that failed once is not tried again."""
    row, stolen = Row(replace(work, sizes=sizes_of(work.preset))), Stolen()
    for turn in range(flags.rounds):
        profiled = replace(row.work, profiled=turn == flags.rounds - 1 and flags.device == "cpu")
        sides = [("ours", row.ours, OURS, sys.executable, profiled)]
        if work.peer:
            plain = replace(row.work, tuned=False)
            sides += [("tuned peer", row.peer, PEERS, flags.peers, row.work)]
            sides += [("peer with its defaults", row.plain, PEERS, flags.peers, plain)]
        for name, figures, script, python, given in sides:
            if not figures.missing:
                print(f"{work.name}, round {turn + 1} of {flags.rounds}: {name}", file=sys.stderr, flush=True)
                allocator = ALLOCATOR if script == PEERS and given.tuned else {}
                take(figures, script, given, python, {"NANOGPT_FOLDER": flags.nanogpt} | allocator)
    row.stolen = told(stolen, work.name)
    return row


def told(stolen: Stolen, what: str) -> float | None:
    """The share of stolen time until now, with a warning when it spoils `what`."""
    share = stolen.share()
    if share is not None and share > TOO_MUCH:
        print(f"warning: {what}: the host gave {share:.0%} of the cores' time to other guests", file=sys.stderr)
    return share


def take(figures: Figures, script: str, work: Work, python: str, environment: dict[str, str]) -> None:
    """One measurement; what goes wrong in it is kept in the table and does not end the run."""
    try:
        figures.add(child(script, work, python, environment))
    except RuntimeError as error:
        figures.missing = str(error)


def child(script: str, work: Work, python: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a measuring script to its end and read its answer; of malloc's settings it has those in `environment` alone.

    RuntimeError where it did not answer; the message is the end of its output.
    """
    command = [python, str(HERE / script), work.to_json()]
    offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean | offline | (environment or {}))
        return json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except OSError:
        raise RuntimeError(f"{python} is not there: make bench") from None
    except ValueError:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1][:300]}") from None


def sizes_of(preset: str) -> dict[str, Any]:
    """A preset's sizes as plain values, for the peers and the bounds."""
    return asdict(get_configs(preset))


def measure_bounds() -> dict[str, Any]:
    """What the hardware does at the sizes of GPT-2 124M."""
    return child(OURS, Work("bounds", "bounds", "", sizes=sizes_of("gpt2")), sys.executable)


def middle(bounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several measurements of the bounds."""
    medians = {key: statistics.median(b[key] for b in bounds) for key in ("bandwidth", "matrix_flops")}
    for key in ("products_tokens_s", "packed_tokens_s"):
        medians[key] = {batch: statistics.median(b[key][batch] for b in bounds) for batch in bounds[0][key]}
    return medians | {"threads": bounds[0]["threads"]}
