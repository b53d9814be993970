"""What PPO made of a model: the rewards of training (proxy) and of judging (gold), distance, perplexity, samples.

Shapes: N held-out prompts, D independent answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config.user_error import UserError
from experiments.graded_answers import Proxy, text_model
from experiments.overoptimisation.run import PPORun
from inference.answers import Answer, Machine, Sampling, TextModel, answer_logprobs, sample_answers
from utils.judging.judges import Score
from utils.metrics import text_degeneracy
from utils.runs.finding import newest_run
from utils.statistics import bootstrap_interval, paired_bootstrap, win_scores

_SAMPLES = 10


@dataclass(frozen=True)
class Answers:
    """Answers of one policy, each field [N, D]: rewards, nats of KL, tokens, nats of -log p under the start model."""

    answers: list[Answer] = field(repr=False)
    gold: np.ndarray
    proxy: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray
    surprise: np.ndarray

    def figures(self) -> dict[str, Any]:
        """Means with 95 % intervals over prompts; perplexity is per token, of all answers together."""
        return {
            **{f"{name}": float(getattr(self, name).mean()) for name in ("gold", "proxy", "kl", "tokens")},
            **{f"{name}_ci": bootstrap_interval(getattr(self, name).mean(1)) for name in ("gold", "proxy", "kl")},
            **{f"{name}_sd": float(getattr(self, name).std()) for name in ("gold", "proxy")},
            "perplexity": math.exp(self.surprise.sum() / self.tokens.sum()),
            "ended": float(np.mean([answer.ended for answer in self.answers])),
            **text_degeneracy([answer.text.split() for answer in self.answers]),
        }


@dataclass(frozen=True)
class Examiner:
    """Has policies answer held-out prompts, all with the same random numbers.

    start: the SFT model that PPO started from. gold: on texts. prompts: [N] in the template's form. draws: D.
    """

    start: TextModel
    proxy: Proxy
    gold: Score
    prompts: list[str]
    draws: int
    sampling: Sampling
    machine: Machine

    def examine(self, policy: TextModel, name: str) -> Answers:
        """D answers of `policy` to every prompt, graded."""
        shape, tau = (len(self.prompts), self.draws), self.sampling.temperature
        asked = [prompt for prompt in self.prompts for _ in range(self.draws)]
        answers = sample_answers(policy, asked, "policy", self.sampling, self.machine)

        def logprobs(model: TextModel, temperature: float) -> np.ndarray:
            pad = self.start.tokenizer.pad_id
            return answer_logprobs(model.model, answers, pad, temperature, self.machine, name).reshape(shape)

        reference = logprobs(self.start, tau)
        return Answers(
            answers=answers,
            gold=np.array(self.gold([a.prompt for a in answers], [a.text for a in answers])).reshape(shape),
            proxy=self.proxy(answers, f"{name}: proxy").reshape(shape),
            kl=np.zeros(shape) if policy is self.start else logprobs(policy, tau) - reference,
            tokens=np.array([a.tokens for a in answers]).reshape(shape),
            surprise=-(reference if tau == 1 else logprobs(self.start, 1.0)),
        )


def judge_run(run: PPORun, examiner: Examiner, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Figures of the start model, of every checkpoint that the run kept, and of the last one against the start.

    "gain": how much gold rose, in deviations of the start model's gold over answers. "samples": the first answers of
    both to ten prompts.
    """
    before = examiner.examine(examiner.start, "SFT")
    tell(_told("SFT", before.figures()))
    course, after = [], before
    for step, folder in run.checkpoints().items():
        after = examiner.examine(text_model(folder), f"step {step}")
        course.append({"step": step, **after.figures()})
        tell(_told(f"step {step}", course[-1]))
    sft, ppo = before.figures(), course[-1]
    rose = paired_bootstrap(after.gold.mean(1), before.gold.mean(1))
    wins = win_scores(after.gold, before.gold).mean(1)
    return {
        "prompts": len(examiner.prompts), "draws": examiner.draws, "temperature": examiner.sampling.temperature,
        "tokens": examiner.sampling.max_new_tokens, "sft": sft, "best_of": best_of(before), "ppo": ppo,
        "course": course,
        "gain": (ppo["gold"] - sft["gold"]) / sft["gold_sd"], "gain_ci": [end / sft["gold_sd"] for end in rose],
        "win_rate": float(wins.mean()), "win_rate_ci": bootstrap_interval(wins),
        "perplexity_ratio": ppo["perplexity"] / sft["perplexity"],
        "correlation": float(np.corrcoef(before.proxy.ravel(), before.gold.ravel())[0, 1]),
        "samples": samples(before, after, examiner.draws),
    }  # fmt: skip


def best_of(answers: Answers) -> dict[str, Any]:
    """Of the D answers to each prompt the one that the proxy likes best: what PPO has to be better than."""
    chosen = np.arange(len(answers.proxy)), answers.proxy.argmax(1)
    rewards = {name: getattr(answers, name)[chosen] for name in ("proxy", "gold")}
    means = {name: float(values.mean()) for name, values in rewards.items()}
    return means | {f"{name}_ci": bootstrap_interval(values) for name, values in rewards.items()}


def samples(before: Answers, after: Answers, draws: int) -> list[dict[str, Any]]:
    """The first answer before and after to ten prompts evenly spaced over the split; none is chosen by its figures."""
    count = len(before.gold)
    rows = [i * count // _SAMPLES for i in range(_SAMPLES)] if count > _SAMPLES else range(count)
    return [
        {
            "prompt": before.answers[i * draws].prompt,
            **{f"{name}": a.answers[i * draws].text for name, a in (("sft", before), ("ppo", after))},
            **{f"{name}_gold": float(a.gold[i, 0]) for name, a in (("sft", before), ("ppo", after))},
        }
        for i in rows
    ]


def _told(name: str, figures: dict[str, Any]) -> str:
    shown = ", ".join(f"{key} {figures[key]:.2f}" for key in ("proxy", "gold", "kl", "perplexity", "tokens"))
    return f"{name}: {shown}"


def pair_accuracy(score: Score, pairs: list[tuple[tuple[str, str], tuple[str, str]]]) -> dict[str, Any]:
    """How often a reward model prefers what people preferred, and how often the longer text is that.

    Args:
        pairs: ((prompt, chosen), (prompt, rejected)) each.
    """
    texts = [text for pair in pairs for text in pair]
    scores = np.array(score([prompt for prompt, _ in texts], [said for _, said in texts]))
    right = win_scores(scores[0::2], scores[1::2])
    words = np.array([len(said) for _, said in texts])
    longer = win_scores(words[0::2], words[1::2])
    return {
        "pairs": len(pairs), "accuracy": float(right.mean()), "accuracy_ci": bootstrap_interval(right),
        "longer_wins": float(longer.mean()), "longer_wins_ci": bootstrap_interval(longer),
    }  # fmt: skip


def final_of(stem: str, runs_dir: str) -> Path:
    """The final checkpoint of the newest run of a name; UserError where it has none."""
    run = newest_run(stem, runs_dir)
    if run is None or not (run / "final").is_dir():
        raise UserError(f"--judge-only: {stem} has not been trained to its end; leave the flag out")
    return run / "final"
