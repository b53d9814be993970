"""The picture of over-optimisation: proxy and gold reward over the distance from SFT, for PPO and for best-of-n."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.overoptimisation.curves import by_step, highest_gold

_COLOURS = {"proxy": "#1f77b4", "gold": "#d99000"}
_GREY = "#555555"
_BEHIND_TEXT = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


def draw_overoptimisation(figures: dict[str, Any], path: Path) -> None:
    """Draw what `overoptimisation_curves` gives.

    PPO: discs and solid fits; diamonds are the run's own evaluations, in place of early checkpoints that were not kept.
    Best-of-n: open squares and dashed fits. A band is the 95 % interval of a fit, a star the peak of one that turns
    down within what was measured.

    Args:
        figures: the content of overoptimisation.json.
        path: PNG to write.
    """
    figure = Figure(figsize=(7.4, 5.3))
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=0.8)
    for reward, colour in _COLOURS.items():
        for family, line in (("best_of_n", (0, (5, 2))), ("ppo", "-")):
            if fit := figures["fits"][family][reward]:
                d, band = fit["curve"]["d"], fit["band"]
                axes.fill_between(d, band["low"], band["high"], color=colour, alpha=0.14, linewidth=0)
                axes.plot(d, fit["curve"]["r"], linestyle=line, color=colour, linewidth=1.7)
            _draw_points(axes, figures[family], reward, colour, filled=family == "ppo")
        own = [row for row in figures["evaluations"] if row[reward] is not None]
        axes.plot([r["d"] for r in own], [r[reward] for r in own], "D", color=colour, markersize=5, alpha=0.6, zorder=4)
        if not figures["fits"]["ppo"][reward]:
            way = [row for row in by_step(figures) if row[reward] is not None]
            axes.plot([0, *(r["d"] for r in way)], [0, *(r[reward] for r in way)], ":", color=colour, linewidth=1.2)
    axes.plot(0, 0, "D", color="black", markersize=6, zorder=5)
    axes.annotate("SFT", (0, 0), (8, -13), textcoords="offset points", fontsize=9)
    _name_points(axes, figures)
    _scales(axes)
    _name_peaks(axes, figures["fits"])
    _legend(axes, "gold reward" if figures["judge"] == "gold" else "the judge", bool(figures["evaluations"]))
    judge = "" if figures["judge"] == "gold" else f"; judge {figures['judge'][-40:]}"
    caption = (
        f"{figures['run'][-60:]}{judge}\n"
        f"{figures['prompts']} held-out prompts, with one sample of every checkpoint and {figures['samples']} of "
        "the SFT model for each. Curves: $R(d)=d(a-b\\log d)$\nfor PPO, $d(a-bd)$ for best-of-n (Gao et al. 2022). "
        "Bars and bands: 95 % bootstrap over prompts."
    )
    figure.text(0.01, 0.01, caption, va="bottom", fontsize=7.5, color=_GREY, linespacing=1.4)
    figure.tight_layout(rect=(0, 0.085, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _draw_points(axes: Axes, rows: list[dict[str, Any]], reward: str, colour: str, filled: bool) -> None:
    """Points with their intervals in both directions; n = 1 is the SFT model itself, which is drawn once."""
    rows = [row for row in rows if row.get("n") != 1]

    def spread(key: str) -> list[list[float]]:
        below = [max(0.0, row[key] - row[f"{key}_ci"][0]) for row in rows]
        return [below, [max(0.0, row[f"{key}_ci"][1] - row[key]) for row in rows]]

    x, y = [row["d"] for row in rows], [row[reward] for row in rows]
    bars = {"fmt": "none", "ecolor": colour, "elinewidth": 0.9, "alpha": 0.55}
    axes.errorbar(x, y, xerr=spread("d"), yerr=spread(reward), **bars)
    face = colour if filled else "white"
    axes.plot(x, y, "o" if filled else "s", color=colour, markerfacecolor=face, markersize=5.5, zorder=4)


def _name_points(axes: Axes, figures: dict[str, Any]) -> None:
    """n beside the upper curve of best-of-n; the first, best and last step beside the gold of PPO."""
    small = {"textcoords": "offset points", "fontsize": 8}
    best = figures["best_of_n"][1:]
    upper = max(_COLOURS, key=lambda reward: best[-1][reward])
    for row in best:
        axes.annotate(f"n={row['n']}", (row["d"], row[upper]), (-7, 2), color=_COLOURS[upper], ha="right", **small)
    ppo = [row for row in by_step(figures) if row["gold"] is not None]
    highest = highest_gold(ppo)
    for row in {row["step"]: row for row in (ppo[0], ppo[-1], highest)}.values():
        # No other gold point of the run is above the best one.
        text, place = (f"step {row['step']}, best", (9, 9)) if row is highest else (f"step {row['step']}", (9, -4))
        looks = {"color": _COLOURS["gold"], "bbox": _BEHIND_TEXT, "zorder": 3}
        axes.annotate(text, (row["d"], row["gold"]), place, **looks, **small)


def _name_peaks(axes: Axes, fits: dict[str, dict[str, Any]]) -> None:
    """A star on a gold fit that turns down, and a line from it to its KL at the foot of the picture."""
    for i, (family, name) in enumerate((("ppo", "PPO"), ("best_of_n", "best-of-n"))):
        fit = fits[family]["gold"]
        if fit is None or not fit["peak_within_data"]:
            continue
        d, r = fit["peak_d"], fit["peak_reward"]
        star = {"markeredgecolor": "black", "markeredgewidth": 0.6, "markersize": 13, "zorder": 6}
        axes.plot(d, r, "*", color=_COLOURS["gold"], **star)
        axes.plot([d, d], [axes.get_ylim()[0], r], ":", color=_GREY, linewidth=1, zorder=1)
        axes.annotate(
            f"{name}: fitted gold peak at {d**2:.1f} nats", (d, 0.02 + 0.055 * i), (5, 0), textcoords="offset points",
            xycoords=("data", "axes fraction"), fontsize=9, bbox=_BEHIND_TEXT, zorder=7,
        )  # fmt: skip


def _scales(axes: Axes) -> None:
    axes.set_xlim(left=-0.03 * axes.get_xlim()[1])
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.06 * (high - low), high + 0.04 * (high - low))  # room for the texts
    axes.set_xlabel("distance from the SFT model, $\\sqrt{\\mathrm{KL}}$")
    axes.set_ylabel("reward above the SFT model's mean")
    above = axes.secondary_xaxis("top", functions=(lambda d: d, lambda d: d))
    ticks = _kl_ticks(axes.get_xlim()[1])
    above.set_xticks([math.sqrt(kl) for kl in ticks], [f"{kl:g}" for kl in ticks])
    above.set_xlabel("KL to the SFT model (nats per response)", fontsize=9, color=_GREY)
    above.tick_params(labelsize=8, colors=_GREY)
    above.spines["top"].set_color(_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _kl_ticks(last_d: float) -> list[float]:
    """0 and powers of 2 in nats, from the largest down, as long as they stand apart on an axis of d."""
    ticks: list[float] = []
    for power in range(math.floor(2 * math.log2(last_d)), -20, -1):
        d = 2 ** (power / 2)
        if d > 0.18 * last_d and (not ticks or math.sqrt(ticks[-1]) - d > 0.07 * last_d):
            ticks.append(2.0**power)
    return [0.0, *reversed(ticks)]


def _legend(axes: Axes, judge: str, evaluated: bool) -> None:
    ppo, best = {"marker": "o"}, {"marker": "s", "markerfacecolor": "white", "linestyle": "--"}
    handles = [
        Line2D([], [], color=_COLOURS["proxy"], **ppo, label="PPO: proxy, the reward it was trained on"),
        Line2D([], [], color=_COLOURS["gold"], **ppo, label=f"PPO: {judge}, never trained on"),
        Line2D([], [], color=_COLOURS["proxy"], **best, label="best-of-n: proxy"),
        Line2D([], [], color=_COLOURS["gold"], **best, label=f"best-of-n: {judge}"),
    ]
    if evaluated:
        looks = {"color": _GREY, "marker": "D", "markersize": 5, "alpha": 0.6, "linestyle": "none"}
        handles.insert(2, Line2D([], [], **looks, label="PPO, no checkpoint kept: its own evaluation"))
    axes.legend(handles=handles, fontsize=9, loc="best", handlelength=3.2, edgecolor="none")
