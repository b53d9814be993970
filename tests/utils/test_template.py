"""How dialogues are written and cut."""

import pytest

from utils.template import PromptTemplate

T = PromptTemplate()
CUE = "\n\nAssistant:"


def test_format_writes_turns_and_ends_with_the_cue():
    assert T.format(["Hi"]) == "\n\nHuman: Hi\n\nAssistant:"
    assert T.format([" Hi ", "Hello.", "Who?\n"]) == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant:"


@pytest.mark.parametrize("turns", [[], ["a", "b"]])
def test_format_refuses_a_prompt_that_ends_with_the_model(turns):
    with pytest.raises(ValueError, match="odd number"):
        T.format(turns)


@pytest.mark.parametrize("reply", ["Yes.", "  Yes. \n", "Yes.\n\nAnd: no."])
def test_split_dialogue_cuts_after_the_last_cue(reply):
    prompt, response = T.split_dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: " + reply)
    assert prompt == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert response == " " + reply.strip()


def test_split_then_join_is_the_dialogue():
    text = T.format(["q1", "a1", "q2"]) + " a2"
    assert "".join(T.split_dialogue(text)) == text


def test_split_dialogue_with_nothing_said():
    assert T.split_dialogue("\n\nHuman: a\n\nAssistant: ") == ("\n\nHuman: a\n\nAssistant:", "")


@pytest.mark.parametrize(
    "text", ["Human: a\n\nAssistant: b", "\nHuman: a\n\nAssistant: b", "\r\n\r\nHuman: a\r\n\r\nAssistant: b"]
)
def test_split_dialogue_puts_the_leading_blank_line_right(text):
    assert T.split_dialogue(text) == ("\n\nHuman: a\n\nAssistant:", " b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "no turn of the model"),
        ("", "no turn of the model"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "turn of the person"),
    ],
)
def test_split_dialogue_refuses_what_has_no_last_reply(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        T.split_dialogue(text)


@pytest.mark.parametrize(
    "text",
    [
        "What is it?",
        "  What is it?\n",
        "Human: What is it?",
        "\n\nHuman: What is it?",
        "\n\nHuman: What is it?\n\nAssistant:",
        "\n\nHuman: What is it?\n\nAssistant: ",
        "Human: What is it?\nAssistant:",
        "\n\nHuman: What is it? \n\nAssistant:\n",
        "\r\n\r\nHuman: What is it?\r\n\r\nAssistant:",
    ],
)
def test_prompt_brings_every_spelling_to_one_text(text):
    assert T.prompt(text) == "\n\nHuman: What is it?\n\nAssistant:"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_make_no_other_text(end):
    system = "You are kind.\nBe brief."
    text = f"{system}\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d"
    written = text.replace("\n", end)
    assert T.prompt(written) == T.prompt(text) == text + CUE
    assert T.split_dialogue(f"{text}{CUE} e\nf".replace("\n", end)) == (text + CUE, " e\nf")
    assert T.response(f"{end}e{end}{end}f{end}") == " e\n\nf"
    assert T.format([f"a{end}b"]) == "\n\nHuman: a\nb\n\nAssistant:"


def test_a_system_text_stands_before_the_first_turn_as_it_is():
    turns = [("system", " Be kind.\n"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    written = "Be kind.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert T.prompt_of_turns(turns) == written == T.prompt(written)
    assert T.opening(written) == "\n\nHuman: a"


def test_prompt_is_idempotent_and_keeps_earlier_turns():
    prompt = T.format(["a", "b", "c"])
    assert T.prompt(prompt) == prompt
    assert T.prompt(prompt.removesuffix(CUE)) == prompt


def test_prompt_takes_a_word_in_the_text_for_plain_text():
    assert T.prompt("What does 'Assistant:' mean?") == "\n\nHuman: What does 'Assistant:' mean?\n\nAssistant:"


def test_prompt_that_ends_inside_a_reply_is_refused():
    with pytest.raises(ValueError, match="inside a reply"):
        T.prompt("\n\nHuman: a\n\nAssistant: it is")
    with pytest.raises(ValueError, match="empty"):
        T.prompt(" \n")


def test_response_has_one_space_before_and_none_after():
    assert T.response("a") == T.response("  a\n\n") == T.response("\na ") == " a"
    assert T.response(" \n") == ""


def test_opening_is_shared_by_beginnings_of_one_conversation():
    assert T.opening(T.format(["a"])) == T.opening(T.format(["a", "b", "c"])) == "\n\nHuman: a"
    assert T.opening(T.format(["a"])) != T.opening(T.format(["b"]))


@pytest.mark.parametrize("prompt", [
    "Human: a b\n\nAssistant:",
    "\n\nHuman:  a  b \n\nAssistant: c\n\nHuman: d",
    "\r\n\r\nHuman: a b\r\n\r\nAssistant:",
    "\n\nHuman: a\nb\n\nAssistant:",
    "\n\nHuman: a\r\n b\t\n\nAssistant: c\n\nHuman: d\n\nAssistant:",
    "\n\nHuman: a\u00a0b\n\nAssistant:",
    "\n\nHuman:\na b\n\nAssistant:",
    "\n\nAssistant: Hello.\n\nHuman: a b\n\nAssistant:",
])  # fmt: skip
def test_white_space_and_a_greeting_make_no_other_conversation(prompt):
    assert T.opening(T.prompt(prompt)) == T.opening(T.format(["a b"])) == "\n\nHuman: a b"


def test_greetings_alone_are_not_one_conversation():
    prompts = [f"\n\nAssistant: Hello.\n\nHuman: {question}\n\nAssistant:" for question in "ab"]
    assert T.opening(prompts[0]) != T.opening(prompts[1])


def test_round_trip_through_plain_data():
    other = PromptTemplate(human="<u>", assistant="<a>", response_prefix="")
    assert PromptTemplate.from_dict(other.to_dict()) == other
    assert other.prompt("<u>hi<a>") == "<u>hi<a>"
    assert other.prompt("hi") == "<u>hi<a>"
    for data in ({"human": "x"}, T.to_dict() | {"more": "x"}, T.to_dict() | {"human": 1}, "human", [], 3, None):
        with pytest.raises(ValueError, match="a prompt template has the strings"):
            PromptTemplate.from_dict(data)
    with pytest.raises(ValueError, match="a text in both"):
        PromptTemplate(assistant=" ")
