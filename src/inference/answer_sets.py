"""The answers of every system of an evaluation, and the figures that need a model: KL to the SFT model, proxy score.

Sampled answers are kept under the runs' .cache/, named by the weights and by all that decides them. An evaluation that
is started again therefore judges the very same texts, on a GPU too, and what was paid for them stays valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config.user_error import UserError
from inference.answers import (
    Answer,
    Machine,
    Sampling,
    TextModel,
    best_of,
    kl_to_sft,
    prompt_tokens,
    read_answers,
    sample_answers,
    score_answers,
    system_figures,
)
from inference.best_of_n import best_of_n_estimate, best_of_n_kl
from inference.systems import System
from utils.data.token_cache import read_arrays, write_arrays
from utils.judging.pairwise import blind
from utils.template import PromptTemplate

_CACHE_VERSION = 1  # raise it when the same weights and settings would give other answers

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass
class AnswerSet:
    """One answer of a system to each of N prompts.

    kl, proxy: [N] or None, see `inference.answers`. samples, sample_proxy: of best-of-n all draws, each of N answers,
    and their scores [draws, N]. cut_prompts: how many prompts lost their beginning to fit the context.
    """

    system: System
    answers: list[Answer]
    kl: np.ndarray | None = None
    proxy: np.ndarray | None = None
    cut_prompts: int = 0
    samples: list[list[Answer]] = field(default_factory=list)
    sample_proxy: np.ndarray | None = None

    @property
    def texts(self) -> list[str]:
        """The answers as a judge sees them [N]."""
        return [blind(answer.text) for answer in self.answers]

    def rewards(self, score: Score) -> np.ndarray:
        """What a function (prompts, answers) -> floats says of the answers, as a judge sees them: [N]."""
        return _rewards(score, self.answers)

    def figures(self, gold: Score | None) -> dict[str, Any]:
        """The system's entry in evaluation.json; `gold` scores (prompts, answers), where there is such a reward."""
        rewards = None if gold is None else self.rewards(gold)
        entry = self.system.describe() | system_figures(self.answers, self.kl, self.proxy, rewards)
        entry |= {"cut_prompts": self.cut_prompts}
        if self.system.kind != "best_of_n":
            return entry
        n, draws = self.system.n, self.sample_proxy
        estimate = {"samples": len(draws), "proxy": float(best_of_n_estimate(draws.T, draws.T, n).mean())}
        if gold is not None:
            golds = np.stack([_rewards(gold, answers) for answers in self.samples])
            estimate["gold"] = float(best_of_n_estimate(draws.T, golds.T, n).mean())
        return entry | {"analytic_kl": best_of_n_kl(n), "unbiased": estimate}


def _rewards(score: Score, answers: Sequence[Answer]) -> np.ndarray:
    return np.array(score([a.prompt for a in answers], [blind(a.text) for a in answers]), dtype=np.float64)


@dataclass
class Answering:
    """How all systems of one evaluation answer.

    prompts: in the template's form [N]. reward_model: None without proxy scores. cache: folder of sampled answers.
    """

    prompts: Sequence[str]
    template: PromptTemplate
    sampling: Sampling
    machine: Machine
    reward_model: TextModel | None
    cache: Path

    def answer_sets(self, systems: Sequence[System]) -> list[AnswerSet]:
        """The answers of all systems, in their order; beside the SFT model, one language model at a time is loaded.

        UserError where one cannot be, or a file lacks an answer.
        """
        # What takes no time is checked first.
        files = {s.name: self._from_file(s) for s in systems if s.kind == "file"}
        sft_system = next((s for s in systems if s.flag.startswith("-s ")), None)
        sft = sft_system.load() if sft_system else None
        draws = max((s.n for s in systems if s.kind == "best_of_n"), default=0)
        samples, scores = self._draws(sft, draws) if draws else ([], None)
        found = []
        for system in systems:
            if system.kind == "file":
                found.append(files[system.name])
            elif system.kind == "best_of_n":
                answers = best_of(samples, scores, system.n)
                proxy = scores[: system.n].max(0)
                cut = prompt_tokens(sft, self.prompts, self.sampling.max_new_tokens)[1]
                found.append(AnswerSet(system, answers, None, proxy, cut, samples, scores))
            else:
                found.append(self._from_model(system, sft if system is sft_system else system.load(), sft))
        return found

    def _from_file(self, system: System) -> AnswerSet:
        answers = read_answers(Path(system.source), self.prompts, self.template, system.flag)
        return AnswerSet(system, answers, None, self._proxy(None, answers, system.name))

    def _from_model(self, system: System, source: TextModel, sft: TextModel | None) -> AnswerSet:
        answers = self._sampled(source, system.name)
        kl = sft and kl_to_sft(source, sft, answers, self.sampling.temperature, self.machine, system.name)
        cut = prompt_tokens(source, self.prompts, self.sampling.max_new_tokens)[1]
        return AnswerSet(system, answers, kl, self._proxy(source, answers, system.name), cut)

    def _draws(self, sft: TextModel, count: int) -> tuple[list[list[Answer]], np.ndarray]:
        """`count` samples of the SFT model to each prompt, independent of its own answers, and their scores."""
        if self.sampling.temperature == 0:
            raise UserError("--best-of: greedy samples are all alike; give a --temperature above 0")
        if self.reward_model is None:
            raise UserError("--best-of: a reward model has to choose; name it with -c")
        samples = [self._sampled(sft, "best_of", draw) for draw in range(count)]
        return samples, np.stack([self._proxy(sft, answers, "best_of") for answers in samples])

    def _proxy(self, source: TextModel | None, answers: Sequence[Answer], name: str) -> np.ndarray | None:
        """The reward model's scores; by the text where the answer's tokens are not its own, or none (no `source`)."""
        rm = self.reward_model
        if rm is None:
            return None
        own_ids = source is not None and rm.same_tokens(source)
        return score_answers(rm, answers, self.machine, name, own_ids)

    def _sampled(self, source: TextModel, name: str, draw: int = 0) -> list[Answer]:
        """`sample_answers`, or what it gave before."""
        rows, _ = prompt_tokens(source, self.prompts, self.sampling.max_new_tokens)
        identity = {
            "version": _CACHE_VERSION, "weights": source.digest, "name": name, "draw": draw,
            "tokenizer": source.tokenizer.identity()["sha256"], "dtype": self.machine.dtype, **asdict(self.sampling),
            "prompts": hashlib.sha256(json.dumps([row.tolist() for row in rows]).encode()).hexdigest(),
        }  # fmt: skip
        if len(source.tokenizer.stop_ids) > 1:
            identity["stop_ids"] = source.tokenizer.stop_ids
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        arrays = read_arrays(self.cache, key)
        if arrays is None:
            answers = sample_answers(source, self.prompts, name, self.sampling, self.machine, draw)
            arrays = {
                "ids": np.concatenate([a.ids for a in answers]),
                "lengths": np.array([len(a.ids) for a in answers]),
                "ended": np.array([a.ended for a in answers]),
            }
            write_arrays(self.cache, key, arrays)
        parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        texts = [source.tokenizer.decode(ids).strip() for ids in parts]
        return [Answer(*row) for row in zip(self.prompts, texts, rows, parts, arrays["ended"].tolist(), strict=True)]
