"""The tables of the demo: one seed for `make demo`, several with intervals over seeds and prompts for `-t results`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.statistics import bootstrap_interval, paired_bootstrap, seed_bootstrap, win_scores

# What the systems are called in the tables.
NAMES = {
    "vanilla": "pre-trained on plain text",
    "sft": "SFT, sampled",
    "sft_greedy": "SFT, greedy",
    "best_of_4": "best of 4 by the reward model",
    "best_of_16": "best of 16 by the reward model",
    "ppo": "**PPO, sampled**",
    "ppo_greedy": "PPO, greedy",
    "ppo_kl0": "PPO with KL coefficient 0, sampled",
    "ppo_lora": "PPO with LoRA, sampled",
}


def seed_table(result: dict[str, Any]) -> str:
    """The systems of one seed, its reward model, the health of its PPO, as markdown."""
    lines = [
        "",
        "| system | gold reward | win rate over SFT (95 % interval) | proxy score | KL to SFT | tokens | ends |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in result["systems"].items():
        win = "" if s["win_rate"] is None else f"{s['win_rate']:.3f} {interval(s['win_rate_ci'], 3)}"
        kl = "" if s["kl"] is None else f"{s['kl']:.2f}"
        cells = (name, f"{s['gold']:.2f}", win, f"{s['proxy']:.2f}", kl)
        lines.append(row(*cells, f"{s['tokens']:.1f}", f"{s['eos_rate']:.3f}"))
    lines += [
        "",
        "| reward model: accuracy | best possible | on noise-free order | PPO: explained variance, 2nd half |",
        "|---|---|---|---|",
        row(*(f"{x:.3f}" for x in (*reward_model_figures(result), result["explained_var"]))),
    ]
    return "\n".join(lines)


def judged_table(result: dict[str, Any]) -> str:
    """PPO and best-of-n against the SFT model they start from, as the gold reward judges them."""
    lines = [
        f"\njudged by the gold reward on {result['prompts']} {result['split']} prompts; a tie is half a win:\n",
        "| systems | win rate (95 % interval) | at equal length | wins | ties | losses |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in (("ppo", "PPO"), ("best_of_4", "best of 4"), ("best_of_16", "best of 16")):
        s = result["systems"][key]
        controlled = "" if s["lc_win_rate"] is None else f"{s['lc_win_rate']:.3f}"
        win = f"{s['win_rate']:.3f} {interval(s['win_rate_ci'], 3)}"
        lines.append(row(f"{name} vs SFT", win, controlled, s["wins"], s["ties"], s["losses"]))
    ppo, best = (result["per_prompt"][name] for name in ("ppo", "best_of_16"))
    gap = f"{np.mean(ppo) - np.mean(best):+.2f} {interval(paired_bootstrap(ppo, best))}"
    return "\n".join([*lines, f"\ngold reward of PPO less that of best of 16, on the same prompts: {gap}\n"])


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with 95 % intervals over seeds and prompts, reward models, and PPO beside best-of-16.

    Args:
        results: of `judge_demo`, one per seed, on the same prompts.
    """
    over = "seeds and prompts" if len(results) >= 3 else "prompts, for three seeds are needed to speak of others"
    lines = [
        f"\n{len(results)} seeds, {results[0]['prompts']} {results[0]['split']} prompts; means, with 95 % "
        f"intervals over {over}:\n",
        "| system | gold reward | win rate over SFT, ties half | proxy | KL to SFT, nats | ends |",
        "|---|---|---|---|---|---|",
    ]
    for name in results[0]["systems"]:
        systems = [result["systems"][name] for result in results]
        gold = np.array([result["per_prompt"][name] for result in results])
        wins = np.array([win_scores(r["per_prompt"][name], r["per_prompt"]["sft"]) for r in results])
        proxy, ends = (np.mean([s[key] for s in systems]) for key in ("proxy", "eos_rate"))
        kl = "" if systems[0]["kl"] is None else f"{np.mean([s['kl'] for s in systems]):.1f}"
        win = "" if name == "sft" else estimate(wins, 3)
        lines.append(row(NAMES[name], estimate(gold), win, f"{proxy:.2f}", kl, f"{ends:.3f}"))
    lines += ["", "| reward model | accuracy | best possible | on noise-free order |", "|---|---|---|---|"]
    figures = np.array([reward_model_figures(result) for result in results])
    for result, of_seed in zip(results, figures):
        lines.append(row(f"seed {result['seed']}", *(f"{x:.3f}" for x in of_seed)))
    lines.append(row("mean", *(f"{x:.3f}" for x in figures.mean(axis=0))))
    gap = np.array([np.subtract(r["per_prompt"]["ppo"], r["per_prompt"]["best_of_16"]) for r in results])
    each = " / ".join(f"{x:+.2f}" for x in gap.mean(axis=1))
    lines.append(f"\ngold reward of PPO less that of best of 16, on the same prompts: {estimate(gap)}; by seed {each}")
    return "\n".join(lines)


def estimate(scores: np.ndarray, digits: int = 2) -> str:
    """Mean of scores [S, N] of S seeds on N prompts and its interval, over seeds too where there are three."""
    found = seed_bootstrap(scores) if len(scores) >= 3 else bootstrap_interval(scores.mean(axis=0))
    return f"{scores.mean():.{digits}f} {interval(found, digits)}"


def interval(ends: Sequence[float], digits: int = 2) -> str:
    """An interval in brackets."""
    return f"({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def reward_model_figures(result: dict[str, Any]) -> tuple[float, float, float]:
    """Accuracy on the labels, the best possible there, and accuracy on the noise-free order."""
    rm = result["reward_model"]
    return rm["accuracy"], rm["best_possible"], rm["noise_free_accuracy"]


def row(*cells: object) -> str:
    """One row of a markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
