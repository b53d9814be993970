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
        self.parts = result.get("parts", {})
        self.matrix_flops = result.get("matrix_flops", 0.0)
        self.threads = result.get("threads", 0)
        self.products = result.get("products", self.products)
        self.types = result.get("types", self.types)

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

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the tuned peer: above 1, ours is faster."""
        return self.over(self.peer)

    def over(self, other: Figures) -> float | None:
        """How many times as fast ours is as the other side; None when one of them was not measured."""
        if self.ours.value is None or other.value is None:
            return None
        return self.ours.value / other.value if self.work.faster_is_larger else other.value / self.ours.value

    def to_json(self) -> dict[str, Any]:
        """The row as in the JSON file."""
        return {
            "work": self.work.name,
            "ours": self.ours.value,
            "peer": self.peer.value,
            "ratio": self.ratio,
            "unit": self.work.unit,
            "ours_peak_gb": self.ours.peak,
            "peer_peak_gb": self.peer.peak,
            "plain": self.plain.value,
            "plain_ratio": self.over(self.plain),
            "plain_peak_gb": self.plain.peak,
            "aim": self.work.aim or None,
            "products": self.ours.products,
            "stolen": self.stolen,
        }

    def bound_share(self, hardware: Hardware | None) -> tuple[float | None, float | None]:
        """The hardware's bound in the work's unit, and how much of it ours reaches (1: all)."""
        limit = bound(self.work, hardware) if hardware else None
        if limit is None or self.ours.value is None:
            return limit, None
        return limit, self.ours.value / limit if self.work.faster_is_larger else limit / self.ours.value


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
    hardware = hardware_of(machine)
    if scaling:
        report["scaling"] = [
            row.to_json() | dict(zip(("bound", "share"), row.bound_share(hardware))) for row in scaling
        ]
    return report


def hardware_of(machine: dict[str, Any]) -> Hardware | None:
    """The measured bounds in a report's `machine`."""
    bounds = machine.get("bounds")
    return Hardware(bounds["bandwidth"], bounds["matrix_flops"]) if bounds else None


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The main table, what is missing from it, and the machine."""
    hardware = hardware_of(machine)
    lines = [
        "| work | ours | peer | ratio | bound | of the bound | our peak | peer's peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        limit, share = row.bound_share(hardware)
        ours = "failed" if row.ours.missing else shown(row.ours.value, row.work.unit)
        lines.append(
            _line(row.work.title, ours, *against(row, row.peer), shown(limit, row.work.unit), percent(share),
                  gigabytes(row.ours.peak), gigabytes(row.peer.peak))
        )  # fmt: skip
        if row.work.peer:
            lines.append(_line(WITH_DEFAULTS, "", *against(row, row.plain), "", "", "", gigabytes(row.plain.peak)))
    return "\n".join([*lines, "", *missing_lines(rows), *verdicts(rows, machine), describe(machine, rows)])


def against(row: Row, other: Figures) -> tuple[str, str]:
    """A peer's figure and the ratio to it, as two cells."""
    figure = "missing" if other.missing else shown(other.value, row.work.unit)
    ratio = row.over(other)
    return figure if row.work.peer else "none", f"{ratio:.2f}x" if ratio else ""


def verdicts(rows: Sequence[Row], machine: dict[str, Any]) -> list[str]:
    """Which aims are met, where our time goes, and what may have spoilt the figures: a line each, then an empty one."""
    aims = [
        f"{row.work.name} {row.ratio:.2f}x of {row.work.aim:g}x, {'met' if row.ratio >= row.work.aim else 'missed'}"
        for row in rows
        if row.work.aim and row.ratio
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
    machines = [report["machine"] for _, report in reports]
    bounds = [machine.get("bounds") or {} for machine in machines]
    lines = [
        _line("", *(Path(name).stem for name, _ in reports)),
        "|" + "---|" * (1 + len(reports)),
        _line("processor", *(f"{m.get('cpu', '')}, {m.get('cores', '')} cores" for m in machines)),
        _line("bf16 matrices", *(_scaled(b.get("matrix_flops"), 1e12, "TFLOP/s") for b in bounds)),
        _line("reads", *(_scaled(b.get("bandwidth"), 1e9, "GB/s") for b in bounds)),
        _line("stolen time", *("" if m.get("stolen") is None else f"{m['stolen']:.1%}" for m in machines)),
    ]
    for work in WORKS:
        if work.aim:
            rows = [next((r for r in report["rows"] if r["work"] == work.name), {}) for _, report in reports]
            cells = (
                " ".join(words.format(row[key]) for key, words in _RATIOS.items() if row.get(key) is not None)
                for row in rows
            )
            lines.append(_line(f"{work.title} (aim {work.aim:g}x)", *cells))
    return "\n".join(lines)


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
    hardware = hardware_of(machine)
    lines = [
        "| work | batch | prompt + response | model | ours | bound | of the bound | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        work, (limit, share) = row.work, row.bound_share(hardware)
        ours = "failed" if row.ours.missing else shown(row.ours.value, work.unit)
        cells = (work.kind, work.batch, f"{work.prompt} + {work.new}", work.preset, ours, shown(limit, work.unit))
        lines.append(_line(*cells, percent(share), gigabytes(row.ours.peak)))
    return "\n".join([*lines, "", *missing_lines(rows)])


def gpu_markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Figure, share of the measured matrix rate and peak memory of every preset and stage."""
    lines = ["| preset and stage | ours | MFU | peak |", "|---|---|---|---|"]
    for row in rows:
        ours = row.ours.missing or shown(row.ours.value, row.work.unit)
        ours = "out of memory" if "OutOfMemoryError" in ours else ours
        lines.append(_line(row.work.title, ours, percent(utilisation(row)), gigabytes(row.ours.peak)))
    return "\n".join([*lines, "", describe(machine, rows)])


def utilisation(row: Row) -> float | None:
    """Model FLOP over the measured matrix rate; None when that was not measured."""
    if row.ours.value is None or not row.ours.matrix_flops:
        return None
    return flop_share(row.work, row.ours.value, row.ours.matrix_flops)


def describe(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Machine, versions and measured bounds in a few lines."""
    versions = {"ours": {}, "peers": {}}
    for row in rows:
        versions["ours"] |= row.ours.versions
        versions["peers"] |= row.peer.versions | row.plain.versions
    told = "; ".join(
        f"{side}: " + ", ".join(f"{k} {v}" for k, v in sorted(v.items())) for side, v in versions.items() if v
    )
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['os']}, Python "
        f"{machine['python']}; medians of {machine['rounds']} rounds; load {machine['load']:.1f} at the start. {told}."
    ]
    bounds = machine.get("bounds")
    if bounds:
        ways = (("products_tokens_s", "as F.linear takes them"), ("packed_tokens_s", "packed beforehand"))
        passes = [
            f"{words}: " + ", ".join(f"{v:,.0f} tokens/s at batch {b}" for b, v in bounds[key].items())
            for key, words in ways
        ]
        lines.append(
            f"Threads: {bounds['threads']}. Bounds: reads at {bounds['bandwidth'] / 1e9:.1f} GB/s; bf16 matrices "
            f"at {bounds['matrix_flops'] / 1e12:.2f} TFLOP/s; the matrix products of a decoding step alone, "
            f"{'; '.join(passes)}."
        )
    return "\n".join(lines)


def shown(value: float | None, unit: str) -> str:
    """A figure with its unit, three digits."""
    if value is None:
        return ""
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} {'s' if unit.startswith('s/') else unit}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "" if share is None else f"{share:.0%}"


def gigabytes(value: float | None) -> str:
    """A peak, or nothing."""
    return "" if value is None else f"{value:.2f} GB"


def _scaled(value: float | None, by: float, unit: str) -> str:
    return "" if value is None else f"{value / by:.3g} {unit}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
