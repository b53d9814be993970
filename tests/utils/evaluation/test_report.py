"""What an evaluation writes: the promised keys, tables that say what was counted, examples that can be read."""

import json
import re

import numpy as np
import pytest
from comparisons import LOSS, LOST, ONE_ORDER, TIE, WIN, comparison

from utils.evaluation.report import (
    Evaluation,
    chosen_examples,
    main_pairs,
    pair_table,
    proxy_agreement,
    system_table,
    write_evaluation,
)

PAIR_KEYS = {
    "a", "b", "n", "win_rate", "win_rate_ci", "decisive_wins", "ties", "consistency", "first_position_rate",
    "lc_win_rate", "unparsed", "failed",
}  # fmt: skip


def figures(**changes):
    keys = ("gold", "proxy", "proxy_gold_correlation", "kl", "eos_rate", "distinct_2", "repetition", "mean_length")
    return {**dict.fromkeys(keys), "n": 4, "kind": "checkpoint", **changes}


@pytest.fixture
def evaluation():
    outcomes = [WIN, LOSS, ONE_ORDER, TIE, LOST]
    texts = {
        "vanilla": ["v"] * 5,
        "sft": ["good | *bold*\n\n- <b>list</b>", "loses `x`", "half", "tied", "never judged"],
        "ppo": ["p"] * 5,
    }
    prompts = [f"\n\nHuman: question {i}?\n\nAssistant:" for i in range(4)]
    prompts.append("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:")
    return Evaluation(
        name="x",
        settings=dict(temperature=0.7, seed=3, max_new_tokens=64, prompts="p.csv", prompt_count=5),
        judge={"kind": "openai", "model": "judge-1", "base_url": "http://here/v1", "cost_usd": 1.234},
        comparisons=[
            comparison("sft", "vanilla", outcomes, texts["sft"], texts["vanilla"]),
            comparison("ppo", "vanilla", [TIE] * 5),
            comparison("ppo", "sft", [WIN] * 5, texts["ppo"], texts["sft"]),
        ],
        systems={
            "vanilla": figures(cut_prompts=2),
            "sft": figures(kl=0.0, eos_rate=1.0),
            "ppo": figures(kl=3.456, proxy=1.0),
            "best_of_4": figures(analytic_kl=0.6363),
        },
        prompts=prompts,
        texts=texts,
    )


def test_the_json_has_the_promised_keys(evaluation, tmp_path):
    write_evaluation(tmp_path, evaluation)
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(data) == {"pairs", "systems", "judge", "settings"}
    assert all(set(pair) >= PAIR_KEYS for pair in data["pairs"])
    first = data["pairs"][0]
    assert (first["a"], first["b"], first["n"], first["failed"], first["unparsed"]) == ("sft", "vanilla", 4, 1, 0)
    assert first["win_rate"] == pytest.approx((1 + 0 + 0.75 + 0.5) / 4) and len(first["win_rate_ci"]) == 2
    assert set(data["systems"]) == {"vanilla", "sft", "ppo", "best_of_4"} and data["judge"]["model"] == "judge-1"


def test_numbers_that_do_not_exist_are_null_and_not_nan(evaluation, tmp_path):
    evaluation.comparisons[0] = comparison("sft", "vanilla", [LOST] * 5)
    write_evaluation(tmp_path, evaluation)
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text and json.loads(text)["pairs"][0]["win_rate"] is None
    assert "| sft vs vanilla | - | - | 0 / 0 / 0 |" in (tmp_path / "evaluation.md").read_text()


def test_the_table_of_pairs(evaluation):
    rows = pair_table(evaluation).splitlines()
    assert len(rows) == 5 and rows[2].startswith("| sft vs vanilla | 0.562 (")
    assert "| 2 / 1 / 1 |" in rows[2] and rows[2].endswith(" 4 |")
    assert {row.count(" | ") for row in rows} == {7}


def test_the_table_of_systems(evaluation):
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in system_table(evaluation).splitlines()}
    assert rows["ppo"][4] == "3.46" and rows["best_of_4"][4] == "at most 0.64" and rows["vanilla"][4] == "-"
    assert len({len(row) for row in rows.values()}) == 1


def test_the_text_says_how_it_was_done_and_what_is_missing(evaluation, tmp_path):
    write_evaluation(tmp_path, evaluation)
    text = (tmp_path / "evaluation.md").read_text()
    assert "sampled at temperature 0.7 with seed 3" in text and "Judge: judge-1 at http://here/v1." in text
    assert (
        "It cost about $1.23." in text and "Prompts that lost their beginning to fit the context: 2 for vanilla" in text
    )
    assert "(sft vs vanilla: 0 unclear, 1 failed)" in text
    evaluation.settings["temperature"] = 0
    evaluation.comparisons[0] = comparison("sft", "vanilla", [WIN] * 5)
    write_evaluation(tmp_path, evaluation)
    text = (tmp_path / "evaluation.md").read_text()
    assert "answers greedy" in text and "Not judged" not in text


def test_examples_stand_side_by_side_and_cannot_break_the_table(evaluation, tmp_path):
    write_evaluation(tmp_path, evaluation)
    text = (tmp_path / "evaluation.md").read_text()
    section = text.split("## sft vs vanilla: 2 clear wins and 1 clear losses of sft")[1].split("##")[0]
    rows = section.strip().splitlines()[2:]
    assert rows[0] == ("| sft | question 0? | good &#124; &#42;bold&#42;<br><br>- &lt;b&gt;list&lt;/b&gt; | v |")
    assert rows[1].startswith("| sft (one order a tie) | question 2? | half |")
    assert rows[2].startswith("| vanilla | question 1? | loses &#96;x&#96; |") and len(rows) == 3
    assert "never judged" not in section and "tied" not in section
    last = text.split("## ppo vs sft")[1]
    assert "| Human: a<br><br>Assistant: b<br><br>Human: c |" in last
    assert "## ppo vs vanilla" not in text  # nothing but ties


def test_the_clearest_wins_and_losses_come_first():
    outcomes = [WIN] * 8 + [LOSS] * 7 + [ONE_ORDER, TIE, LOST]
    pair = comparison("a", "b", outcomes)
    assert chosen_examples(pair, {}) == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    reward = {"a": np.arange(18.0), "b": np.full(18, 9.0)}
    assert chosen_examples(pair, reward) == [7, 6, 5, 4, 3, 8, 9, 10, 11, 12]
    assert chosen_examples(pair, {"a": -reward["a"], "b": reward["b"]}) == [0, 1, 2, 3, 4, 14, 13, 12, 11, 10]
    assert chosen_examples(comparison("a", "b", [TIE, ONE_ORDER, WIN]), {}) == [2, 1]


def test_long_texts_are_cut(evaluation, tmp_path):
    evaluation.texts["sft"][0] = "word " * 1000
    write_evaluation(tmp_path, evaluation)
    assert max(map(len, (tmp_path / "evaluation.md").read_text().splitlines())) < 2000


def test_the_pairs_with_examples():
    def pair(a, b):
        return comparison(a, b, [WIN])

    both = [pair("sft", "vanilla"), pair("best_of_4", "sft"), pair("ppo", "vanilla"), pair("ppo", "sft")]
    assert [(c.a, c.b) for c in main_pairs(both)] == [("sft", "vanilla"), ("ppo", "vanilla"), ("ppo", "sft")]
    assert [c.a for c in main_pairs([pair(name, "x") for name in "abcd"])] == ["a", "b", "c"]


def test_agreement_of_the_reward_model_with_the_judge():
    pair = comparison("a", "b", [WIN, WIN, LOSS, ONE_ORDER, TIE, LOST])
    proxy = {"a": np.array([1.0, 0, 0, 1, 9, 9]), "b": np.array([0.0, 1, 1, 1, 0, 0])}
    assert proxy_agreement(pair, proxy) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert proxy_agreement(pair, {"a": proxy["a"]}) is None
    assert proxy_agreement(comparison("a", "b", [TIE]), {"a": [1.0], "b": [0.0]}) is None


def test_tables_are_well_formed(evaluation, tmp_path):
    write_evaluation(tmp_path, evaluation)
    for table in re.findall(r"(?:^\|.*\n)+", (tmp_path / "evaluation.md").read_text(), re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
