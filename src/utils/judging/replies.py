"""What a server sends back, read without trust in its form: an answer's text, or what an error says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from config.scrub import printable, scrub

_SHOWN_CHARACTERS = 300
_PAGE = re.compile(r"\s*(?:<!doctype|<html|<head|<\?xml|<body)", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_THOUGHTS = ("reasoning_content", "reasoning")  # of vLLM, DeepSeek and others


@dataclass(frozen=True)
class Reply:
    """One answer.

    text: of the message, or of its thoughts where there is nothing beside them. cut: it ran into the limit of tokens.
    withheld: the server kept it back or the model declined. usage: input and output tokens, where they are told.
    """

    text: str
    cut: bool = False
    withheld: bool = False
    usage: tuple[int, int] | None = None

    @property
    def readable(self) -> bool:
        """Whether it may hold a verdict: half an answer may say the opposite of the whole."""
        return not (self.cut or self.withheld)


class Unreadable(Exception):
    """A response with status 200 that breaks off."""


class NoChat(Exception):
    """A response with status 200 from something that is no chat API; the message says what it is."""


class ErrorInside(Exception):
    """A response with status 200 that holds an error with a status of its own. text: of the error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def read_reply(body: str) -> Reply:
    """The first choice of a chat completion, in the forms that servers give it.

    Raises:
        Unreadable, NoChat, ErrorInside: as they say.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        if not body.strip() or body.lstrip()[0] in "{[":
            raise Unreadable from None
        raise NoChat(f"a web page ({shown(error_text(body))})" if _PAGE.match(body) else shown(body)) from None
    answer = data if isinstance(data, dict) else {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message, finish = choice.get("message"), choice.get("finish_reason")
    error = choice.get("error") or (None if isinstance(message, dict) else answer.get("error"))
    if isinstance(error, dict) and re.fullmatch("[45][0-9]{2}", status := str(error.get("code"))):
        raise ErrorInside(int(status), _message(error))
    if not isinstance(message, dict):
        if error or answer.get("object") != "chat.completion":
            raise NoChat(shown(error_text(body) or body))
        message, finish = {}, finish or "content_filter"  # all of it was kept back
    text = _text_of(message.get("content"))
    if not text.strip():
        text = next((found for key in _THOUGHTS if (found := _text_of(message.get(key))).strip()), "")
    declined = message.get("refusal") if isinstance(message.get("refusal"), str) else ""
    withheld = str(finish).startswith("content_filter") or bool(declined and not text)
    return Reply(text or declined, finish in ("length", "max_tokens"), withheld, _usage(answer.get("usage")))


def error_text(body: str) -> str:
    """What an error says for people, from the bodies of OpenAI, vLLM, FastAPI, Ollama, proxies and web servers."""
    try:
        return _message(json.loads(body))
    except (ValueError, RecursionError):
        if not _PAGE.match(body):
            return body.strip()
        title = _TITLE.search(body)
        return title[1].strip() if title else "HTML"


def shown(text: str) -> str:
    """A server's text on one line, cut short, without secrets: some repeat the key in their errors."""
    text = printable(scrub(" ".join(text.split())))
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def _message(body: Any) -> str:
    if isinstance(body, str):
        return body.strip()
    if isinstance(body, list):
        return "; ".join(filter(None, map(_message, body[:3])))
    if not isinstance(body, dict):
        return ""
    if isinstance(place := body.get("loc"), list) and isinstance(body.get("msg"), str):  # FastAPI
        return f"{'.'.join(map(str, place))}: {body['msg']}"
    text = next((t for key in ("message", "error", "detail", "msg", "errors") if (t := _message(body.get(key)))), "")
    metadata = body.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("raw"), str):  # a proxy with its provider's own words
        text = f"{text}: {metadata['raw']}"
    return text


def _text_of(content: Any) -> str:
    """A message's content: a string, or parts, of which some are thoughts."""
    return content if isinstance(content, str) else "".join(_parts(content)) if isinstance(content, list) else ""


def _parts(content: list[Any]) -> Iterator[str]:
    for part in content:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
            yield part["text"] if isinstance(part.get("text"), str) else ""


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return tokens if all(isinstance(n, int) and n >= 0 for n in tokens) else None
