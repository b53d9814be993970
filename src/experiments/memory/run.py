"""Memory of every preset and stage, as planned; and the plan held against measured runs.

python src/experiments/main.py -t memory                   # the table of docs/memory.md: peaks on a 16 GB GPU
python src/experiments/main.py -t memory --check           # 124M and 135M on this CPU: planned and measured peaks
python src/experiments/main.py -t memory --check --only 'ppo smollm2-135m/lora'
python src/experiments/main.py -t memory --check --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from config.configs import SFTConfig, stage_defaults
from config.devices import choose_device, choose_dtype
from config.model_configs import PRESETS, get_configs
from config.user_error import UserError
from experiments import markdown
from experiments.memory.check import STAGES, Case
from training.memory.device import CUDA_CONTEXT
from training.memory.plan import Sources
from training.memory.preflight import MARGIN, Planner

CHILD = Path(__file__).with_name("check.py")
CHECKED = ("gpt2", "gpt2/lora", "smollm2-135m", "smollm2-135m/lora")
TOLERANCE = 0.15


@dataclass(frozen=True)
class Cell:
    """A preset's stage on a GPU: peak in GB with the preset's own passes, whether that fits, and the largest passes."""

    peak: float
    fits: bool
    largest: int | None

    def __str__(self) -> str:
        if self.fits:
            return f"{self.peak:.1f} (to {self.largest:,})"
        return f"no: {self.peak:.1f}" + (f" (to {self.largest:,})" if self.largest else "")


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Parse the flags of `-t memory` and run it."""
    parser.add_argument("--gb", type=float, default=16.0, help="memory of the GPU that the table is for")
    parser.add_argument("--check", action="store_true", help="run each stage for two steps and measure its peak")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of --check; cuda: a GPU to itself")
    parser.add_argument("--only", default="", help="with --check: cases with these words, as in 'ppo gpt2/lora'")
    flags = parser.parse_args(rest)
    if flags.gb <= 0:
        raise UserError(f"--gb {flags.gb}: must be above 0")
    if flags.check:
        choose_device(flags.device)  # refuses one that is not there
        chosen = [case for case in cases(flags.device) if all(w in case.title().split() for w in flags.only.split())]
        return check_all(chosen)
    print(table(flags.gb))
    return 0


def presets() -> list[str]:
    """Every size with and without adapters; a /dropout variant needs what the plain one does."""
    return [name for name in PRESETS if not name.endswith("/dropout") and "-nano" not in name]


def cell(stage: str, preset: str, gb: float) -> Cell:
    """The plan of a stage with a preset's defaults, in bf16 on a GPU of `gb` GB."""
    config, sizes = stage_defaults(STAGES[stage], preset), get_configs(preset)
    # What a stage starts from was made with the same preset; no checkpoint need be there.
    sources = Sources(sizes, sizes if stage == "ppo" else None)
    planner = Planner(sources, "cuda", "bf16", CUDA_CONTEXT, gb * 1e9)
    return Cell(planner.plan(config).peak / 1e9, planner.fits(config), planner.largest_passes(config))


def table(gb: float) -> str:
    """Markdown: planned peaks of all presets and stages."""
    rows = []
    for preset in presets():
        tokens = stage_defaults(SFTConfig, preset).tokens_per_micro_batch
        rows.append((f"`{preset}`", f"{tokens:,}", *(cell(stage, preset, gb) for stage in STAGES)))
    note = (
        f"Planned peaks in GB (1e9 bytes) on a GPU of {gb:g} GB in bf16, with rows of up to 1,024 tokens; in brackets "
        f'the largest `--tokens-per-micro-batch` that leaves {MARGIN:.0%} free. "no": it does not fit.'
    )
    return markdown.table("preset | tokens per pass | SFT | RM | PPO", rows) + f"\n\n{note}"


def cases(device: str = "cpu") -> Iterator[Case]:
    """The smallest of each family: every stage, all weights and LoRA, both precisions, short and long rows; and
    recomputed blocks.

    Half precision is bf16, or fp16 on a GPU that only emulates it.
    """
    half = "fp16" if choose_dtype("auto", device) == "fp16" else "bf16"
    every = itertools.product(((8, 128), (4, 512)), STAGES, CHECKED, (half, "fp32"))
    for (rows, length), stage, preset, dtype in every:
        yield Case(stage, preset, dtype, rows, length, device=device)
    yield Case("sft", "gpt2", half, 4, 512, activation_checkpointing=True, device=device)
    yield Case("ppo", "gpt2/lora", half, 4, 512, activation_checkpointing=True, device=device)


def check_all(chosen: list[Case]) -> int:
    """Measure every case in a process of its own and print planned / measured; 1 when one is off by more than 15 %.

    Raises:
        UserError: no case has these words.
    """
    if not chosen:
        raise UserError("--only: no case has all these words; leave it out to see the titles")
    print("| run | planned GB | measured GB | planned / measured |\n|---|---|---|---|", flush=True)
    off = 0
    for case in chosen:
        done = subprocess.run([sys.executable, str(CHILD), json.dumps(asdict(case))], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"| {case.title()} | failed: {reason[:200]} | | |", flush=True)
            off += 1
            continue
        found = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        planned, measured = found["predicted_gb"], found["measured_gb"]
        off += abs(planned / measured - 1) > TOLERANCE
        print(f"| {case.title()} | {planned:.2f} | {measured:.2f} | {planned / measured:.3f} |", flush=True)
    print(f"\n{len(chosen) - off} of {len(chosen)} within {TOLERANCE:.0%}")
    return 1 if off else 0
