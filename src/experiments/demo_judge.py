"""Judges the demo's models on held-out prompts by the gold reward that none of them was trained on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from inference.generate import Generation, generate
from models.gpt import GPT, GPTRewardModel
from training.loop import row_seeds
from training.sampling import compact
from utils.demo_gold import gold_reward
from utils.demo_world import best_possible_accuracy
from utils.loss import gather_logprobs
from utils.run_folder import REPO
from utils.statistics import bootstrap_interval, win_scores
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer, load_tokenizer

DEMO = REPO / "assets/demo"
RESPONSE_LENGTH, CHUNK = 64, 256


@dataclass(frozen=True)
class Judged:
    """One response per prompt, each field [N].

    gold, proxy: rewards. kl: log pi - log pi_SFT of the sample in nats, None for greedy and best-of.
    tokens: EOS included. ended: it has an EOS.
    """

    gold: np.ndarray
    proxy: np.ndarray
    kl: np.ndarray | None
    tokens: np.ndarray
    ended: np.ndarray


class DemoJudge:
    """Samples from models and grades the texts."""

    def __init__(self, sft: nn.Module, reward_model: nn.Module, tokenizer: Tokenizer, prompts: list[str]) -> None:
        self.sft, self.reward_model, self.tokenizer, self.prompts = sft, reward_model, tokenizer, prompts
        self.prompt_ids = [np.array(ids) for ids in tokenizer.encode_batch(prompts)]

    @torch.no_grad()
    def grade(self, model: nn.Module, temperature: float, seed: int, with_kl: bool = True) -> Judged:
        """One response of `model` to every prompt."""
        seeds = row_seeds(seed, -4, len(self.prompts))
        parts = []
        for i in range(0, len(self.prompts), CHUNK):
            generation = generate(
                model, self.prompt_ids[i : i + CHUNK], max_new_tokens=RESPONSE_LENGTH, eos_id=self.tokenizer.eos_id,
                pad_id=self.tokenizer.pad_id, temperature=temperature, seeds=seeds[i : i + CHUNK],
            )  # fmt: skip
            parts.append(self._grade(self.prompts[i : i + CHUNK], generation, model, with_kl and temperature > 0))
        fields = {name: [getattr(p, name) for p in parts] for name in ("gold", "proxy", "kl", "tokens", "ended")}
        return Judged(
            **{name: None if values[0] is None else np.concatenate(values) for name, values in fields.items()}
        )

    def _grade(self, prompts: list[str], generation: Generation, model: nn.Module, with_kl: bool) -> Judged:
        rows = compact(generation, self.tokenizer.pad_id, torch.device("cpu"))
        responses = [self.tokenizer.decode(r) for r in rows.responses()]
        kl = None
        if with_kl:
            batch = rows.micro_batch(np.arange(len(rows)))
            logp, logp_ref = (self._logp(m, batch) for m in (model, self.sft))
            kl = batch.unpack(logp - logp_ref).sum(1).numpy()
        proxy = self.reward_model(rows.ids, rows.att, right_padded=True).numpy()
        gold = np.array(gold_reward(prompts, responses))
        return Judged(gold, proxy, kl, rows.n.numpy(), rows.ended.numpy())

    @staticmethod
    def _logp(model: nn.Module, batch) -> Tensor:
        return gather_logprobs(model(batch.ids, batch.att, right_padded=True, at=batch.at), batch.tokens)


def best_of(samples: Sequence[Judged]) -> Judged:
    """Of several samples per prompt the one that the reward model likes best."""
    choice = np.stack([s.proxy for s in samples]).argmax(0)
    pick = {
        name: np.stack([getattr(s, name) for s in samples])[choice, np.arange(len(choice))]
        for name in ("gold", "proxy", "tokens", "ended")
    }
    return Judged(kl=None, **pick)


def judge_demo(runs: dict[str, Path], count: int, seed: int) -> dict[str, Any]:
    """Figures of all systems of one seed.

    Args:
        runs: run folders by name: vanilla, sft, rm, ppo and any ppo_*.
        count: held-out prompts. seed: of the sampling.
    """
    tokenizer = load_tokenizer(runs["sft"] / "final")
    load = {name: GPT.from_checkpoint(run / "final").eval() for name, run in runs.items() if name != "rm"}
    reward_model = GPTRewardModel.from_checkpoint(runs["rm"] / "final").eval()
    prompts = [row["prompt"] for row in read_rows(DEMO / "prompts-test.jsonl.gz")][:count]
    judge = DemoJudge(load["sft"], reward_model, tokenizer, prompts)
    graded = {name: judge.grade(model, 1.0, seed) for name, model in load.items()}
    graded["sft_greedy"] = judge.grade(load["sft"], 0.0, seed)
    graded["ppo_greedy"] = judge.grade(load["ppo"], 0.0, seed)
    samples = [
        judge.grade(load["sft"], 1.0, 1000 * (seed + 1) + k, with_kl=False) for k in tqdm(range(16), desc="best of 16")
    ]
    graded["best_of_4"], graded["best_of_16"] = best_of(samples[:4]), best_of(samples)
    order = ["vanilla", "sft", "sft_greedy", "best_of_4", "best_of_16", *(n for n in graded if n.startswith("ppo"))]
    return {
        "prompts": len(prompts),
        "systems": {name: summarise(graded[name], None if name == "sft" else graded["sft"]) for name in order},
        "reward_model": grade_reward_model(reward_model, tokenizer),
        "explained_var": explained_variance_second_half(runs["ppo"]),
    }


def summarise(system: Judged, baseline: Judged | None) -> dict[str, Any]:
    """Means over prompts, and the win rate over the baseline by the gold reward with ties as half."""
    wins = None if baseline is None else win_scores(system.gold, baseline.gold)
    return {
        "gold": float(system.gold.mean()),
        "proxy": float(system.proxy.mean()),
        "kl": None if system.kl is None else float(system.kl.mean()),
        "tokens": float(system.tokens.mean()),
        "eos_rate": float(system.ended.mean()),
        "win_rate": None if wins is None else float(wins.mean()),
        "win_rate_ci": None if wins is None else bootstrap_interval(wins),
    }


@torch.no_grad()
def grade_reward_model(model: nn.Module, tokenizer: Tokenizer) -> dict[str, float]:
    """Accuracy on the held-out pairs: as labelled (noisy), the best possible, and on the order of the gold rewards."""
    rows = read_rows(DEMO / "pairs-test.jsonl.gz")
    texts = [row[key] for row in rows for key in ("chosen", "rejected")]
    ids = [
        tokenizer.encode(p) + tokenizer.encode(r) + [tokenizer.eos_id]
        for p, r in map(PromptTemplate().split_dialogue, texts)
    ]
    order = np.argsort([len(x) for x in ids], kind="stable")
    scores = np.zeros(len(ids))
    for i in range(0, len(order), CHUNK):
        part = order[i : i + CHUNK]
        width = max(len(ids[j]) for j in part)
        att = torch.arange(width) < torch.tensor([len(ids[j]) for j in part])[:, None]
        padded = torch.tensor([ids[j] + [0] * (width - len(ids[j])) for j in part])
        scores[part] = model(padded, att, right_padded=True).numpy()
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
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["val/explained_var"] for line in lines if line.get("val/explained_var") is not None]
    return float(np.mean(values[len(values) // 2 :]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped JSON Lines file of the demo."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
