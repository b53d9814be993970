"""The demo's pictures: what `make demo` shows of its one PPO run, and PPO with the KL penalty beside PPO without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.overoptimisation.curves import REWARDS, highest_gold
from experiments.run_plots import read_metrics

_COLOURS = {"proxy": "#1f77b4", "gold": "#d99000"}
_GREY = "#444444"
_NAMES = {
    "proxy": "proxy: the reward model, which PPO is trained on",
    "gold": "gold: the true reward, never trained on",
}


def draw_demo(graded: Path, path: Path) -> None:
    """Draw one PPO run for somebody who has just seen it run: both rewards over the iterations, and beside them the KL.

    Args:
        graded: the run's overoptimisation.json: its checkpoints, which are the dots, and the SFT model.
        path: PNG to write.
    """
    figures = json.loads(graded.read_text())
    rows = figures["ppo"]
    steps = [0, *(row["step"] for row in rows)]
    figure = Figure(figsize=(10, 4.9))
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for reward in REWARDS:
        sft, colour = figures["sft"][reward]["mean"], _COLOURS[reward]
        low, high = ([sft, *(sft + row[f"{reward}_ci"][end] for row in rows)] for end in (0, 1))
        values = [sft, *(sft + row[reward] for row in rows)]
        left.plot(steps, values, "o-", color=colour, markersize=5, label=_NAMES[reward])
        left.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        left.axhline(sft, color=colour, linestyle="--", linewidth=1.1, zorder=1)
        for name, value in (("PPO", values[-1]), ("SFT", sft)):
            looks = {"textcoords": "offset points", "ha": "right", "color": colour, "fontsize": 11}
            left.annotate(f"{name} {value:.2f}", (steps[-1], value), (4, 7), **looks)
    left.plot([], [], color=_GREY, linestyle="--", linewidth=1.1, label="where each was before: the SFT model")
    right.plot(steps, [0, *(row["kl"] for row in rows)], "o-", color=_GREY, markersize=5)
    right.fill_between(steps, *([0, *(row["kl_ci"][end] for row in rows)] for end in (0, 1)), color=_GREY, alpha=0.15)
    _name_axes(left, "mean reward of the answers")
    _name_axes(right, "KL divergence, nats per answer")
    right.set_title("distance from the SFT model", fontsize=10.5, loc="left")
    left.margins(y=0.1)
    left.legend(frameon=False, fontsize=9.5, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderpad=0.2)
    figure.suptitle(what_it_shows(figures), x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    caption = (
        f"{figures['run'][-60:]}. Every dot is a checkpoint: its answers to {figures['prompts']} prompts that no model "
        "was trained on. Coloured bands: 95 % intervals."
    )
    figure.text(0.012, 0.015, caption, fontsize=8, color=_GREY)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def what_it_shows(figures: dict[str, Any]) -> str:
    """The one sentence above `draw_demo`'s picture; what it says of gold holds beyond the 95 % intervals."""
    best, last = highest_gold(figures["ppo"]), figures["ppo"][-1]
    if last["gold_ci"][0] <= 0:
        return "PPO raised the reward it is trained on, but not the true reward (gold)"
    if last["gold_ci"][1] < best["gold"]:
        return f"The true reward (gold) was highest at iteration {best['step']} and then fell: over-optimisation"
    return "PPO raises the reward it is trained on (proxy), and the true reward (gold) rises with it"


def _name_axes(axis: Axes, values: str) -> None:
    axis.set_xlabel("PPO iteration")
    axis.set_ylabel(values)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_kl_ablation(pairs: list[tuple[Path, Path]], path: Path) -> None:
    """Draw one line per seed in two panels, default and KL coefficient 0, and the KL of both in a third.

    Args:
        pairs: (run with the default coefficient, run with 0) of every seed.
        path: PNG to write.
    """
    figure = Figure(figsize=(12, 3.8))
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    look = {"linewidth": 1.6, "alpha": 0.9}
    scores = {
        "eval/score": {"label": "reward model (proxy)", "color": _COLOURS["proxy"], **look},
        "eval/gold": {"label": "gold reward, never trained on", "color": _COLOURS["gold"], **look},
    }
    kl = {"color": _GREY, "linewidth": 1.4}
    penalised, free = zip(*pairs)
    _draw(axes[0], penalised, scores, "with the KL penalty (default)")
    _draw(axes[1], free, scores, "without it (--kl-coef 0)")
    _draw(axes[2], penalised, {"eval/kl": {"label": "with", **kl}}, "KL to the SFT model")
    _draw(axes[2], free, {"eval/kl": {"label": "without", "linestyle": "--", **kl}}, "KL to the SFT model")
    limits = [limit for axis in axes[:2] for limit in axis.get_ylim()]
    for axis in axes[:2]:
        axis.set_ylim(min(limits), max(limits))
    axes[0].set_ylabel("reward on held-out prompts")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    axes[2].set_ylabel("nats per response")
    axes[2].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axis: Axes, runs: Sequence[Path], lines: dict[str, dict[str, Any]], title: str) -> None:
    """A line for every run and figure (`lines`: its looks); the legend names those of the first run."""
    for i, run in enumerate(runs):
        metrics = read_metrics(run)
        for tag, looks in lines.items():
            axis.plot(*metrics[tag], **looks if i == 0 else looks | {"label": None})
    axis.set_title(title, fontsize=11)
    _name_axes(axis, "")
