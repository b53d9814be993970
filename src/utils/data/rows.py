"""Text rows: what the files and hub datasets hold, brought to one form and checked.

Accepted forms of a row (an object of a file of any kind, or a row of a hub dataset); other keys are ignored:

    {"chosen", "rejected"}                     HH form: two whole dialogues, cut after their last "\\n\\nAssistant:"
    {"prompt"}                                 a prompt alone
    {"prompt", "response"}                     a demonstration
    {"prompt", "chosen", "rejected"}           a ranked pair of replies (rm-static)
    {"prompt", "completions"}                  K >= 2 ranked replies, best first; K may differ from row to row
    {"messages"}                               a whole dialogue as a list of {"role", "content"}
    {"text"}                                   plain text

Names that mean the same: "completion" for "response"; "conversations" of {"from", "value"} for "messages";
{"instruction", "input", "output"} (Alpaca) and {"question", "answer"} alone for "prompt" and "response". A prompt, a
reply or a dialogue may be a list of messages instead of a string. docs/data.md shows all of them.

What is asked of a whole dialogue is the last turn of the model, in every form: the turns before it are the prompt.
Texts are normalised by `PromptTemplate` (line ends, leading blank line, one space before a reply, nothing after it); a
bare question as `prompt` becomes the one turn of a person. Anything that a tokenizer would take for a special token
stays plain text.
"""

import json
from dataclasses import dataclass
from typing import Any

from config.user_error import UserError
from utils.template import PromptTemplate, unix_lines

STAGES = ("sft", "rm", "ppo", "text")
"""What a row is read for: a demonstration, a ranking, a prompt, or plain text."""

FORMS = {
    "sft": 'stage sft needs "prompt" and "response", "messages", a "chosen" dialogue, or "text"',
    "rm": 'stage rm needs "chosen" and "rejected", or "prompt" and "completions" (two or more, best first)',
    "ppo": 'stage ppo needs "prompt", "messages", or a "chosen" dialogue',
    "text": 'stage text needs "text"',
}

_DIALOGUES = ("messages", "conversations")
_ASKED = ("prompt", *_DIALOGUES, "instruction")
# Names that are not read because it is not known what they mean, but nearly always mean this one.
_LIKE = {
    "prompt": ("question", "query", "input", "user", "human", "instruction", "problem"),
    "response": ("answer", "output", "reply", "assistant", "target", "solution", "generation"),
    "chosen": ("preferred", "accepted", "better", "preferred_output", "chosen_response"),
    "rejected": ("non_preferred", "dispreferred", "worse", "non_preferred_output", "rejected_response"),
    "text": ("content", "body", "document", "review"),
}
_REPLIES = {None: ("chosen",), "question": ("answer",)} | dict.fromkeys(
    _ASKED, ("response", "completions", "chosen", "completion")
)
_REPLIES["instruction"] += ("output",)
_LABELS = ("label", "kto_tag")
_SYSTEMS = ("system", "system_prompt")
_BESIDE_INSTRUCTION = ("context", "history", *_SYSTEMS)
_BESIDE_MESSAGES = (*_SYSTEMS, "tools", "functions", "images")
_TWINS = ("01", "12", "ab", "AB", "jk")  # last letters of the names of two replies to be compared
_NEEDED = {"sft": ("prompt", "response"), "rm": ("prompt", "chosen", "rejected"), "ppo": ("prompt",), "text": ("text",)}
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}


class BadRow(UserError):
    """One row is malformed; the message starts with its file and line. `skip_bad_rows` counts these instead of
    stopping."""


@dataclass(frozen=True)
class Row:
    """The text of one row, for one stage.

    A demonstration or plain text has one completion, a ranking K >= 2 (best first), a prompt none. There is one prompt
    per completion, since the completions of a row need not share it: about two in a thousand rows of HH-RLHF have
    dialogues that differ already before the last reply, and each reply keeps its own prompt. A prompt-only row has one
    prompt.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    is_new: bool = False
    """Of a form that the code before version 3 (utils/dataset.py) refused or read otherwise."""


def parse_row(data: Any, stage: str, where: str, template: PromptTemplate) -> Row | None:
    """Brings one decoded row to the form that a stage of `STAGES` needs; `where` is put in front of every message.

    Returns:
        The row, or None for a demonstration that says nothing. An empty reply is kept in a ranking, where it scores an
        immediate end; learning to answer nothing from it would be harmful.

    Raises:
        BadRow: the row is malformed, or is of a form that the stage cannot use.
    """
    if not isinstance(data, dict):
        raise BadRow(f'{where}: is {_kind(data)}; a row is an object such as {{"prompt": ..., "response": ...}}')
    reader = _RowReader(data, stage, where, template)
    if is_plain_text(data, stage):
        reader.refuse_text_in_a_dialogue()
        return Row(("",), (unix_lines(reader.text("text")),))
    pairs = reader.pairs()
    prompts, responses = zip(*pairs, strict=True)
    if stage == "ppo":
        return Row(prompts, (), reader.is_new)
    if stage == "sft" and not responses[0]:
        return None
    if len(set(pairs)) < len(pairs):
        raise BadRow(
            f"{where}: two of the ranked replies are identical, which ranks nothing; remove one of them or the row"
        )
    return Row(prompts, responses, reader.is_new)


def is_plain_text(data: dict[str, Any], stage: str) -> bool:
    """Whether a stage reads "text" of a row: stage text always, SFT where there is nothing else to read."""
    if stage != "sft" or "text" not in data or "prompt" in data:
        return stage == "text"
    return all(data.get(key) is None for key in (*_ASKED, "chosen"))


class _RowReader:
    """One row while it is read; null is as good as nothing there."""

    def __init__(self, data: dict[str, Any], stage: str, where: str, template: PromptTemplate):
        self.given, self.stage, self.where, self.template = data, stage, where, template
        self.data = {key: value for key, value in data.items() if value is not None}
        self.is_new = False

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, response) of each completion that the stage needs; for PPO one pair, whose response is not used.

        All stages take the same prompt from a row, so that its split and what a reward model has seen are the same.
        """
        asked, replies, whole = self._form()
        self._refuse_what_is_not_read(asked, replies)
        self.is_new = asked in ("instruction", "question") or replies[:1] == ["completion"]
        if self.stage == "ppo":
            if whole is None and asked and not _is_dialogue(self.data.get("chosen")):
                return [(self._prompt(asked), "")]
            names = [whole or "chosen"]
        elif self.stage == "rm":
            names = ["completions"] if "completions" in replies else ["chosen", "rejected"]
        else:
            names = (replies or ["response" if asked else "chosen"])[:1]
        if names == ["completions"]:
            ranked = list(self._completions().items())[: 1 if self.stage == "sft" else None]
            return [self._pair(name, value, asked) for name, value in ranked]
        return [self._pair(name, self._value(name), asked) for name in names]

    def _form(self) -> tuple[str | None, list[str], str | None]:
        """The key of what is asked, or None where it is the beginning of whole dialogues; the keys of what is replied
        to it, first what SFT takes; the key of a whole dialogue that is all there is."""
        keys, chosen = self.data.keys(), self.data.get("chosen")
        asked = next((key for key in _ASKED if key in keys), "prompt" if "prompt" in self.given else None)
        if keys == {"question", "answer"}:
            asked = "question"
        is_whole = isinstance(chosen, str) and self.template.assistant in unix_lines(chosen)
        if asked != "prompt" and (is_whole or _is_dialogue(chosen)):
            asked = None
        replies = ["chosen"] if _is_dialogue(chosen) else [key for key in _REPLIES[asked] if key in keys]
        if replies or "rejected" in keys:
            return asked, replies, None
        whole = next((key for key in _DIALOGUES if key in keys), None)
        return (None if asked == whole else asked), [whole] if whole else [], whole

    def refuse_text_in_a_dialogue(self) -> None:
        """Tells where "text" is not all that is to be learned, although SFT would read nothing else of the row."""
        beside = next((key for key in ("role", *_REPLIES["prompt"], "rejected") if key in self.data), None)
        if beside and self.stage == "sft":
            remedy = 'write each dialogue as "messages"' if beside == "role" else 'rename "text" to "prompt"'
            raise self._bad(f'has "{beside}" beside "text"; {remedy}, or remove "{beside}" for plain text')

    def text(self, key: str) -> str:
        """The text of a key, which has to have one."""
        return self._checked(self._value(key), key, may_be_empty=False)

    def _value(self, key: str) -> Any:
        if key in self.given:
            return self.given[key]
        others = [value for key, value in self.given.items() if key not in _ASKED]
        if others and all(isinstance(value, list) and _is_turns(value) and not _is_said(value) for value in others):
            raise self._bad(f"is an object around a list of rows ({_keys(self.given)}); write that list alone")
        raise self._bad(f'has no "{key}" (keys: {_keys(self.given)}); {FORMS[self.stage]}{self._hint()}')

    def _hint(self) -> str:
        """How the keys would have to be called, where they seem to mean what is missing; the end of a message."""
        given, is_asked = self.given, not self.given.keys().isdisjoint(_ASKED)
        twins = self._twins() if self.stage in ("sft", "rm") and "chosen" not in given else []
        dialogue = next((key for key, value in given.items() if _is_dialogue(value) and _is_said(value)), None)
        wanted = [name for name in _NEEDED[self.stage] if name not in given and not (is_asked and name == "prompt")]
        found = {name: self._like(name) for name in wanted if name == "prompt" or not twins}
        if dialogue and not is_asked and not twins and self.stage in ("sft", "ppo"):
            found = {"messages": dialogue}
        renamed = " and ".join(f"{_shown(other)} to {_shown(name)}" for name, other in found.items() if other)
        told = f"; rename {renamed}, if that is what they are" if renamed else ""
        if twins:
            told += f'; call the better one of {" and ".join(map(_shown, twins))} "chosen", the other "rejected"'
        system = next((key for key in _SYSTEMS if self.data.get(key)), None)
        return told + (f'; "{system}" is not read, write it before the prompt' if told and system else "")

    def _like(self, name: str) -> str | None:
        """The key that seems to mean `name`."""
        texts = [key for key, value in self.given.items() if not isinstance(value, dict | list) or _is_said(value)]
        return next((key for key in texts if key.strip().lower().removesuffix("s") in (name, *_LIKE[name])), None)

    def _twins(self) -> list[str]:
        """Two keys whose names differ in a number or letter at the end, of the longest texts; or none."""
        texts = [key for key, value in self.given.items() if isinstance(value, str) or _is_dialogue(value)]
        pairs = [[a, b] for a in texts for b in texts if len(a) > 1 and a[:-1] == b[:-1] and a[-1] + b[-1] in _TWINS]
        return max(pairs, key=lambda pair: len(str(self.given[pair[0]])), default=[])

    def _pair(self, name: str, value: Any, asked: str | None) -> tuple[str, str]:
        """(prompt, response) from a reply to what is asked, or from a whole dialogue."""
        if isinstance(value, str) and asked is None and name not in _DIALOGUES:
            try:
                return self.template.split_dialogue(self._checked(value, name, may_be_empty=False))
            except ValueError as error:
                hint = "" if self.template.assistant in value else self._hint()
                raise self._bad(f'"{name}" {error}{hint}') from None
        if _is_turns(value) or name in _DIALOGUES:
            return self._of_turns(name, value, asked)
        reply = self.template.response(self._checked(value, name))
        # A reply may quote "Human:"; only with a turn of the model as well is it a dialogue.
        if reply.lstrip().startswith(self.template.human.strip()) and self.template.assistant in reply:
            raise self._bad(
                f'"{name}" is a whole dialogue although there is a "{asked}" too; give the reply alone, '
                f'or leave "{asked}" out'
            )
        self.is_new |= not reply
        return self._prompt(asked), reply

    def _of_turns(self, name: str, value: Any, asked: str | None) -> tuple[str, str]:
        """(prompt, response) from messages: a reply alone, or a whole dialogue with what is asked in it."""
        self.is_new = True
        turns = self._turns(value, name)
        if self.stage == "ppo" and turns[-1][0] == "user":
            turns.append(("assistant", ""))
        if turns[-1][0] != "assistant":
            raise self._bad(f'"{name}" ends with a turn of the person; the last turn has to be of the model')
        if self.stage == "sft" and isinstance(value, list) and value[-1].get("weight") == 0:
            raise self._bad(f'"{name}[{len(value) - 1}]" has weight 0: it is not to be trained on; remove that turn')
        *begun, (_, reply) = turns
        if begun and name not in ("chosen", "rejected", *_DIALOGUES):
            raise self._bad(f'"{name}" is a whole dialogue; give the reply alone, or the dialogue as "messages"')
        prompt = self._prompt(asked) if asked else ""
        if begun or not asked:
            if not any(role == "user" for role, _ in begun):
                raise self._bad(f'"{name}" has no turn of the person before the last one of the model')
            whole = self.template.prompt_of_turns(begun)
            # A system text may stand as "prompt", too.
            if prompt.removesuffix(self.template.assistant).removeprefix(self.template.human) not in whole:
                raise self._bad(f'"{name}" is a dialogue without "{asked}" in it; leave one of them out')
            prompt = whole
        return prompt, self.template.response(reply)

    def _prompt(self, asked: str) -> str:
        """The text of what is asked, in the template's form."""
        if _is_turns(self.given[asked]):
            self.is_new = True
            turns = self._turns(self.given[asked], asked)
            if turns[-1][0] != "user":
                raise self._bad(f'"{asked}" ends with a turn of the model; a prompt ends with a turn of the person')
            return self.template.prompt_of_turns(turns)
        text = self.text(asked)
        more = self._checked(self.data.get("input", ""), "input") if asked == "instruction" else ""
        try:
            return self.template.prompt(f"{text}\n\n{more}" if more.strip() else text)
        except ValueError as error:
            raise self._bad(f'"{asked}" {error}') from None

    def _completions(self) -> dict[str, Any]:
        value = self.data["completions"]
        if not isinstance(value, list) or len(value) < 2:
            raise self._bad(f'"completions" is {_kind(value)}; it has to be a list of two or more replies, best first')
        return {f"completions[{i}]": reply for i, reply in enumerate(value)}

    def _turns(self, value: Any, name: str) -> list[tuple[str, str]]:
        """(role, text) of messages, roles as in `PromptTemplate.prompt_of_turns`; the texts of a system are one."""
        if not _is_turns(value):
            raise self._bad(f'"{name}" is {_kind(value)}; it has to be a list of {{"role": ..., "content": ...}}')
        messages = [value] if isinstance(value, dict) else value
        turns: list[tuple[str, str]] = []
        for i, message in enumerate(messages):
            shown = f"{name}[{i}]"
            unread = next((key for key in ("tool_calls", "function_call") if message.get(key)), None)
            if not _is_said(message):
                raise self._bad(f'"{shown}" has no "role" (keys: {_keys(message)}); a text or a message is needed')
            role = _ROLES.get(str(message.get("role", message.get("from"))).lower())
            if role is None or unread:
                told = f'"{unread}"' if unread else f"the role {_shown(message.get('role', message.get('from')))}"
                raise self._bad(f'"{shown}" has {told}; a dialogue has turns of system, user and assistant alone')
            text = self._content(message.get("content", message.get("value")), shown)
            if not text.strip() and (role != "assistant" or i + 1 < len(messages)):
                raise self._bad(f'"{shown}" is empty; it has to have a text')
            if role != "system":
                turns.append((role, text))
            elif all(earlier == "system" for earlier, _ in turns):
                turns = [("system", "\n\n".join([*(earlier for _, earlier in turns), text.strip()]))]
            else:
                raise self._bad(f'"{shown}" is a system text inside the dialogue; it is read at the beginning only')
        return turns

    def _content(self, value: Any, name: str) -> str:
        """The text of a message: a string, or parts that are all texts."""
        if not isinstance(value, list):
            return self._checked(value, name)
        for part in value:
            if not (isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))):
                what = _shown(part.get("type")) if isinstance(part, dict) else _kind(part)
                raise self._bad(f'"{name}" has a part that is no text ({what}); only texts are read')
        return self._checked("".join(part if isinstance(part, str) else part["text"] for part in value), name)

    def _refuse_what_is_not_read(self, asked: str | None, replies: list[str]) -> None:
        """Tells what would change the meaning of a row if it were passed over."""
        data, first = self.data, replies[0] if replies else ""
        label = next((key for key in _LABELS if key in data and isinstance(data[key], bool)), None)
        if label and first in ("completion", "output", *_DIALOGUES) and self.stage != "ppo":
            raise self._bad(
                f'is a reply with a "{label}", which is not read; write good ones as "prompt" and "response", or pairs '
                'as "prompt", "chosen" and "rejected"'
            )
        if "completions" in replies and isinstance(data.get("labels"), list):
            raise self._bad('has "labels" beside "completions", which are not read; completions are ranked, best first')
        told = _BESIDE_INSTRUCTION if asked == "instruction" else ()
        if any(_is_turns(data.get(key)) for key in (asked, *replies)):
            told += _BESIDE_MESSAGES
        unread = next((key for key in told if data.get(key)), None)
        if unread:
            remedy = 'rename it to "input"' if unread == "context" else "write it into the dialogue"
            raise self._bad(f'has "{unread}", which is not read; {remedy}, or remove it')

    def _checked(self, value: Any, name: str, may_be_empty: bool = True) -> str:
        if not isinstance(value, str):
            raise self._bad(f'"{name}" is {_kind(value)}; it has to be a string')
        if not (may_be_empty or value.strip()):
            raise self._bad(f'"{name}" is empty; it has to have a text')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise self._bad(
                f'"{name}" has half of a surrogate pair (\\u{code:04x}) at character {error.start}, no text'
            ) from None
        return value

    def _bad(self, told: str) -> BadRow:
        return BadRow(f"{self.where}: {told}")


def _is_turns(value: Any) -> bool:
    """Whether a value is a list of messages, or one message."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    )


def _is_said(value: Any) -> bool:
    """Whether a value is one or more messages that say whose they are."""
    messages = [value] if isinstance(value, dict) else value
    return _is_turns(value) and not any({"role", "from"}.isdisjoint(message) for message in messages)


def _is_dialogue(value: Any) -> bool:
    """Whether a value has messages before its last one."""
    return isinstance(value, list) and len(value) > 1 and _is_turns(value)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _keys(data: dict) -> str:
    shown = ", ".join(_shown(key) for key in list(data)[:8])
    return (shown or "none") + (", ..." if len(data) > 8 else "")


def _shown(value: Any) -> str:
    return json.dumps(str(value)[:40])
