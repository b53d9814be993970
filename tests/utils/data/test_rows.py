"""Row forms, and every kind of bad input: one line that says where and what would be right."""

import gzip
import json
import random

import pytest

from config.user_error import UserError
from utils.data.files import read_jsonl
from utils.data.rows import BadRow, parse_row
from utils.template import PromptTemplate

T = PromptTemplate()
Q = T.format(["q"])


def parse(data, stage):
    return parse_row(data, stage, "f.jsonl:7", T)


def test_hh_form_in_every_stage():
    data = {"chosen": Q + " good", "rejected": Q + " bad", "gold_chosen": 1.0}
    assert (parse(data, "rm").prompts, parse(data, "rm").completions) == ((Q, Q), (" good", " bad"))
    assert (parse(data, "sft").prompts, parse(data, "sft").completions) == ((Q,), (" good",))
    assert (parse(data, "ppo").prompts, parse(data, "ppo").completions) == ((Q,), ())


def test_each_completion_keeps_its_own_prompt():
    other = T.format(["q", "a", "q2"])
    row = parse({"chosen": Q + " good", "rejected": other + " bad"}, "rm")
    assert (row.prompts, row.completions) == ((Q, other), (" good", " bad"))


def test_hh_form_with_equal_replies_to_different_prompts_is_a_ranking():
    row = parse({"chosen": Q + " same", "rejected": T.format(["p"]) + " same"}, "rm")
    assert row.completions == (" same", " same")


@pytest.mark.parametrize("data", [
    {"chosen": Q, "rejected": Q + " bad"},
    {"prompt": "q", "chosen": " ", "rejected": "bad", "response": ""},
    {"prompt": "q", "completions": ["", "bad"]},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
])  # fmt: skip
def test_an_empty_reply_is_ranked_but_not_demonstrated_in_every_form(data):
    assert parse(data, "rm").completions == ("", " bad")
    assert parse(data, "sft") is None
    assert parse(data, "ppo").prompts == (Q,)


def test_prompt_forms():
    assert parse({"prompt": "q"}, "ppo").prompts == (Q,)
    assert parse({"prompt": "q", "response": "r \n"}, "sft").completions == (" r",)
    assert parse({"prompt": Q, "chosen": "good", "rejected": " bad"}, "rm").completions == (" good", " bad")
    assert parse({"prompt": Q, "response": "r", "chosen": "good", "rejected": "bad"}, "sft").completions == (" r",)
    assert parse({"prompt": Q, "chosen": "good", "rejected": "bad"}, "sft").completions == (" good",)
    ranked = {"prompt": "q", "completions": ["a", "b", "c"]}
    assert parse(ranked, "rm").prompts == (Q,) * 3
    assert parse(ranked, "rm").completions == (" a", " b", " c")
    assert parse(ranked, "sft").completions == (" a",)


@pytest.mark.parametrize("more", [{"response": "r"}, {"completions": ["a", "b"]}])
def test_a_dialogue_beside_other_replies_is_what_every_stage_reads(more):
    """Else the stages would see other prompts, and put one row on two sides of a split."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("p", "x", "q", "good"))]
    data = {"prompt": "q", "chosen": turns, "rejected": [*turns[:3], {"role": "assistant", "content": "bad"}]} | more
    found = {stage: parse(data, stage) for stage in ("sft", "rm", "ppo")}
    assert {row.prompts[0] for row in found.values()} == {T.format(["p", "x", "q"])}
    assert (found["sft"].completions, found["rm"].completions) == ((" good",), (" good", " bad"))


def test_text_is_taken_as_it_is():
    row = parse({"text": "Once\n upon "}, "text")
    assert (row.prompts, row.completions) == (("",), ("Once\n upon ",))
    assert parse({"text": "x"}, "sft").completions == ("x",)


def test_special_tokens_and_control_characters_are_text():
    assert parse({"prompt": "a\x00b <|endoftext|>", "response": "<|endoftext|>\x00x"}, "sft").completions == (
        " <|endoftext|>\x00x",
    )


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [
        ([1], "sft", "is a list of 1; a row is an object"),
        ("x", "rm", "is a string"),
        (None, "rm", "is null"),
        ({}, "sft", 'has no "chosen" (keys: none); stage sft needs "prompt" and "response"'),
        (
            {"prompt": "q", "response": "r"},
            "rm",
            'has no "chosen" (keys: "prompt", "response"); stage rm needs "chosen" and "rejected"',
        ),
        ({"prompt": "q"}, "sft", 'has no "response"'),
        ({"chosen": Q + " a"}, "rm", 'has no "rejected"'),
        ({"text": "x"}, "ppo", 'stage ppo needs "prompt"'),
        ({"prompt": "q", "response": "r"}, "text", 'stage text needs "text"'),
        ({"prompt": 3, "response": "r"}, "sft", '"prompt" is a number; it has to be a string'),
        ({"prompt": "q", "response": None}, "sft", '"response" is null'),
        ({"prompt": ["q"], "response": "r"}, "sft", '"prompt" is a list of 1'),
        ({"prompt": " \n", "response": "r"}, "sft", '"prompt" is empty'),
        ({"chosen": "", "rejected": Q + " a"}, "rm", '"chosen" is empty'),
        ({"text": ""}, "text", '"text" is empty'),
        ({"chosen": Q + " a", "rejected": Q + " a\n"}, "rm", "two of the ranked replies are identical"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rm", "two of the ranked replies are identical"),
        ({"prompt": "q", "completions": ["a", "b", "a"]}, "rm", "two of the ranked replies are identical"),
        (
            {"prompt": "q", "completions": ["a"]},
            "rm",
            '"completions" is a list of 1; it has to be a list of two or more',
        ),
        ({"prompt": "q", "completions": "ab"}, "rm", '"completions" is a string'),
        ({"prompt": "q", "completions": ["a", 2]}, "rm", '"completions[1]" is a number'),
        (
            {"prompt": "q", "response": "a\ud800"},
            "sft",
            '"response" has half of a surrogate pair (\\ud800) at character 1',
        ),
        ({"chosen": "no cue", "rejected": Q + " a"}, "rm", '"chosen" has no turn of the model ("\\n\\nAssistant:")'),
        ({"chosen": Q + " a\n\nHuman: b", "rejected": Q + " a"}, "rm", '"chosen" ends with a turn of the person'),
        (
            {"prompt": Q, "chosen": Q + " a", "rejected": Q + " b"},
            "rm",
            '"chosen" is a whole dialogue although there is a "prompt" too',
        ),
        ({"prompt": Q + " said", "response": "r"}, "sft", '"prompt" ends inside a reply of the model'),
    ],
)
def test_bad_rows_say_where_and_what_would_be_right(data, stage, message):
    with pytest.raises(BadRow) as caught:
        parse(data, stage)
    text = str(caught.value)
    assert text.startswith("f.jsonl:7: ") and message in text and "\n" not in text


@pytest.mark.slow
def test_mutated_rows_give_a_row_or_a_one_line_complaint(tmp_path):
    """Random damage to a good file: never another exception, and what is read is well-formed."""
    rng = random.Random(0)
    good = [
        {
            "chosen": T.format(["first question", "reply", "second"]) + " yes",
            "rejected": T.format(["first question"]) + " nö 😀",
        },
        {"prompt": "a question", "completions": ["one", "two", "three"], "response": "four"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "one"}]},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"instruction": "a question", "input": "more", "output": "one"},
    ]
    data = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in good).encode()
    path = tmp_path / "f.jsonl"
    for _ in range(400):
        damaged = bytearray(gzip.compress(data) if rng.random() < 0.2 else data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            action = rng.randrange(4)
            if action == 0:
                damaged[at] = rng.randrange(256)
            elif action == 1:
                del damaged[at : at + rng.randrange(1, 60)]
            elif action == 2:
                damaged[at:at] = rng.choice(
                    [b'"', b"\\ud800", b"\x00", b"null", b"{}", b"[]", b"\n", b"\r\n", b"\n\nAssistant:", b"\\n"]
                )
            else:
                del damaged[at:]
            damaged = damaged or bytearray(b" ")
        path.write_bytes(damaged)
        for stage in ("sft", "rm", "ppo", "text"):
            try:
                rows = [
                    parse_row(value, stage, "f:1", T) for _, value in read_jsonl(path) if not isinstance(value, BadRow)
                ]
            except UserError as error:
                assert "\n" not in str(error)
                continue
            for row in filter(None, rows):
                assert len(row.prompts) == max(1, len(row.completions))
                assert stage == "text" or not row.prompts[0] or row.prompts[0].endswith("\n\nAssistant:")
                "".join(row.prompts + row.completions).encode()
