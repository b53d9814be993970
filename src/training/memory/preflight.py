"""Before anything is loaded: will the run fit, and if not, which flags would make it fit? And what to do when memory
runs out all the same.

Every script prints the plan's peak against what the device has. Over budget it stops, and names flags in order of what
they cost: first those that change no result, then those that train less or see less. Each is verified by the same plan.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from config.configs import RunConfig, flag_of
from config.model_configs import get_configs
from config.terminal import outlive_terminal
from config.user_error import UserError
from training.memory.device import available_bytes, base_bytes, target
from training.memory.plan import MemoryPlan, Rows, Sources, plan_memory
from training.memory.sources import plan_sources
from training.start import freeze_method
from training.storage.resuming import Resumption
from utils.runs.finding import step_checkpoints

MARGIN = 0.1  # share of the memory that --tokens-per-micro-batch auto and the flags proposed leave free
_GRAIN = 64  # token budgets are searched in multiples of this
_SHOWN = 4  # ways out in the error

# Parts of what torch's allocators say where they raise a plain RuntimeError.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Planner:
    """Makes plans for variants of one run's settings."""

    sources: Sources
    device: str
    dtype: str
    base: float
    budget: float

    @classmethod
    def of(cls, config: RunConfig, resumption: Resumption | None = None) -> Planner:
        """For a run on the device that its flags choose; see `target` for --plan-gb."""
        device, dtype = target(config)
        budget = config.plan_gb * 1e9 if config.plan_gb else available_bytes(device)
        return cls(plan_sources(config, resumption), device, dtype, base_bytes(device), budget)

    @property
    def comfortable(self) -> float:
        """Bytes that leave the margin free; infinite where the device does not tell what it has."""
        return (1 - MARGIN) * self.budget if self.budget else float("inf")

    def plan(self, config: RunConfig) -> MemoryPlan:
        """The plan of a variant of the settings."""
        dtype = self.dtype if config.dtype == "auto" else config.dtype
        sources = replace(self.sources, sft=self.sources.sft.with_options(get_configs(config.config)))
        return plan_memory(config, sources, self.device, dtype, self.base)

    def fits(self, config: RunConfig) -> bool:
        """Whether it fits with the margin to spare."""
        return self.plan(config).peak <= self.comfortable

    def token_budgets(self, config: RunConfig) -> tuple[int, int]:
        """The smallest and the largest --tokens-per-micro-batch that make sense: one longest row, a whole step."""
        row = Rows.of(replace(config, tokens_per_micro_batch=1), self.sources.sft.block_size).tokens
        return math.ceil(row / _GRAIN) * _GRAIN, math.ceil(config.global_batch_size * row / _GRAIN) * _GRAIN

    def largest_passes(self, config: RunConfig) -> int | None:
        """The largest --tokens-per-micro-batch that fits, None if not even the longest row alone does."""
        low, high = self.token_budgets(config)
        budgets = range(low, high + 1, _GRAIN)
        fitting = bisect_left(budgets, True, key=lambda n: not self.fits(replace(config, tokens_per_micro_batch=n)))
        return budgets[fitting - 1] if fitting else None


def preflight(config: RunConfig, resumption: Resumption | None = None) -> RunConfig:
    """Print the plan; returns the config with `--tokens-per-micro-batch auto` resolved.

    With --plan the whole table is printed, and the caller should end. UserError where the plan is over budget.
    """
    planner = Planner.of(config, resumption)
    if config.tokens_per_micro_batch == "auto":
        config = with_auto(config, planner)
    plan = planner.plan(config)
    if config.plan:
        print(plan.table())
    for note in plan.notes:
        print(f"memory: {note}")
    there = f" of {planner.budget / 1e9:.1f} GB" if planner.budget else ""
    tokens = config.tokens_per_micro_batch
    passes = f"{tokens} tokens per micro-batch" if tokens else f"-b {config.batch_size}"
    rows = f"rows of up to {plan.longest} tokens"
    print(f"memory on {planner.device}, {planner.dtype}, {passes}, {rows}: {plan.summary(there)}")
    if planner.budget and plan.peak > planner.budget:
        raise UserError(over_budget(config, plan, planner))
    if plan.peak > planner.comfortable:
        print(f"warning: less than {MARGIN:.0%} of the memory would be left free")
    return config


def with_auto(config: RunConfig, planner: Planner) -> RunConfig:
    """`--tokens-per-micro-batch auto` resolved: what fits with the margin to spare, at least the longest row."""
    smallest = planner.token_budgets(config)[0]
    fitting = planner.largest_passes(config) if planner.budget else None
    return replace(config, tokens_per_micro_batch=fitting or smallest)


def over_budget(config: RunConfig, plan: MemoryPlan, planner: Planner) -> str:
    """The error: what is too much, and ways out, best first."""
    ways = [f"{flags} ({peak / 1e9:.1f} GB)" for flags, peak in ways_out(config, planner)]
    remedy = f"what would fit: {' | '.join(ways)}" if ways else "no flag makes it fit: take a smaller --config"
    return (
        f"memory: the plan needs {plan.peak / 1e9:.1f} GB ({plan.peak_phase}), {planner.device} has "
        f"{planner.budget / 1e9:.1f} GB; {remedy}"
    )


def ways_out(config: RunConfig, planner: Planner) -> list[tuple[str, float]]:
    """Flags that make a run fit with the margin to spare, and its peak with them, in order of least loss."""
    found: list[tuple[str, float]] = []
    for changes in variants(config, planner):
        changed = replace(config, **changes)
        if not (changes and planner.fits(changed)):
            tokens = planner.largest_passes(changed)
            if tokens is None:
                continue
            changes = changes | {"tokens_per_micro_batch": tokens}
            changed = replace(config, **changes)
        found.append((" ".join(_shown(*change) for change in changes.items()), planner.plan(changed).peak))
        if len(found) == _SHOWN:
            break
    return found


def variants(config: RunConfig, planner: Planner) -> Iterator[dict[str, Any]]:
    """Changes of settings in order of least loss; each is tried with the passes as they are, then with smaller ones.

    Same results: smaller passes, recomputed blocks. Nearly the same: bf16. Fewer weights train: adapters, the last
    block. Less is seen: shorter rows.
    """
    recompute = {} if config.activation_checkpointing else {"activation_checkpointing": True}
    yield {}
    if recompute:
        yield recompute
    half = {"dtype": "bf16"} if planner.dtype == "fp32" and planner.device == "cpu" else {}
    if half:
        yield half
    preset = get_configs(config.config)
    lora = {} if preset.lora_rank else {"config": f"{preset.stem}/lora"}
    if lora:
        if config.freeze != "auto":
            lora["freeze"] = "auto"
        yield lora
        if recompute:
            yield lora | recompute
    if freeze_method(config, preset) == "none":
        yield {"freeze": "last_block"}
    longest = Rows.of(replace(config, tokens_per_micro_batch=1), planner.sources.sft.block_size).longest
    for share in (2, 4, 8):
        if longest // share > 2 * getattr(config, "response_length", 0):
            yield lora | recompute | half | {"max_length": longest // share}


def _shown(field: str, value: Any) -> str:
    return flag_of(field) if value is True else f"{flag_of(field)} {value}"


# ---------------------------------------------------------------------------------------------------------------------
# When it runs out all the same
# ---------------------------------------------------------------------------------------------------------------------


def fit(trainer: Any, config: RunConfig) -> int:
    """`trainer.fit()`; when memory runs out, exit code 1 and a line on stderr: what to change, and where to go on.

    A run does not end with the terminal that it was started from: its results are files.
    """
    outlive_terminal()
    try:
        return trainer.fit()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory(config, trainer.run)}", file=sys.stderr)
        return 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def out_of_memory(config: RunConfig, run: Path) -> str:
    """What to change first, and the last checkpoint that is whole."""
    tokens, saved = config.tokens_per_micro_batch, step_checkpoints(run)
    kept = f"its checkpoint {saved[-1].name} is whole" if saved else f"no checkpoint had been written to {run}"
    if tokens and tokens > _GRAIN:
        change = f"lower --tokens-per-micro-batch from {tokens} to {max(_GRAIN, tokens // 2)}"
    elif not tokens and config.batch_size > 1:
        change = f"lower --batch-size from {config.batch_size} to {config.batch_size // 2}"
    elif not config.activation_checkpointing:
        change = "add --activation-checkpointing"
    else:
        family = get_configs(config.config).stem
        return f"out of memory: start again with a lower --max-length, or --config {family}/lora; {kept}"
    go_on = f"go on with --resume {run}" if saved else "start again"
    return f"out of memory: {change}, and {go_on}; {kept}"
