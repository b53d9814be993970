"""Part 3 of `-t gpu`: speed and memory of every preset and stage on a card whose memory is capped, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from config.model_configs import PRESETS
from experiments.bench.ours import prepared_sampling, step_tokens
from experiments.bench.work import Work
from experiments.gpu.card import Card
from experiments.gpu.report import Report
from experiments.gpu.works import KINDS, Prepared, planned_peak, prepared, work_of
from experiments.markdown import number, table

# The most telling first.
FIRST = ("gpt2", "gpt2-medium", "smollm2-135m", "gpt2-xl/lora")
REST = (
    "gpt2/lora", "smollm2-135m/lora", "gpt2-medium/lora", "gpt2-large/lora", "llama-3.2-1b/lora", "tinyllama-1.1b/lora",
    "smollm2-360m", "smollm2-360m/lora", "gpt2-large", "gpt2-xl", "llama-3.2-1b", "tinyllama-1.1b",
)  # fmt: skip
TINY = ("gpt2-nano", "llama-nano/lora")
TOLERANCE, OF_BANDWIDTH = 0.15, 0.5
_DOES_NOT_FIT = "does not fit"


def presets(names: tuple[str, ...]) -> list[str]:
    """Those of the presets that this version has."""
    return [name for name in names if name in PRESETS]


def works(names: tuple[str, ...], card: Card, tiny: bool) -> Iterator[Work]:
    """All kinds of work with each of the presets that are there."""
    for preset in presets(names):
        for kind in KINDS:
            yield work_of(preset, kind, card, tiny)


def measure_first(card: Card, tiny: bool, report: Report, left: Callable[[], float]) -> None:
    """The most telling rows."""
    measure_rows(TINY if tiny else FIRST, card, tiny, report, left)


def measure_rest(card: Card, report: Report, left: Callable[[], float]) -> None:
    """All other rows."""
    measure_rows(REST, card, False, report, left)


def measure_rows(names: tuple[str, ...], card: Card, tiny: bool, report: Report, left: Callable[[], float]) -> None:
    """One row after another while there is time (`left()` seconds); each is written down as it ends."""
    found: dict[str, Any] = report.data.get(3, {}).get("rows", {})
    for work in works(names, card, tiny):
        if work.name in found:
            continue
        if left() <= 0:
            report.skip(3, work.name, "the time was up")
            continue
        found[work.name] = measure_row(work, card, report)
        report.save(3, {"rows": found}, {"all rows": as_table(found, card)})
    card.free()
    report.save(3, {"rows": found})


def measure_row(work: Work, card: Card, report: Report) -> dict[str, Any]:
    """One row's figures and verdict; running out of memory under the cap is a result, another error a failure."""
    reason = ""
    card.free()
    try:
        with card.capped(), prepared(work, card) as ready:
            row = figures(ready, card)
            told(work, row, report)
            return row
    except torch.OutOfMemoryError:
        reason = _DOES_NOT_FIT
    except Exception as error:  # the other rows are measured all the same
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
    card.free()  # here, where nothing refers to the error's frames and their tensors any more
    row = {"work": work.name, "kind": work.kind, "preset": work.preset, "missing": reason}
    if reason != _DOES_NOT_FIT:
        report.fail(3, work.name, reason)
        return row
    planned = planned_peak(work, card) if work.kind != "sampling" else None
    foreseen = planned is None or planned > card.memory_gb * 1e9
    plan = number(planned and planned / 1e9, ".1f", " GB planned")
    report.say(3, work.name, f"{_DOES_NOT_FIT} in {card.memory_gb:g} GB; {plan}", "as planned", foreseen)
    return row | {"planned": planned}


def figures(ready: Prepared, card: Card) -> dict[str, Any]:
    """Seconds, tokens/s, MFU, memory, and for sampling what a decoding step takes beside the bandwidth's bound."""
    work = ready.work
    card.free()
    seconds = card.seconds(ready.once, work.warmup)
    peaks = card.peaks()
    tokens = {"sampling": work.batch * work.new, "ppo": work.batch * work.new}.get(work.kind) or step_tokens(work)
    flops = ready.sizes.flops(work)
    row = {
        "work": work.name, "kind": work.kind, "preset": work.preset, "seconds": seconds, "tokens_s": tokens / seconds,
        "flops": flops, "mfu": flops / seconds / card.peak_flops,
        "peaks": peaks, "planned": ready.planned, "parts": dict(ready.parts),
    }  # fmt: skip
    if peaks and ready.planned:
        row["planned_over_allocated"] = ready.planned / peaks["allocated"]
        row["planned_over_reserved"] = ready.planned / peaks["reserved"]
    if work.kind == "sampling":
        row |= decoding(ready, seconds, card)
    return row


def decoding(ready: Prepared, seconds: float, card: Card) -> dict[str, float]:
    """Seconds of one decoding step, those that reading its weights and cache would take, and their share."""
    work = ready.work
    first = card.seconds(prepared_sampling(replace(work, new=1), ready.model), repeats=2)
    step = max(seconds - first, 1e-9) / (work.new - 1)
    bound = ready.sizes.step_bytes(work) / card.copy_rate
    return {"prompt_seconds": first, "step_seconds": step, "step_bound": bound, "of_bandwidth": bound / step}


def told(work: Work, row: dict[str, Any], report: Report) -> None:
    """The row's verdict: sampling against the bandwidth, training against the memory plan."""
    speed = f"{row['seconds']:.3g} s, {row['tokens_s']:,.0f} tokens/s, MFU {row['mfu']:.1%}"
    memory, plan, met = "", row.get("planned_over_allocated"), None
    if row["peaks"]:
        memory = f", {row['peaks']['allocated'] / 1e9:.2f} GB ({row['peaks']['reserved'] / 1e9:.2f} reserved)"
    if work.kind == "sampling":
        step = f", {1e3 * row['step_seconds']:.2f} ms a step, {row['of_bandwidth']:.0%} of the bandwidth"
        report.say(3, work.name, speed + step + memory, f"{OF_BANDWIDTH:.0%}", row["of_bandwidth"] >= OF_BANDWIDTH)
        return
    if plan is not None:
        memory += f", plan / peak {plan:.2f}"
        met = abs(plan - 1) <= TOLERANCE
    report.say(3, work.name, speed + memory, "" if plan is None else f"plan within {TOLERANCE:.0%}", met)


def as_table(found: dict[str, dict[str, Any]], card: Card) -> str:
    """Markdown of all rows."""
    lines = []
    for row in found.values():
        if "missing" in row:
            plan = number(row.get("planned") and row["planned"] / 1e9, ".1f")
            lines.append((row["preset"], row["kind"], row["missing"], "", "", "", "", plan, "", "", ""))
            continue
        peaks = row["peaks"] or {}
        allocated, reserved = (number(peaks.get(k) and peaks[k] / 1e9, ".2f") for k in ("allocated", "reserved"))
        planned = number(row["planned"] and row["planned"] / 1e9, ".2f")
        lines.append((
            row["preset"], row["kind"], number(row["seconds"], ".3g"), f"{row['tokens_s']:,.0f}", f"{row['mfu']:.1%}",
            allocated, reserved, planned, number(row.get("planned_over_allocated"), ".2f"),
            number(1e3 * row["step_seconds"] if "step_seconds" in row else None, ".2f"),
            number(row.get("of_bandwidth"), ".0%"),
        ))  # fmt: skip
    head = "preset | work | seconds | tokens/s | MFU | peak GB | reserved GB | planned GB | planned / peak"
    rates = (
        f"MFU of {card.peak_flops / 1e12:,.3g} TFLOP/s (measured: {card.measured_flops / 1e12:,.3g}); copies at "
        f"{card.copy_rate / 1e12:.3g} TB/s; cap {card.memory_gb:g} GB. "
        "Tokens of sampling and PPO are those of the responses."
    )
    return f"{table(head + ' | ms a step | of the bandwidth', lines)}\n\n{rates}"
