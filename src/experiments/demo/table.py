"""The tables of the demo: one seed for `make demo`, several with intervals over seeds and prompts for `-t results`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.markdown import interval, number, table
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
    systems = [
        (
            name, f"{s['gold']:.2f}", win_rate(s), f"{s['proxy']:.2f}", number(s["kl"], ".2f"), f"{s['tokens']:.1f}",
            f"{s['eos_rate']:.3f}",
        )
        for name, s in result["systems"].items()
    ]  # fmt: skip
    head = "system | gold reward | win rate over SFT (95 % interval) | proxy score | KL to SFT | tokens | ends"
    below = "reward model: accuracy | best possible | on noise-free order | PPO: explained variance, 2nd half"
    figures = [f"{x:.3f}" for x in (*reward_model_figures(result), result["explained_var"])]
    return f"\n{table(head, systems)}\n\n{table(below, [figures])}"


def win_rate(system: dict[str, Any]) -> str:
    """A system's win rate over SFT with its interval; nothing for SFT itself."""
    rate = system["win_rate"]
    return "" if rate is None else f"{rate:.3f} {interval(system['win_rate_ci'], '.3f')}"


def judged_table(result: dict[str, Any]) -> str:
    """PPO and best-of-n against the SFT model they start from, as the gold reward judges them."""
    rows = []
    for key, name in (("ppo", "PPO"), ("best_of_4", "best of 4"), ("best_of_16", "best of 16")):
        s = result["systems"][key]
        counts = (s["wins"], s["ties"], s["losses"])
        rows.append((f"{name} vs SFT", win_rate(s), number(s["lc_win_rate"], ".3f"), *counts))
    ppo, best = (result["per_prompt"][name] for name in ("ppo", "best_of_16"))
    return (
        f"\njudged by the gold reward on {result['prompts']} {result['split']} prompts; a tie is half a win:\n\n"
        + table("systems | win rate (95 % interval) | at equal length | wins | ties | losses", rows)
        + "\n\ngold reward of PPO less that of best of 16, on the same prompts: "
        f"{np.mean(ppo) - np.mean(best):+.2f} {interval(paired_bootstrap(ppo, best))}\n"
    )


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with 95 % intervals over seeds and prompts, reward models, and PPO beside best-of-16.

    Args:
        results: of `judge_demo`, one per seed, on the same prompts.
    """
    rows = []
    for name in results[0]["systems"]:
        systems = [result["systems"][name] for result in results]
        gold = np.array([result["per_prompt"][name] for result in results])
        wins = np.array([win_scores(r["per_prompt"][name], r["per_prompt"]["sft"]) for r in results])
        proxy, ends = (np.mean([s[key] for s in systems]) for key in ("proxy", "eos_rate"))
        kl = "" if systems[0]["kl"] is None else f"{np.mean([s['kl'] for s in systems]):.1f}"
        win = "" if name == "sft" else estimate(wins, ".3f")
        rows.append((NAMES[name], estimate(gold), win, f"{proxy:.2f}", kl, f"{ends:.3f}"))
    figures = np.array([reward_model_figures(result) for result in results])
    models = [(f"seed {result['seed']}", of_seed) for result, of_seed in zip(results, figures)]
    models.append(("mean", figures.mean(axis=0)))
    gap = np.array([np.subtract(r["per_prompt"]["ppo"], r["per_prompt"]["best_of_16"]) for r in results])
    over = "seeds and prompts" if len(results) >= 3 else "prompts, for three seeds are needed to speak of others"
    head = "reward model | accuracy | best possible | on noise-free order"
    return "\n".join([
        f"\n{len(results)} seeds, {results[0]['prompts']} {results[0]['split']} prompts; means, with 95 % intervals "
        f"over {over}:\n",
        table("system | gold reward | win rate over SFT, ties half | proxy | KL to SFT, nats | ends", rows),
        "",
        table(head, [(name, *(f"{x:.3f}" for x in found)) for name, found in models]),
        f"\ngold reward of PPO less that of best of 16, on the same prompts: {estimate(gap)}; by seed "
        + " / ".join(f"{x:+.2f}" for x in gap.mean(axis=1)),
    ])  # fmt: skip


def estimate(scores: np.ndarray, form: str = ".2f") -> str:
    """Mean of scores [S, N] of S seeds on N prompts and its interval, over seeds too where there are three."""
    found = seed_bootstrap(scores) if len(scores) >= 3 else bootstrap_interval(scores.mean(axis=0))
    return f"{scores.mean():{form}} {interval(found, form)}"


def reward_model_figures(result: dict[str, Any]) -> tuple[float, float, float]:
    """Accuracy on the labels, the best possible there, and accuracy on the noise-free order."""
    rm = result["reward_model"]
    return rm["accuracy"], rm["best_possible"], rm["noise_free_accuracy"]
