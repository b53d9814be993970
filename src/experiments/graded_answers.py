"""Answers to held-out prompts, graded by the reward of training (proxy) and by one that no model has seen (gold)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from inference.answers import Answer, Machine, Sampling, TextModel, kl_to_sft, sample_answers
from models.families import load_checkpoint
from utils.judging.judges import Score
from utils.tokenizer import load_tokenizer

Proxy = Callable[[Sequence[Answer], str], np.ndarray]
"""(answers [N], what the progress bar says) -> scores [N]."""


def text_model(checkpoint: Path, role: str = "lm") -> TextModel:
    """A model with its tokenizer and template; UserError where the checkpoint holds one of another role."""
    from training.start import template_of  # Accelerate takes seconds to import; most quick looks do without

    return TextModel(load_checkpoint(checkpoint, role).eval(), load_tokenizer(checkpoint), template_of(checkpoint))


@dataclass(frozen=True)
class Graded:
    """One answer per prompt, each field [N].

    gold, proxy: rewards. kl: log pi - log pi_SFT of the sample in nats, None for greedy and best-of.
    tokens: EOS included. ended: it has an EOS.
    """

    gold: np.ndarray
    proxy: np.ndarray
    kl: np.ndarray | None
    tokens: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class Grader:
    """Has policies answer the same prompts and grades what they say.

    sft: the model that KL is measured to. proxy: the reward of training, on token ids. gold: the judge, on texts
    without EOS. prompts: in the template's form [N].
    """

    sft: TextModel
    proxy: Proxy
    gold: Score
    prompts: Sequence[str]
    sampling: Sampling
    machine: Machine = field(default_factory=Machine)

    def grade(self, policy: TextModel, name: str, draw: int = 0, greedy: bool = False) -> Graded:
        """One answer of `policy` to every prompt; `name` and `draw` choose the random numbers (`sample_answers`)."""
        sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
        answers = sample_answers(policy, self.prompts, name, sampling, self.machine, draw)
        return Graded(
            gold=np.array(self.gold([a.prompt for a in answers], [a.text for a in answers])),
            proxy=self.proxy(answers, f"{name}: proxy"),
            kl=kl_to_sft(policy, self.sft, answers, sampling.temperature, self.machine, name),
            tokens=np.array([a.tokens for a in answers]),
            ended=np.array([a.ended for a in answers]),
        )

    def draws(self, count: int) -> list[Graded]:
        """`count` independent answers of the SFT model to every prompt: what best-of-n chooses from."""
        bar = tqdm(range(count), desc="samples of the SFT model", unit="", leave=False, delay=1, disable=None)
        return [self.grade(self.sft, "best_of", draw) for draw in bar]


def best_of(samples: Sequence[Graded]) -> Graded:
    """Of several samples per prompt the one that the proxy likes best."""
    choice = np.stack([s.proxy for s in samples]).argmax(0)
    pick = {
        name: np.stack([getattr(s, name) for s in samples])[choice, np.arange(len(choice))]
        for name in ("gold", "proxy", "tokens", "ended")
    }
    return Graded(kl=None, **pick)
