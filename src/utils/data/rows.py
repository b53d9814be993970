"""Text rows: what the files and hub datasets hold, brought to one form and checked.

Accepted forms of a row (an object in JSON Lines, or a row of a hub dataset); other keys are ignored:

    {"chosen", "rejected"}                     HH form: two whole dialogues, cut after their last "\\n\\nAssistant:"
    {"prompt"}                                 a prompt alone
    {"prompt", "response"}                     a demonstration
    {"prompt", "chosen", "rejected"}           a ranked pair of replies (rm-static)
    {"prompt", "completions"}                  K >= 2 ranked replies, best first; K may differ from row to row
    {"text"}                                   plain text

Texts are normalised by `PromptTemplate` (leading blank line, one space before a reply, nothing after it); a bare
question as `prompt` becomes the one turn of a person. Anything that a tokenizer would take for a special token stays
plain text.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from config.user_error import UserError
from utils.template import PromptTemplate

STAGES = ("sft", "rm", "ppo", "text")
"""What a row is read for: a demonstration, a ranking, a prompt, or plain text."""

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is no row: most likely the file is one big JSON array."""

FORMS = {
    "sft": 'stage sft needs "prompt" and "response", or a "chosen" dialogue',
    "rm": 'stage rm needs "chosen" and "rejected", or "prompt" and "completions" (two or more, best first)',
    "ppo": 'stage ppo needs "prompt", or a "chosen" dialogue',
    "text": 'stage text needs "text"',
}


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


def parse_row(data: Any, stage: str, where: str, template: PromptTemplate) -> Row | None:
    """Brings one decoded row to the form that a stage of `STAGES` needs; `where` is put in front of every message.

    Returns:
        The row, or None for a demonstration that says nothing: in the HH form the last reply of a dialogue can be
        empty. Such a reply is kept in a ranking, where it scores an immediate end; learning to answer nothing from it
        would be harmful.

    Raises:
        BadRow: the row is malformed, or is of a form that the stage cannot use.
    """
    if not isinstance(data, dict):
        raise BadRow(f'{where}: is {_kind(data)}; a row is an object such as {{"prompt": ..., "response": ...}}')
    if stage == "text" or (stage == "sft" and "text" in data and "prompt" not in data and "chosen" not in data):
        return Row(("",), (_text(data, "text", where, stage),))
    form = _prompt_and_replies if "prompt" in data else _dialogues
    pairs = form(data, stage, where, template)
    prompts, responses = zip(*pairs, strict=True)
    if stage == "ppo":
        return Row(prompts, ())
    if stage == "sft" and not responses[0]:
        return None
    if len(set(pairs)) < len(pairs):
        raise BadRow(
            f"{where}: two of the ranked replies are identical, which ranks nothing; remove one of them or the row"
        )
    return Row(prompts, responses)


# A form gives (prompt, response) of each completion that the stage needs; for PPO one pair, whose response is not used.


def _prompt_and_replies(data: dict, stage: str, where: str, template: PromptTemplate) -> list[tuple[str, str]]:
    try:
        prompt = template.prompt(_text(data, "prompt", where, stage))
    except ValueError as error:
        raise BadRow(f'{where}: "prompt" {error}') from None
    if stage == "ppo":
        return [(prompt, "")]
    if stage == "sft" and isinstance(data.get("response"), str):
        replies = {"response": data["response"]}
    elif "completions" in data:
        replies = _completions(data["completions"], where)
    else:
        shown = "chosen" if "chosen" in data and "response" not in data else "response"
        keys = (shown,) if stage == "sft" else ("chosen", "rejected")
        replies = {key: _text(data, key, where, stage) for key in keys}
    pairs = []
    for name, reply in list(replies.items())[: 1 if stage == "sft" else None]:
        _check_text(reply, name, where)
        # A reply may quote "Human:"; only with a turn of the model as well is it a dialogue.
        if reply.lstrip().startswith(template.human.strip()) and template.assistant in reply:
            raise BadRow(
                f'{where}: "{name}" is a whole dialogue although there is a "prompt" too; give the reply alone, '
                'or leave "prompt" out'
            )
        pairs.append((prompt, template.response(reply)))
    return pairs


def _dialogues(data: dict, stage: str, where: str, template: PromptTemplate) -> list[tuple[str, str]]:
    pairs = []
    for key in ("chosen", "rejected") if stage == "rm" else ("chosen",):
        try:
            pairs.append(template.split_dialogue(_text(data, key, where, stage)))
        except ValueError as error:
            raise BadRow(f'{where}: "{key}" {error}') from None
    return pairs


def _completions(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow(
            f'{where}: "completions" is {_kind(value)}; it has to be a list of two or more replies, best first'
        )
    return {f"completions[{i}]": reply for i, reply in enumerate(value)}


def _text(data: dict, key: str, where: str, stage: str) -> str:
    if key not in data:
        raise BadRow(f'{where}: has no "{key}" (keys: {_keys(data)}); {FORMS[stage]}')
    _check_text(data[key], key, where)
    return data[key]


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise BadRow(f'{where}: "{name}" is {_kind(value)}; it has to be a string')
    if not value.strip():
        raise BadRow(f'{where}: "{name}" is empty; it has to have a text')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise BadRow(
            f'{where}: "{name}" has half of a surrogate pair (\\u{code:04x}) at character {error.start}, no text'
        ) from None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _keys(data: dict) -> str:
    shown = ", ".join(json.dumps(str(key)[:40]) for key in list(data)[:8])
    return (shown or "none") + (", ..." if len(data) > 8 else "")


def read_jsonl(path: Path) -> Iterator[tuple[int, Any | BadRow]]:
    """Reads JSON Lines, plain or gzip (told by its first bytes), as UTF-8 with or without a byte order mark.

    Lines end with LF or CRLF; blank lines are passed over.

    Yields:
        (line number from 1, decoded value), or (line number, BadRow) for a line that is not JSON, so that the caller
        can count it and read on.

    Raises:
        UserError: the file cannot be read at all, or not to its end (missing, a directory, no permission, torn gzip).
    """
    number = 0
    try:
        with open_binary(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}:{number}: a line over {MAX_LINE_BYTES >> 20} MiB; write one JSON object per line"
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _decode(line, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: gzip data is damaged or cut short after line {number} ({error}); copy the file again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(line: bytes, where: str) -> Any | BadRow:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            f"{where}: not UTF-8 text (byte 0x{line[error.start]:02x} at {error.start}); save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRow(f"{where}: not JSON ({error.msg} at character {error.pos}); one JSON object per line is needed")
    except (ValueError, RecursionError) as error:
        return BadRow(f"{where}: not usable JSON ({error}); one JSON object per line is needed")


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading, through gzip if it is compressed.

    Raises:
        UserError: there is no such regular file, or it is named .gz but is not gzip. OSError when it cannot be opened.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; a .jsonl or .jsonl.gz file is needed")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; a .jsonl or .jsonl.gz file is needed")
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if path.suffix == ".gz" and start:
        raise UserError(f"{path}: is named .gz but is not gzip data; rename it, or compress it with gzip")
    return path.open("rb")
