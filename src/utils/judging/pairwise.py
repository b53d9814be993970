"""Which of two systems' answers is better: every pair judged in both orders, and the figures that come of it.

A prompt's score is the mean of its two orders, 1, one half (tie) or 0 each, so a judge that always prefers one position
gives exactly one half. Unparsed and failed verdicts are counted apart and are never a win or a loss.

Shapes: N prompts; 2N questions, the two orders of a prompt side by side (a stop in the middle leaves whole prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from utils.judging.length_control import length_controlled_win_rate
from utils.statistics import bootstrap_interval, wilson_interval

# The end marks of common tokenizers, which answers made elsewhere may still carry.
_END_MARKS = (
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<|return|>",
    "<end_of_turn>", "<eos>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


class Verdict(StrEnum):
    """What a judge says about one question. UNPARSED: it answered, but not clearly. FAILED: no answer was had."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    UNPARSED = "unparsed"
    FAILED = "failed"

    @property
    def clear(self) -> bool:
        """Whether it may enter a win rate."""
        return self in (Verdict.FIRST, Verdict.SECOND, Verdict.TIE)


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt, in the order in which the judge sees them, as `blind` leaves them."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class JudgePlan:
    """What judging some questions would take.

    calls: that must be made, after what needs none (cached, identical answers, repeated questions). cost: estimated, in
    US dollars; 0 for a judge that runs here, None when the price is not known. note: one line for a person.
    """

    questions: int
    calls: int
    cached: int
    cost: float | None
    note: str


class Judge(Protocol):
    """Decides questions."""

    def describe(self) -> dict[str, Any]:
        """What decided, for the record (JSON): kind, model and the like, what it has cost so far."""

    def plan(self, questions: Sequence[Question]) -> JudgePlan:
        """What `judge` would have to do; asks nobody."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in order."""


def blind(answer: str) -> str:
    """An answer as the judge sees it: no end marks, no white space at the ends, which would tell systems apart."""
    answer = answer.strip()
    while mark := next((mark for mark in _END_MARKS if answer.endswith(mark)), None):
        answer = answer.removesuffix(mark).rstrip()
    return answer


def both_orders(prompts: Sequence[str], answers_a: Sequence[str], answers_b: Sequence[str]) -> list[Question]:
    """2N questions: 2i shows a's answer to prompt i first, 2i + 1 shows b's first."""
    questions = []
    for prompt, a, b in zip(prompts, map(blind, answers_a), map(blind, answers_b), strict=True):
        questions += [Question(prompt, a, b), Question(prompt, b, a)]
    return questions


@dataclass(frozen=True)
class Comparison:
    """How often the answers of system `a` were preferred to those of `b`.

    n: prompts with a score; unparsed, failed: prompts without one, because at least one order was not clear or was not
    answered (failed when both happened). scores: per prompt [N], NaN where there is none.
    win_rate: mean score; win_rate_ci: bootstrap over prompts. decisive_wins, ties, decisive_losses: prompts whose score
    is above, at, below one half; they add up to n. wilson: of wins among the decisive prompts, a cross-check.
    inconsistent: prompts whose two orders disagree. consistency: share of prompts whose orders agree, among those whose
    two answers differ. first_position_rate: share of single verdicts other than ties that chose the first answer.
    identical: prompts with the same answer from both. lc_win_rate, lc_win_rate_ci: at equal lengths
    (`utils/judging/length_control.py`). mean_length_a, mean_length_b: words, over the prompts with a score.
    Whatever has nothing to be computed from is None.
    """

    a: str
    b: str
    n: int
    win_rate: float | None
    win_rate_ci: tuple[float, float] | None
    decisive_wins: int
    decisive_losses: int
    ties: int
    inconsistent: int
    identical: int
    consistency: float | None
    first_position_rate: float | None
    lc_win_rate: float | None
    lc_win_rate_ci: tuple[float, float] | None
    wilson: tuple[float, float] | None
    unparsed: int
    failed: int
    mean_length_a: float | None
    mean_length_b: float | None
    scores: np.ndarray = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the scores, ready for json.dump."""
        figures = {name: value for name, value in asdict(self).items() if name != "scores"}
        return figures | {"length_unit": "words"}


_POINTS = {Verdict.FIRST: 1.0, Verdict.TIE: 0.5, Verdict.SECOND: 0.0}
_SWAPPED = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST, Verdict.TIE: Verdict.TIE}


def compare(
    name_a: str, name_b: str, prompts: Sequence[str], answers_a: Sequence[str], answers_b: Sequence[str], judge: Judge
) -> Comparison:
    """Judge every prompt in both orders and add up; answers are matched to prompts by position."""
    verdicts = judge.judge(both_orders(prompts, answers_a, answers_b))
    return tally(name_a, name_b, answers_a, answers_b, verdicts)


def tally(
    name_a: str, name_b: str, answers_a: Sequence[str], answers_b: Sequence[str], verdicts: Sequence[Verdict]
) -> Comparison:
    """The figures of one pair of systems; answers_a, answers_b: [N], verdicts: [2N], of `both_orders`."""
    a, b = [blind(answer) for answer in answers_a], [blind(answer) for answer in answers_b]
    pairs = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    if not len(pairs) == len(a) == len(b):
        raise ValueError(f"{len(a)} and {len(b)} answers need two verdicts each, not {len(verdicts)} in all")
    clear = np.array([one.clear and two.clear for one, two in pairs], dtype=bool)
    agree = np.array([one == _SWAPPED.get(two) for one, two in pairs], dtype=bool)
    failed = sum(Verdict.FAILED in pair for pair in pairs)
    scores = np.array([(_POINTS[one] + 1 - _POINTS[two]) / 2 if ok else np.nan for (one, two), ok in zip(pairs, clear)])
    judged = scores[clear]
    same = np.array([x == y for x, y in zip(a, b)], dtype=bool) & clear
    differ = clear & ~same
    wins, losses = int((judged > 0.5).sum()), int((judged < 0.5).sum())
    singles = [verdict for verdict in verdicts if verdict in (Verdict.FIRST, Verdict.SECOND)]
    words_a, words_b = (np.array([len(text.split()) for text in texts], dtype=float)[clear] for texts in (a, b))
    controlled = length_controlled_win_rate(judged, words_a, words_b) if len(judged) else None
    return Comparison(
        a=name_a,
        b=name_b,
        n=len(judged),
        win_rate=_mean(judged),
        win_rate_ci=bootstrap_interval(judged) if len(judged) else None,
        decisive_wins=wins,
        decisive_losses=losses,
        ties=len(judged) - wins - losses,
        inconsistent=int((clear & ~agree).sum()),
        identical=int(same.sum()),
        consistency=_mean(agree[differ]),
        first_position_rate=_mean([verdict is Verdict.FIRST for verdict in singles]),
        lc_win_rate=controlled.win_rate if controlled else None,
        lc_win_rate_ci=controlled.ci if controlled else None,
        wilson=wilson_interval(wins, wins + losses) if wins + losses else None,
        unparsed=len(pairs) - len(judged) - failed,
        failed=failed,
        mean_length_a=_mean(words_a),
        mean_length_b=_mean(words_b),
        scores=scores,
    )


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
