"""The picture of over-optimisation: proxy and gold reward over a PPO run, with the KL penalty and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.run_plots import read_metrics


def draw_kl_ablation(pairs: list[tuple[Path, Path]], path: Path) -> None:
    """Draw one line per seed in two panels, default and KL coefficient 0, and the KL of both in a third.

    Args:
        pairs: (run with the default coefficient, run with 0) of every seed.
        path: PNG to write.
    """
    figure = Figure(figsize=(12, 3.8))
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    scores = {
        "eval/score": {"label": "reward model (proxy)", "color": "#1f77b4", "linewidth": 1.6, "alpha": 0.9},
        "eval/gold": {"label": "gold reward, never trained on", "color": "#d99000", "linewidth": 1.6, "alpha": 0.9},
    }
    kl = {"color": "#444444", "linewidth": 1.4}
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
    axis.set_xlabel("PPO iteration")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
