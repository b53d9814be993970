"""The benchmark's results: rows as JSON and as a markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.bench.bounds import Hardware, bound, flop_share
from experiments.bench.host import TOO_MUCH
from experiments.bench.work import WORKS, Work
from experiments.markdown import number, table

WITH_DEFAULTS = "… and the peer with its defaults"
_RATIOS = {"ratio": "{:.2f}x", "plain_ratio": "({:.2f}x)"}


@dataclass
class Figures:
    """What the rounds of one side gave for one work: values, peaks in GB, why nothing was measured, versions.

    products: the share of matrix products in the time, attention's included. types: those of the products' numbers.
    """

    values: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    matrix_flops: float = 0.0
    threads: int = 0
    products: float | None = None
    types: list[str] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        """Take in what one process answered."""
        if "missing" in result:
            self.missing = result["missing"]
            return
        self.values.append(result["value"])
        self.peaks.append(result["peak_gb"])
        self.versions |= result.get("versions", {})
        for name in ("parts", "matrix_flops", "threads", "products", "types"):
            setattr(self, name, result.get(name, getattr(self, name)))

    @property
    def value(self) -> float | None:
        """Median of the rounds; None when nothing was measured."""
        return statistics.median(self.values) if self.values else None

    @property
    def peak(self) -> float | None:
        """Median of the rounds' peaks."""
        return statistics.median(self.peaks) if self.peaks else None


@dataclass
class Row:
    """One work and what each side made of it: ours, the tuned peer, the peer with its defaults."""

    work: Work
    ours: Figures = field(default_factory=Figures)
    peer: Figures = field(default_factory=Figures)
    plain: Figures = field(default_factory=Figures)
    stolen: float | None = None

    def sides(self) -> dict[str, Figures]:
        """The figures by the names that they have in the JSON file."""
        return {"ours": self.ours, "peer": self.peer, "plain": self.plain}

    def over(self, other: float | None) -> float | None:
        """How many times as fast ours is as another figure; None when one of them was not measured."""
        if self.ours.value is None or other is None:
            return None
        return self.ours.value / other if self.work.faster_is_larger else other / self.ours.value

    def bound_share(self, hardware: Hardware | None) -> tuple[float | None, float | None]:
        """The hardware's bound in the work's unit, and how much of it ours reaches (1: all)."""
        limit = bound(self.work, hardware) if hardware else None
        return limit, self.over(limit)

    @property
    def utilisation(self) -> float | None:
        """Model FLOP over the measured matrix rate; None when that was not measured."""
        if self.ours.value is None or not self.ours.matrix_flops:
            return None
        return flop_share(self.work, self.ours.value, self.ours.matrix_flops)

    def to_json(self) -> dict[str, Any]:
        """The row as in the JSON file."""
        return {
            "work": self.work.name,
            "ours": self.ours.value,
            "peer": self.peer.value,
            "ratio": self.over(self.peer.value),
            "unit": self.work.unit,
            "ours_peak_gb": self.ours.peak,
            "peer_peak_gb": self.peer.peak,
            "plain": self.plain.value,
            "plain_ratio": self.over(self.plain.value),
            "plain_peak_gb": self.plain.peak,
            "aim": self.work.aim or None,
            "products": self.ours.products,
            "stolen": self.stolen,
        }

    def shown(self, value: float | None) -> str:
        """A figure with the work's unit, three digits."""
        form = ",.0f" if value is not None and value >= 100 else ".3g"
        return number(value, form, " s" if self.work.unit.startswith("s/") else f" {self.work.unit}")

    def against(self, other: Figures) -> tuple[str, str]:
        """A peer's figure and the ratio to it, as two cells."""
        figure = "missing" if other.missing else self.shown(other.value)
        return figure if self.work.peer else "none", number(self.over(other.value), ".2f", "x")

    def bound_cells(self, hardware: Hardware | None) -> tuple[str, str, str]:
        """The bound, ours as a share of it, our peak: three cells."""
        limit, share = self.bound_share(hardware)
        return self.shown(limit), number(share, ".0%"), number(self.ours.peak, ".2f", " GB")


def as_json(rows: Sequence[Row], machine: dict[str, Any], scaling: Sequence[Row] = ()) -> dict[str, Any]:
    """What --json writes; `machine` also holds the measured bounds and why a figure is null."""
    missing = {
        row.work.name: {side: figures.missing for side, figures in row.sides().items() if figures.missing}
        for row in [*rows, *scaling]
    }
    spread = {
        row.work.name: {side: figures.values for side, figures in row.sides().items()}
        | {"ours_parts": row.ours.parts, "peer_types": row.peer.types, "plain_types": row.plain.types}
        for row in rows
    }
    machine = machine | {"missing": {k: v for k, v in missing.items() if v}, "rounds_of": spread}
    report = {"machine": machine, "rows": [row.to_json() for row in rows]}
    if scaling:
        shares = [dict(zip(("bound", "share"), row.bound_share(hardware_of(machine)))) for row in scaling]
        report["scaling"] = [row.to_json() | share for row, share in zip(scaling, shares)]
    return report


def hardware_of(machine: dict[str, Any]) -> Hardware | None:
    """The measured bounds in a report's `machine`."""
    bounds = machine.get("bounds")
    return Hardware(bounds["bandwidth"], bounds["matrix_flops"]) if bounds else None


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The main table, what is missing from it, and the machine."""
    lines = []
    for row in rows:
        ours = "failed" if row.ours.missing else row.shown(row.ours.value)
        cells = (row.work.title, ours, *row.against(row.peer), *row.bound_cells(hardware_of(machine)))
        lines.append((*cells, number(row.peer.peak, ".2f", " GB")))
        if row.work.peer:
            peak = number(row.plain.peak, ".2f", " GB")
            lines.append((WITH_DEFAULTS, "", *row.against(row.plain), "", "", "", peak))
    head = "work | ours | peer | ratio | bound | of the bound | our peak | peer's peak"
    return "\n".join([table(head, lines), "", *missing_lines(rows), *verdicts(rows, machine), describe(machine, rows)])


def verdicts(rows: Sequence[Row], machine: dict[str, Any]) -> list[str]:
    """Which aims are met, where our time goes, and what may have spoilt the figures: a line each, then an empty one."""
    aims = [
        f"{row.work.name} {ratio:.2f}x of {row.work.aim:g}x, {'met' if ratio >= row.work.aim else 'missed'}"
        for row in rows
        if row.work.aim and (ratio := row.over(row.peer.value))
    ]
    products = [f"{row.work.name} {row.ours.products:.0%}" for row in rows if row.ours.products is not None]
    threads = {figures.threads for row in rows for figures in row.sides().values() if figures.threads}
    lines = ["Aims against the tuned peer: " + "; ".join(aims) + "."] if aims else []
    if products:
        lines.append("Matrix products' share of our time, attention's included: " + ", ".join(products) + ".")
    if machine.get("stolen") is not None:
        spoilt = [f"{row.work.name} {row.stolen:.0%}" for row in rows if (row.stolen or 0) > TOO_MUCH]
        above = f"; rows with more than {TOO_MUCH:.0%}: {', '.join(spoilt)}" if spoilt else ""
        lines.append(f"Stolen by other guests of the host: {machine['stolen']:.1%} of the cores' time{above}.")
    if len(threads) > 1:
        lines.append(f"Warning: the sides had different numbers of threads: {sorted(threads)}.")
    return [*lines, ""] if lines else []


def hosts_markdown(reports: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """One column per host, from the files that --json wrote: its facts and our ratios, the defaults' in brackets."""
    columns, aimed = [], [work for work in WORKS if work.aim]
    for name, report in reports:
        machine, rows = report["machine"], {row["work"]: row for row in report["rows"]}
        bounds = machine.get("bounds") or {}
        column = [
            Path(name).stem,
            f"{machine.get('cpu', '')}, {machine.get('cores', '')} cores",
            number(bounds["matrix_flops"] / 1e12, ".3g", " TFLOP/s") if bounds else "",
            number(bounds["bandwidth"] / 1e9, ".3g", " GB/s") if bounds else "",
            number(machine.get("stolen"), ".1%"),
        ]
        for work in aimed:
            row = rows.get(work.name, {})
            ratios = [words.format(row[key]) for key, words in _RATIOS.items() if row.get(key) is not None]
            column.append(" ".join(ratios))
        columns.append(column)
    names = ["", "processor", "bf16 matrices", "reads", "stolen time"]
    head, *lines = zip([*names, *(f"{work.title} (aim {work.aim:g}x)" for work in aimed)], *columns)
    return table(" | ".join(head), lines)


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """One line per figure that could not be measured."""
    lines = [
        f"- {row.work.name}: peer {row.work.peer}{words} missing: {figures.missing}"
        for row in rows
        for words, figures in (("", row.peer), (" with its defaults", row.plain))
        if figures.missing
    ]
    lines += [f"- {row.work.name}: ours failed: {row.ours.missing}" for row in rows if row.ours.missing]
    return [*lines, ""] if lines else []


def scaling_markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Cost against batch, response length and model size, the bound beside it."""
    lines = []
    for row in rows:
        work, ours = row.work, "failed" if row.ours.missing else row.shown(row.ours.value)
        cells = (work.kind, work.batch, f"{work.prompt} + {work.new}", work.preset, ours)
        lines.append((*cells, *row.bound_cells(hardware_of(machine))))
    head = "work | batch | prompt + response | model | ours | bound | of the bound | peak"
    return "\n".join([table(head, lines), "", *missing_lines(rows)])


def gpu_markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Figure, share of the measured matrix rate and peak memory of every preset and stage."""
    lines = []
    for row in rows:
        ours = row.ours.missing or row.shown(row.ours.value)
        ours = "out of memory" if "OutOfMemoryError" in ours else ours
        lines.append((row.work.title, ours, number(row.utilisation, ".0%"), number(row.ours.peak, ".2f", " GB")))
    return "\n".join([table("preset and stage | ours | MFU | peak", lines), "", describe(machine, rows)])


def describe(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Machine, versions and measured bounds in a few lines."""
    versions = {"ours": {}, "peers": {}}
    for row in rows:
        versions["ours"] |= row.ours.versions
        versions["peers"] |= row.peer.versions | row.plain.versions
    told = "; ".join(
        f"{side}: " + ", ".join(f"{k} {v}" for k, v in sorted(v.items())) for side, v in versions.items() if v
    )
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['os']}, Python "
        f"{machine['python']}; medians of {machine['rounds']} rounds; load {machine['load']:.1f} at the start. {told}."
    )
    bounds = machine.get("bounds")
    if not bounds:
        return text
    passes = [
        f"{words}: " + ", ".join(f"{v:,.0f} tokens/s at batch {b}" for b, v in bounds[key].items())
        for key, words in (("products_tokens_s", "as F.linear takes them"), ("packed_tokens_s", "packed beforehand"))
    ]
    return text + (
        f"\nThreads: {bounds['threads']}. Bounds: reads at {bounds['bandwidth'] / 1e9:.1f} GB/s; bf16 matrices at "
        f"{bounds['matrix_flops'] / 1e12:.2f} TFLOP/s; the matrix products of a decoding step alone, "
        f"{'; '.join(passes)}."
    )
