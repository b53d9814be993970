"""The picture of an evaluation: the win rate of every pair with its interval, raw and at equal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from utils.evaluation.report import Evaluation  # noqa: E402
from utils.judging.pairwise import Comparison  # noqa: E402

_BETTER, _WORSE, _UNDECIDED = "#1f6fb4", "#c8501e", "#6b6b6b"
_NAMES = {"sft": "SFT", "ppo": "PPO"}
_ROW_INCHES = 0.42
_COLUMNS = ((0.14, "win rate"), (0.68, "wins / ties / losses"))  # of the text beside the plot


def draw_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Draw a forest plot: one row per pair, 0.5 as a dashed line, and the counts in columns beside it.

    Args:
        evaluation: with at least one comparison.
        path: PNG to write.
    """
    comparisons = evaluation.comparisons
    size = (8.4, 1.45 + _ROW_INCHES * len(comparisons))
    layout = dict(layout="constrained", sharey=True, width_ratios=[2.3, 1])
    figure, (axis, text) = plt.subplots(1, 2, figsize=size, dpi=160, **layout)
    for row, comparison in enumerate(comparisons):
        _draw_pair(axis, row, comparison)
        _write_counts(text, row, comparison)
    _draw_frame(axis, text, [f"{_shown(c.a)} vs {_shown(c.b)}" for c in comparisons])
    judge = evaluation.judge.get("model") or evaluation.judge["kind"]
    figure.suptitle(f"Judge: {judge}; {evaluation.settings['prompt_count']} prompts, both orders", fontsize=10.5)
    figure.savefig(path)
    plt.close(figure)


def colour(interval: Sequence[float] | None) -> str:
    """Blue where the first system is better, red where it is worse, grey where the interval holds one half."""
    if interval is None or interval[0] <= 0.5 <= interval[1]:
        return _UNDECIDED
    return _BETTER if interval[0] > 0.5 else _WORSE


def _shown(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def _draw_pair(axis: Axes, row: int, comparison: Comparison) -> None:
    """The raw win rate as a dot on a thick line; below it the length-controlled one, an open diamond on a thin line."""
    shade = colour(comparison.win_rate_ci)
    if comparison.win_rate is not None:
        axis.plot(comparison.win_rate_ci, [row - 0.13] * 2, color=shade, linewidth=2.6, solid_capstyle="butt")
        axis.plot(comparison.win_rate, row - 0.13, "o", color=shade, markersize=6.5, clip_on=False)
    if comparison.lc_win_rate is not None:
        if comparison.lc_win_rate_ci is not None:
            axis.plot(comparison.lc_win_rate_ci, [row + 0.19] * 2, color=shade, linewidth=1, alpha=0.75)
        diamond = dict(markersize=4.5, markerfacecolor="white", markeredgewidth=1.1, clip_on=False)
        axis.plot(comparison.lc_win_rate, row + 0.19, "D", color=shade, **diamond)


def _write_counts(axis: Axes, row: int, comparison: Comparison) -> None:
    rate = "no verdict" if comparison.win_rate is None else f"{comparison.win_rate:.3f}"
    counts = f"{comparison.decisive_wins} / {comparison.ties} / {comparison.decisive_losses}"
    for (x, _), cell in zip(_COLUMNS, (rate, counts)):
        axis.text(x, row, cell, ha="center", va="center", fontsize=9)


def _draw_frame(axis: Axes, text: Axes, labels: Sequence[str]) -> None:
    rows = len(labels)
    axis.axvline(0.5, color="black", linestyle="--", linewidth=0.9, zorder=0)
    axis.set_xlim(0, 1)
    axis.set_ylim(rows - 0.5, -0.5)
    axis.set_yticks(range(rows), labels, fontsize=9.5)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"], fontsize=9)
    axis.set_xlabel("win rate of the first-named system, ties as half", fontsize=9.5)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    text.set_xlim(0, 1)
    text.set_axis_off()
    for x, title in _COLUMNS:
        text.text(x, 1.0, title, transform=text.transAxes, ha="center", va="bottom", fontsize=9, color="#444444")
    for row in range(1, rows, 2):
        axis.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=-1)
        text.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=-1)
    grey = dict(color=_UNDECIDED)
    diamond = dict(marker="D", markersize=4.5, linewidth=1, markerfacecolor="white")
    handles = [
        Line2D([], [], marker="o", markersize=6.5, linewidth=2.6, **grey, label="95 % interval"),
        Line2D([], [], **diamond, **grey, label="at equal lengths"),
    ]
    place = dict(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.5, borderpad=0)
    axis.legend(handles=handles, **place, ncols=2, frameon=False, fontsize=9, handlelength=2.2)
