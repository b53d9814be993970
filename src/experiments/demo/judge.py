"""Judges the demo's models on held-out prompts by the gold reward that none of them was trained on.

Everything about the world and the recipe was chosen by the figures of the validation split. The test split is for the
tables of docs/results.md: looked at once, when nothing is to be chosen any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.graded_answers import Graded, Grader, best_of, text_model
from experiments.overoptimisation.run import (
    PPORun,
    held_out_prompts,
    measure,
    proxy_of,
    reward_function_of,
    write_overoptimisation,
)
from experiments.run_plots import read_metrics
from inference.answers import Machine, Sampling, TextModel, score_texts
from inference.systems import load_reward_model
from utils.data.files import read_jsonl
from utils.demo.gold import gold_reward
from utils.demo.world import best_possible_accuracy
from utils.judging.length_control import length_controlled_win_rate
from utils.runs.folder import REPO
from utils.statistics import bootstrap_interval, win_scores

DEMO = REPO / "assets/demo"
BEST_OF, BATCH = 16, 256


def judge_demo(runs: dict[str, Path], count: int, seed: int, split: str = "validation") -> dict[str, Any]:
    """Figures of all systems of one seed, and the over-optimisation picture of its PPO run ("overoptimisation").

    Args:
        runs: run folders of "vanilla", "sft", "rm", "ppo" and, if there, "ppo_kl0", "ppo_lora".
        count: held-out prompts of `split` ("validation" or "test") to judge on.
        seed: of the samples.

    Returns the figures as JSON values; "per_prompt" has the gold reward of each system on each prompt, in the order of
    the split.
    """
    machine = Machine("cpu", BATCH)
    models = {name: text_model(run / "final") for name, run in runs.items() if name != "rm"}
    reward_model = load_reward_model(runs["rm"] / "final", "rm")
    ppo = PPORun.read(runs["ppo"])
    prompts = held_out_prompts("demo", models["sft"].template, count, split)
    sampling = Sampling(ppo.config["temperature"], ppo.config["response_length"], seed)
    proxy = proxy_of(ppo, machine, reward_function_of(ppo))
    grader = Grader(models["sft"], proxy, gold_reward, prompts, sampling, machine)
    graded = {name: grader.grade(model, name) for name, model in models.items()}
    graded["sft_greedy"] = grader.grade(models["sft"], "sft", greedy=True)
    graded["ppo_greedy"] = grader.grade(models["ppo"], "ppo", greedy=True)
    samples = grader.draws(BEST_OF)
    graded["best_of_4"], graded["best_of_16"] = best_of(samples[:4]), best_of(samples)
    order = ["vanilla", "sft", "sft_greedy", "best_of_4", "best_of_16", *(n for n in graded if n.startswith("ppo"))]
    checkpoints = measure(ppo, grader, known={max(ppo.checkpoints()): graded["ppo"]})
    _, picture = write_overoptimisation(ppo, checkpoints, samples, "gold", sampling, ppo.folder)
    return {
        "split": split,
        "prompts": len(prompts),
        "systems": {name: summarise(graded[name], None if name == "sft" else graded["sft"]) for name in order},
        "per_prompt": {name: graded[name].gold.tolist() for name in order},
        "reward_model": grade_reward_model(reward_model, machine, split),
        "explained_var": explained_variance_second_half(runs["ppo"]),
        "overoptimisation": str(picture),
    }


def summarise(system: Graded, baseline: Graded | None) -> dict[str, Any]:
    """Means over prompts; against the baseline by the gold reward, with ties as half."""
    figures = {
        "gold": float(system.gold.mean()),
        "proxy": float(system.proxy.mean()),
        "kl": None if system.kl is None else float(system.kl.mean()),
        "tokens": float(system.tokens.mean()),
        "eos_rate": float(system.ended.mean()),
    }
    if baseline is None:
        return figures | dict.fromkeys(("win_rate", "win_rate_ci", "wins", "ties", "losses", "lc_win_rate"))
    scores = win_scores(system.gold, baseline.gold)
    controlled = length_controlled_win_rate(scores, system.tokens, baseline.tokens)
    return figures | {
        "win_rate": float(scores.mean()),
        "win_rate_ci": bootstrap_interval(scores),
        **{name: int((scores == score).sum()) for name, score in (("wins", 1), ("ties", 0.5), ("losses", 0))},
        "lc_win_rate": controlled and controlled.win_rate,
    }


def grade_reward_model(reward_model: TextModel, machine: Machine, split: str = "validation") -> dict[str, float]:
    """Accuracy on held-out pairs: as labelled (noisy), the best possible, and on the order of the gold rewards."""
    rows = read_rows(DEMO / f"pairs-{split}.jsonl.gz")
    dialogues = [reward_model.template.split_dialogue(row[key]) for row in rows for key in ("chosen", "rejected")]
    scores = np.array(score_texts(reward_model, machine)(*map(list, zip(*dialogues))))
    right = win_scores(scores[0::2], scores[1::2])
    by_gold = np.array([row["gold_chosen"] > row["gold_rejected"] for row in rows])
    return {
        "accuracy": float(right.mean()),
        "best_possible": best_possible_accuracy(rows),
        "noise_free_accuracy": float(np.where(by_gold, right, 1 - right).mean()),
        "pairs": len(rows),
    }


def explained_variance_second_half(run: Path) -> float:
    """Mean of val/explained_var over the second half of a PPO run."""
    _, values = read_metrics(run)["val/explained_var"]
    return float(np.mean(values[len(values) // 2 :]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped JSON Lines file of the demo."""
    return [row for _, row in read_jsonl(path)]
