"""Judges by name: a program or a reward model that scores answers here, or a language model behind an API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from config.user_error import UserError
from utils.demo.gold import gold_reward
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Judge, JudgePlan, Question, Verdict
from utils.judging.requests import JudgeOptions
from utils.reward_function import load_reward_function

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class ScoreJudge:
    """Prefers the answer with the higher score; equal scores tie.

    Each distinct pair of prompt and answer is scored once, so the two orders of a pair agree by construction, and equal
    texts have equal scores.
    """

    def __init__(self, name: str, score: Score) -> None:
        """`score` takes (prompts, answers), two lists of the same length, and returns one finite float per answer."""
        self.name, self.score = name, score
        self._scores: dict[tuple[str, str], float] = {}

    def describe(self) -> dict[str, Any]:
        """Kind only: scores are made here, with nothing to pay."""
        return {"kind": self.name, "cost_usd": 0.0}

    def plan(self, questions: Sequence[Question]) -> JudgePlan:
        """No calls and no cost."""
        texts = len(self._unscored(questions))
        return JudgePlan(len(questions), 0, 0, 0.0, f"judge {self.name}: {texts} texts to score here, no calls")

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """The side with the higher score, or TIE."""
        if texts := self._unscored(questions):
            prompts, answers = map(list, zip(*texts))
            self._scores.update(zip(texts, self.score(prompts, answers), strict=True))
        return [self._verdict(question) for question in questions]

    def _unscored(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        texts = dict.fromkeys((q.prompt, answer) for q in questions for answer in (q.first, q.second))
        return [text for text in texts if text not in self._scores]

    def _verdict(self, question: Question) -> Verdict:
        first, second = (self._scores[question.prompt, answer] for answer in (question.first, question.second))
        return Verdict.TIE if first == second else Verdict.FIRST if first > second else Verdict.SECOND


def make_judge(spec: str, options: JudgeOptions, load_scores: Callable[[str], Score] | None = None) -> Judge:
    """The judge that a `--judge` flag names.

    Args:
        spec: `openai`, `gold` (the demo's reward; its prompts and answers are the demo's), `rm:CHECKPOINT`, or
            `FILE.py:FUNCTION` with a function (prompts, answers) -> one float per answer.
        options: of the `openai` judge.
        load_scores: makes the scores of `rm:CHECKPOINT` from the text after the colon: nothing here knows models.

    Raises:
        UserError: no such judge, or what the spec names cannot be used.
    """
    kind, _, source = spec.partition(":")
    if spec == "openai":
        return OpenAIJudge(options)
    if spec == "gold":
        return ScoreJudge("gold", gold_reward)
    if kind == "rm" and source and load_scores is not None:
        return ScoreJudge(spec, load_scores(source))
    if spec.rpartition(":")[0].endswith(".py"):
        return ScoreJudge(spec, load_reward_function(spec, "--judge"))
    raise UserError(f"--judge {spec}: there are openai, gold, rm:CHECKPOINT and FILE.py:FUNCTION")
