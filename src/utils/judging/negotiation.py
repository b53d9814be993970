"""Which parameters of the chat API a server takes: found out on the first question, then held for the run.

Servers differ in the name of the limit, the temperature, the form of the answer and the role of the instructions. What
one of them refuses is replaced or left out: by its error's words where they name a parameter, else by trying, and what
was given up by trying is tried once more at the end, so that a passing fault decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.judging.prompt import RESPONSE_FORMATS, TEMPERATURE
from utils.judging.replies import Reply

LIMITS = (64, 512, 2048, 8192)  # output tokens: enough for a verdict, then with room for thoughts before it

# What may be given up, field by field: from what is wanted to what every server takes.
_LADDERS: dict[str, tuple[Any, ...]] = {
    "response_format": (*RESPONSE_FORMATS, None),
    "limit": ("max_tokens", "max_completion_tokens", None),
    "temperature": (TEMPERATURE, None),
    "role": ("system", "developer", "user"),
}
# Of errors in lower case.
_NAMED = {
    "response_format": re.compile(
        r"response[_ ]format|json[_ ]?(?:schema|object|mode)|structured[_ ]output|guided|grammar|\bschema\b"
    ),
    "limit": re.compile(r"max_(?:completion_|output_|new_)?tokens"),
    "temperature": re.compile(r"temperature"),
    "role": re.compile(
        r"\bsystem\b|\bdeveloper\b|\broles?\b.{0,40}\balternate|only user and assistant"
        r"|messages\W{1,2}0\W{0,2}\.?role|messages\.0"
    ),
}
_WRONG_NAME = re.compile(r"support|permitted|allowed|unknown|unrecogni[sz]ed|unexpected|extra|instead|deprecated")
_MORE_ROOM = re.compile(r"limit was reached|higher max|must be (?:greater|at least|larger)|too (?:small|low)")
_LESS_ROOM = re.compile(r"too (?:large|high|big|long)|at most|maximum|context[_ ](?:length|window|size)|exceed")
_TOO_LONG = re.compile(r"context[_ ](?:length|window|size)|too long|reduce the length", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"\b(?:invalid|unknown|no such|unsupported) model\b|model_not_found|not a valid model"
    r"|\bmodel\b.{0,60}(?:not found|not exist|not (?:loaded|available))",
    re.IGNORECASE,
)
_NO_DEVELOPER = re.compile(r"developer.{0,40}(?:not|un)|alternate")


class GaveUp(Exception):
    """No answer to this question after all attempts; the message says why in a few words. text: the server's."""

    def __init__(self, why: str, text: str = "") -> None:
        super().__init__(why)
        self.text = text


class Refused(Exception):
    """The server finds fault with the request itself. text: all that it says; parameter: what it names, if anything."""

    def __init__(self, text: str, parameter: str = "") -> None:
        super().__init__(text)
        self.text, self.parameter = text, parameter

    @property
    def of_the_model(self) -> bool:
        """Whether the server has no such model, or not for this API: no parameter helps."""
        return self.parameter == "model" or bool(_NO_MODEL.search(self.text))


@dataclass(frozen=True)
class Form:
    """How a question is put. None: the parameter is left out. role: of the instructions; "user" puts them before the
    question. max_tokens: the value of the limit."""

    response_format: str | None = next(iter(RESPONSE_FORMATS))
    limit: str | None = "max_tokens"
    max_tokens: int = LIMITS[0]
    temperature: float | None = TEMPERATURE
    role: str = "system"

    def request(self, chat: Sequence[dict[str, str]]) -> dict[str, Any]:
        """The body of a request, the model aside; `chat` as `judging/prompt.py` makes it."""
        instructions, question = (message["content"] for message in chat)
        if self.role == "user":
            chat = [{"role": "user", "content": f"{instructions}\n\n{question}"}]
        else:
            chat = [{"role": self.role, "content": instructions}, {"role": "user", "content": question}]
        body: dict[str, Any] = {"messages": chat}
        if self.response_format is not None:
            body["response_format"] = RESPONSE_FORMATS[self.response_format]
        if self.limit is not None:
            body[self.limit] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    @property
    def bound(self) -> int:
        """The most output tokens that an answer is reckoned with."""
        return self.max_tokens if self.limit is not None else LIMITS[-1]

    def wider(self) -> Form | None:
        """With room for more tokens; None when there is no more, or no limit that we set."""
        more = [size for size in LIMITS if size > self.max_tokens]
        return replace(self, max_tokens=more[0]) if more and self.limit is not None else None

    def describe(self) -> dict[str, Any]:
        """For evaluation.json: what is sent, and what was left out or replaced."""
        plain = Form()
        changed = [name for name in _LADDERS if getattr(self, name) != getattr(plain, name)]
        return {
            "response_format": self.response_format, "limit": self.limit, "max_tokens": self.max_tokens,
            "temperature": self.temperature, "role_of_instructions": self.role, "changed": changed,
        }  # fmt: skip

    def told(self) -> str:
        """What is not as usual, in words; "" when all is."""
        plain, parts = Form(), []
        if self.response_format != plain.response_format:
            parts.append(f"answers asked for as {self.response_format or 'plain text'}")
        if self.limit != plain.limit:
            parts.append(f"{plain.limit} {f'called {self.limit}' if self.limit else 'left out'}")
        if self.temperature != plain.temperature:
            parts.append(f"temperature {plain.temperature:g} left out: the same question may be answered differently")
        if self.role != plain.role:
            parts.append("instructions in the user's message" if self.role == "user" else f"role {self.role}")
        return "; ".join(parts)


Ask = Callable[[Form, bool], Reply]


def negotiate(form: Form, ask: Ask, server_errors: bool = True) -> tuple[Form, Reply]:
    """The form that a server takes, and its answer in it.

    Args:
        ask: puts one question in a form, and is told whether to be patient with server errors: in the first form all
            may pass, in another one they are as likely to come of the form.
        server_errors: whether a 5xx may come of what it names, or of the response format, too.

    Raises:
        Refused, GaveUp: in no form is there an answer.
    """
    guesses: list[tuple[str, Any]] = []
    first, repeated = form, False
    while True:
        try:
            reply = ask(form, form == first)
            break
        except Refused as error:
            if not repeated:  # it may have been a passing fault
                repeated = True
                continue
            changes = list(_changes_named(form, error))
            certain = len(changes) == 1
            if not changes and not (_TOO_LONG.search(error.text) or error.of_the_model):
                changes = _steps(form)
            if not changes:
                raise
        except GaveUp as error:
            # A 5xx that names a parameter may come of the server's own template for chats.
            named = list(_changes_named(form, Refused(error.text)))
            changes, certain = named or _steps(form, ("response_format",)), False
            if not (changes and server_errors and str(error).startswith("HTTP 5")):
                raise
        field, change = changes[0]
        if not certain:
            guesses.append((field, getattr(form, field)))
        form = change
    return _with_restored(form, guesses, ask, reply)


def _with_restored(form: Form, guesses: list[tuple[str, Any]], ask: Ask, reply: Reply) -> tuple[Form, Reply]:
    """Try once more, one by one, what was given up without an error that named it alone."""
    restored: set[str] = set()
    for field, value in guesses:
        if field not in restored:
            try:
                reply = ask(replace(form, **{field: value}), False)
            except (Refused, GaveUp):
                continue
            form = replace(form, **{field: value})
            restored.add(field)
    return form, reply


def _changes_named(form: Form, error: Refused) -> Iterator[tuple[str, Form]]:
    """(field, form with it changed) for each that the error names, first the one that it names first."""
    text = error.text.lower()
    places = {field: match.start() for field, pattern in _NAMED.items() if (match := pattern.search(text))}
    places |= {field: -1 for field, pattern in _NAMED.items() if pattern.search(error.parameter.lower())}
    for field in sorted(places, key=places.__getitem__):
        change = _step(form, field)
        if field == "limit" and not _WRONG_NAME.search(text):
            if _MORE_ROOM.search(text):
                change = form.wider()
            elif _LESS_ROOM.search(text):
                change = None  # not the parameter is at fault: the question leaves too little room
        wants_developer = "developer" in text and not _NO_DEVELOPER.search(text)
        if change is not None and change.role == "developer" and not wants_developer:
            change = replace(change, role="user")
        if change is not None:
            yield field, change


def _steps(form: Form, fields: Iterable[str] = tuple(_LADDERS)) -> list[tuple[str, Form]]:
    """(field, form with it one step down) for each that has one."""
    return [(field, change) for field in fields if (change := _step(form, field)) is not None]


def _step(form: Form, field: str) -> Form | None:
    ladder = _LADDERS[field]
    at = ladder.index(getattr(form, field))
    return replace(form, **{field: ladder[at + 1]}) if at + 1 < len(ladder) else None
