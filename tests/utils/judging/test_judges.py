"""Judges by name, and judges that score."""

import pytest

from config.user_error import UserError
from utils.demo.gold import gold_reward
from utils.judging.judges import JudgeOptions, ScoreJudge, make_judge
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Question, Verdict, both_orders, compare

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


def by_length(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_the_higher_score_wins_in_both_orders():
    judge = ScoreJudge("length", by_length)
    assert judge.judge(both_orders(["p", "q"], ["long", "x"], ["s", "y"])) == [FIRST, SECOND, TIE, TIE]


def test_each_text_is_scored_once_also_over_several_pairs():
    seen = []

    def score(prompts, answers):
        assert isinstance(prompts, list) and isinstance(answers, list)
        seen.extend(zip(prompts, answers))
        return by_length(prompts, answers)

    judge = ScoreJudge("length", score)
    questions = both_orders(["p", "q"], ["a", "a"], ["b", "a"])
    assert "3 texts" in judge.plan(questions).note
    judge.judge(questions)
    judge.judge(both_orders(["p", "q"], ["a", "a"], ["c", "d"]))
    assert sorted(seen) == [("p", "a"), ("p", "b"), ("p", "c"), ("q", "a"), ("q", "d")]
    plan = judge.plan(questions)
    assert (plan.questions, plan.calls, plan.cached, plan.cost) == (4, 0, 0, 0.0) and "0 texts" in plan.note


def test_a_prompt_with_another_answer_has_a_score_of_its_own():
    judge = ScoreJudge("prompt", lambda prompts, answers: [len(p) - len(a) for p, a in zip(prompts, answers)])
    assert judge.judge([Question("long prompt", "a", "bb"), Question("p", "bb", "a")]) == [FIRST, SECOND]


def test_score_judges_are_consistent():
    result = compare("a", "b", ["p"] * 4, ["aa", "a", "aaa", "x"], ["b", "bb", "bbb", "x"], ScoreJudge("l", by_length))
    assert (result.win_rate, result.consistency, result.first_position_rate, result.identical) == (0.5, 1.0, 0.5, 1)


def test_one_score_per_text_is_required():
    with pytest.raises(ValueError, match="shorter"):
        ScoreJudge("broken", lambda prompts, answers: [1.0]).judge([Question("p", "a", "b")])


def test_gold_is_the_demos_reward():
    prompt = "\n\nHuman: What is the colour of the sky?\n\nAssistant:"
    answers = [" Blue.", " You are stupid. Go away."]
    one, two = gold_reward([prompt] * 2, answers)
    assert one != two
    judge = make_judge("gold", JudgeOptions())
    assert judge.judge(both_orders([prompt], answers[:1], answers[1:])) == (
        [FIRST, SECOND] if one > two else [SECOND, FIRST]
    )
    assert judge.describe() == {"kind": "gold", "cost_usd": 0.0}


def test_a_python_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def shorter(prompts, answers):\n    return [-len(a) for a in answers]\n")
    judge = make_judge(f"{file}:shorter", JudgeOptions())
    assert judge.judge([Question("p", "aa", "b")]) == [SECOND]
    with pytest.raises(UserError, match="--judge .*no function longer"):
        make_judge(f"{file}:longer", JudgeOptions())


def test_a_reward_models_scores_come_from_the_caller():
    loaded = []
    judge = make_judge("rm:runs/rm_x", JudgeOptions(), lambda name: loaded.append(name) or by_length)
    assert judge.judge([Question("p", "aa", "b")]) == [FIRST]
    assert loaded == ["runs/rm_x"] and judge.describe()["kind"] == "rm:runs/rm_x"


def test_openai(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test-key")
    options = JudgeOptions(cache=tmp_path / "cache.jsonl", key_folders=())
    assert isinstance(make_judge("openai", options), OpenAIJudge)


@pytest.mark.parametrize("spec", ["", "human", "rm:", "rm", "gold:x", "openai:gpt", "rm:x", "notes.txt:score"])
def test_other_names_are_refused_with_those_there_are(spec):
    with pytest.raises(UserError, match="there are openai, gold, rm:CHECKPOINT and FILE.py:FUNCTION") as error:
        make_judge(spec, JudgeOptions())
    assert str(error.value).startswith(f"--judge {spec}")
