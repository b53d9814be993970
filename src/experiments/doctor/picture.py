"""The evidence of a finding as a picture: the figure over the run, its healthy range, the step where it left it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.doctor.record import RunRecord, Series
from experiments.doctor.signs import Finding

_LINE, _RANGE, _FOUND, _BESIDE = "#1f77b4", "#2e8b57", "#c0392b", "#555555"


def draw_finding(record: RunRecord, finding: Finding, path: Path) -> None:
    """Draw the figure of a finding, and beside it those that belong to it, into the PNG `path`."""
    tags = [finding.tag, *(tag for tag in finding.beside if len(record[tag]) and tag != finding.tag)][:3]
    figure = Figure(figsize=(4.6 * len(tags) + 0.6, 3.6))
    axes = figure.subplots(1, len(tags), squeeze=False)[0]
    for axis, tag in zip(axes, tags):
        _draw(axis, record[tag], tag, _LINE if tag == finding.tag else _BESIDE)
        axis.set_xlabel("PPO iteration" if record.stage == "ppo" else "optimizer step")
        axis.axvline(finding.step, color=_FOUND, linewidth=1, linestyle=":", zorder=1)
    _mark(axes[0], finding, record[finding.tag])
    figure.suptitle(textwrap.fill(f"{finding.code}: {finding.title}", 46 * len(tags)), fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})  # for a page: three panels are some 50 KB


def _draw(axis: Axes, series: Series, tag: str, colour: str) -> None:
    few = len(series) <= 40
    axis.plot(series.steps, series.values, color=colour, linewidth=1.6, marker="o" if few else None, markersize=3)
    axis.set_title(tag, fontsize=10)
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    positive = series.values[series.values > 0]
    signed = any(word in tag for word in ("score", "reward", "gold"))  # 0 is a mean of theirs and no lower end
    if not signed and len(positive) == len(series) > 1 and positive.max() > 300 * positive.min():
        axis.set_yscale("log")


def _mark(axis: Axes, finding: Finding, series: Series) -> None:
    """The healthy range in green, what lies outside left white, and the point of the finding in red."""
    bottom, top = axis.get_ylim()
    limits = [limit for limit in (finding.low, finding.high) if limit is not None]
    if limits:
        if axis.get_yscale() == "linear":
            room = 0.08 * (max(top, *limits) - min(bottom, *limits))
            bottom, top = min(bottom, min(limits) - room), max(top, max(limits) + room)
            axis.set_ylim(bottom, top)
        low = bottom if finding.low is None else finding.low
        high = top if finding.high is None else finding.high
        axis.axhspan(low, high, color=_RANGE, alpha=0.15, linewidth=0, zorder=0, label="healthy")
        for limit in limits:  # a range may be too narrow to be seen
            axis.axhline(limit, color=_RANGE, linewidth=1, zorder=1)
    if np.isfinite(finding.value):
        axis.plot([finding.step], [finding.value], "o", color=_FOUND, markersize=7, zorder=3,
                  label=f"step {finding.step}: {finding.value:.3g}")  # fmt: skip
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    if not len(series):
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", color=_FOUND)
