"""The picture of over-optimisation: proxy and gold reward over a PPO run, with the KL penalty and without."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_COLOURS = {"proxy": "#1f77b4", "gold": "#d99000"}


def evaluations(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a held-out figure (`eval/...`) of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_kl_ablation(pairs: list[tuple[Path, Path]], path: Path) -> None:
    """Draw one line per seed in two panels, default and KL coefficient 0, and the KL of both in a third.

    Args:
        pairs: (run with the default coefficient, run with 0) of every seed.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=[1, 1, 0.8])
    titles = ("with the KL penalty (default)", "without it (--kl-coef 0)")
    for axis, title, which in zip(axes, titles, (0, 1)):
        for i, pair in enumerate(pairs):
            for key, name, tag in (
                ("proxy", "reward model (proxy)", "eval/score"),
                ("gold", "gold reward, never trained on", "eval/gold"),
            ):
                steps, values = evaluations(pair[which], tag)
                axis.plot(steps, values, color=_COLOURS[key], linewidth=1.6, alpha=0.9, label=name if i == 0 else None)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("PPO iteration")
        axis.grid(alpha=0.25)
    low = min(a.get_ylim()[0] for a in axes[:2])
    high = max(a.get_ylim()[1] for a in axes[:2])
    for axis in axes[:2]:
        axis.set_ylim(low, high)
    axes[0].set_ylabel("reward on held-out prompts")
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    for which, style, label in ((0, "-", "with"), (1, "--", "without")):
        for i, pair in enumerate(pairs):
            steps, values = evaluations(pair[which], "eval/kl")
            axes[2].plot(steps, values, style, color="#444444", linewidth=1.4, label=label if i == 0 else None)
    axes[2].set_title("KL to the SFT model", fontsize=11)
    axes[2].set_ylabel("nats per response")
    axes[2].set_xlabel("PPO iteration")
    axes[2].grid(alpha=0.25)
    axes[2].legend(frameon=False, fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
