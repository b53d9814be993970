"""Two orders per prompt, and the figures of a pair of systems."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from utils.judging.length_control import length_controlled_win_rate
from utils.judging.pairwise import Question, Verdict, blind, both_orders, compare, tally
from utils.statistics import bootstrap_interval, wilson_interval

FIRST, SECOND, TIE, UNPARSED, FAILED = Verdict
# Verdicts of the two orders in which a wins, loses or ties both.
WIN, LOSS, DRAW = (FIRST, SECOND), (SECOND, FIRST), (TIE, TIE)


class Rule:
    """A judge that is a function of the question."""

    def __init__(self, rule: Callable[[Question], Verdict]) -> None:
        self.rule = rule

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self.rule(question) for question in questions]


def run(rule: Callable[[Question], Verdict], a: list[str], b: list[str], names: tuple[str, str] = ("a", "b")):
    return compare(*names, [f"prompt {i}" for i in range(len(a))], a, b, Rule(rule))


def of_verdicts(*pairs: tuple[Verdict, Verdict]):
    a, b = ([f"{name} {i}" for i in range(len(pairs))] for name in "ab")
    return tally("a", "b", a, b, [verdict for pair in pairs for verdict in pair])


def test_the_two_orders_of_a_prompt_stand_side_by_side():
    assert both_orders(["p", "q"], ["a0", "a1"], ["b0", "b1"]) == [
        Question("p", "a0", "b0"),
        Question("p", "b0", "a0"),
        Question("q", "a1", "b1"),
        Question("q", "b1", "a1"),
    ]


def test_every_prompt_needs_two_answers():
    with pytest.raises(ValueError, match="shorter"):
        both_orders(["p", "q"], ["a0", "a1"], ["b0"])
    with pytest.raises(ValueError, match="two verdicts each"):
        tally("a", "b", ["x", "y"], ["x", "y"], [FIRST, SECOND])


@pytest.mark.parametrize(
    "answer", [" yes", "yes \n", "yes<|endoftext|>", "yes <|endoftext|>\n<|endoftext|>", "yes</s>", "yes<|im_end|>\n"]
)
def test_answers_do_not_show_who_wrote_them(answer):
    assert blind(answer) == "yes"


def test_marks_inside_an_answer_stay():
    assert blind("use <|endoftext|> as the end") == "use <|endoftext|> as the end"
    assert blind(" <|endoftext|> ") == ""


def test_prompts_reach_the_judge_unchanged():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    assert {question.prompt for question in both_orders([prompt], [" a"], [" b"])} == {prompt}


@pytest.mark.parametrize(("always", "rate"), [(FIRST, 1.0), (SECOND, 0.0)])
def test_a_judge_of_positions_decides_nothing(always, rate):
    result = run(lambda _: always, ["x y", "x", "z"], ["y", "w w w", "v"])
    assert (result.win_rate, result.consistency, result.first_position_rate) == (0.5, 0.0, rate)
    assert (result.n, result.ties, result.inconsistent, result.decisive_wins, result.decisive_losses) == (3, 3, 3, 0, 0)
    assert result.win_rate_ci == (0.5, 0.5) and result.wilson is None


def test_scores_of_the_specification():
    result = of_verdicts(WIN, (FIRST, FIRST), LOSS, (TIE, SECOND))
    assert result.scores.tolist() == [1.0, 0.5, 0.0, 0.75]
    assert result.win_rate == 0.5625
    assert (result.decisive_wins, result.ties, result.decisive_losses, result.inconsistent) == (2, 1, 1, 2)
    assert result.consistency == 0.5
    singles = [*WIN, FIRST, FIRST, *LOSS, SECOND]
    assert result.first_position_rate == singles.count(FIRST) / len(singles)


def test_swapping_the_systems_mirrors_every_figure():
    rng = np.random.default_rng(0)
    a, b = ([" ".join(["w"] * n) + f" {name}{i}" for i, n in enumerate(rng.integers(1, 30, 60))] for name in "ab")
    table: dict[Question, Verdict] = {}

    def noisy(question: Question) -> Verdict:  # a function of the question, as at temperature 0
        return table.setdefault(question, [FIRST, FIRST, SECOND, TIE, UNPARSED][rng.integers(5)])

    one, two = run(noisy, a, b), run(noisy, b, a, ("b", "a"))
    assert one.win_rate == pytest.approx(1 - two.win_rate, abs=1e-12)
    np.testing.assert_array_equal(one.scores, 1 - two.scores)
    assert one.lc_win_rate == pytest.approx(1 - two.lc_win_rate, abs=1e-6)
    assert (one.decisive_wins, one.decisive_losses, one.ties) == (two.decisive_losses, two.decisive_wins, two.ties)
    for same in ("n", "consistency", "first_position_rate", "inconsistent", "unparsed", "failed"):
        assert getattr(one, same) == getattr(two, same)
    assert (one.mean_length_a, one.mean_length_b) == (two.mean_length_b, two.mean_length_a)
    assert 0 < one.unparsed < 60 and one.n + one.unparsed == 60


@pytest.mark.parametrize(
    ("pair", "unparsed", "failed"),
    [
        ((UNPARSED, FIRST), 1, 0),
        ((SECOND, UNPARSED), 1, 0),
        ((FAILED, FIRST), 0, 1),
        ((TIE, FAILED), 0, 1),
        ((UNPARSED, FAILED), 0, 1),
    ],
)
def test_a_prompt_without_two_clear_verdicts_has_no_score(pair, unparsed, failed):
    result = of_verdicts(WIN, pair)
    assert (result.n, result.unparsed, result.failed, result.win_rate) == (1, unparsed, failed, 1.0)
    assert np.isnan(result.scores[1]) and result.consistency == 1.0
    assert result.mean_length_a == 2.0


def test_nothing_to_compute_from_is_none_and_not_nan():
    for result in (of_verdicts((FAILED, FAILED)), of_verdicts()):
        figures = json.loads(json.dumps(result.to_json(), allow_nan=False))
        for name in ("win_rate", "win_rate_ci", "lc_win_rate", "consistency", "first_position_rate", "mean_length_a"):
            assert figures[name] is None


def test_identical_answers_say_nothing_about_consistency():
    answers = ["same", "other"]
    verdicts = [TIE, TIE, FIRST, FIRST]
    result = tally("a", "b", answers, ["same<|endoftext|>", "another"], verdicts)
    assert (result.identical, result.n, result.consistency) == (1, 2, 0.0)


def test_figures_agree_with_the_functions_they_are_made_of():
    pairs = [WIN] * 12 + [LOSS] * 5 + [DRAW] * 3
    a, b = [["w " * (3 + i % 5) for i in range(20)], ["w " * (2 + i % 7) for i in range(20)]]
    result = tally("a", "b", a, b, [verdict for pair in pairs for verdict in pair])
    scores = [1.0] * 12 + [0.0] * 5 + [0.5] * 3
    assert result.win_rate == np.mean(scores) and result.win_rate_ci == bootstrap_interval(scores)
    assert result.wilson == wilson_interval(12, 17)
    lengths = [[len(text.split()) for text in texts] for texts in (a, b)]
    controlled = length_controlled_win_rate(scores, *lengths)
    assert (result.lc_win_rate, result.lc_win_rate_ci) == (controlled.win_rate, controlled.ci)
    assert (result.mean_length_a, result.mean_length_b) == tuple(map(np.mean, lengths))


def test_length_cannot_be_taken_out_where_it_never_varies():
    result = of_verdicts(WIN, LOSS, WIN)
    assert result.lc_win_rate is not None
    longer = tally("a", "b", ["x x x"] * 3, ["y"] * 3, [*WIN, *LOSS, *WIN])
    assert longer.lc_win_rate is None and longer.lc_win_rate_ci is None


def test_json_has_the_agreed_keys():
    figures = json.loads(json.dumps(of_verdicts(WIN, LOSS).to_json()))
    agreed = "a b n win_rate win_rate_ci decisive_wins ties consistency first_position_rate lc_win_rate unparsed failed"
    assert set(agreed.split()) <= set(figures) and "scores" not in figures
    assert figures["a"] == "a" and len(figures["win_rate_ci"]) == 2 and figures["length_unit"] == "words"
