"""Chat requests that wait out limits, an overloaded server and lost connections.

The client's own retries are off. It repeats a request unseen, so that none of the repetitions could be held against
--max-cost, counted or stopped; its pauses end at 8 s; and a limit that one thread has met would not hold the others.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import openai

from config.scrub import printable, scrub, scrubbed
from config.user_error import UserError
from utils.judging.cost import Budget
from utils.runs.folder import REPO

DEFAULT_JUDGE_MODEL = "gpt-4.1-mini"
UNREACHABLE = "cannot be reached"
OVER_BUDGET = "over budget"


@dataclass(frozen=True)
class JudgeOptions:
    """How a language model is asked.

    model: as the server calls it. base_url: of an OpenAI-compatible server; None takes OPENAI_BASE_URL or OpenAI's own.
    cache: file of the verdicts so far. concurrency: requests at a time. max_cost: US dollars for this process, None for
    no limit. price: US dollars per million input and output tokens, None takes `PRICES`. timeout: seconds for one
    answer. max_attempts: for one answer. first_wait, longest_wait: seconds before the second attempt, doubling up to
    the longest; a server that asks for a longer pause than the longest is given up on. give_up_after: questions in a
    row without an answer, after which the rest is not asked. key_folders: where `openai.key` is looked for, None for
    the usual places.
    """

    model: str = DEFAULT_JUDGE_MODEL
    base_url: str | None = None
    cache: Path = REPO / "runs" / "judge_cache.jsonl"
    concurrency: int = 8
    max_cost: float | None = None
    price: tuple[float, float] | None = None
    timeout: float = 60.0
    max_attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    give_up_after: int = 10
    key_folders: Sequence[Path] | None = None


class GaveUp(Exception):
    """No answer to this question after all attempts; the message says why in a few words."""


class NotAsked(Exception):
    """Stopped before an answer: by the caller's event, or because the call could pass the budget."""


class Refused(Exception):
    """The server finds fault with the request itself; the message is the server's, without secrets."""


class PatientRequests:
    """Sends one chat request at a time per calling thread; made for many threads.

    made: requests sent so far, repeated ones included. stop: set it, and nothing more is sent.
    """

    def __init__(self, options: JudgeOptions, url: str, key: str, budget: Budget) -> None:
        """Send nothing yet. Every request is reserved and settled in the budget."""
        self._client = openai.OpenAI(api_key=key, base_url=url, timeout=options.timeout, max_retries=0)
        self._options, self._budget, self._url = options, budget, scrubbed(url)
        self.made = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._resume_at = 0.0  # monotonic; no thread sends before: the server asked for a pause

    def send(self, **request: Any) -> str:
        """The answer's text; "" where it was cut short or withheld.

        Args:
            request: `messages`, `max_tokens` and whatever else the chat API takes.

        Raises:
            GaveUp, NotAsked, Refused: as they say.
            UserError: no request can succeed: wrong key, unknown model, quota spent.
        """
        text = "".join(message["content"] for message in request["messages"])
        price = self._budget.price
        bound = price.bound(text, request["max_tokens"]) if price else 0.0
        for attempt in range(self._options.max_attempts):
            self._wait(self._resume_at - time.monotonic())
            if not self._budget.reserve(bound):
                raise NotAsked(OVER_BUDGET)
            usage, charged = None, False
            try:
                with self._lock:
                    self.made += 1
                completion = self._client.chat.completions.create(model=self._options.model, **request)
                charged = True
                usage = _usage(completion)
                return _text(completion)
            except openai.APIStatusError as error:
                reason, asked = self._reason(error), _retry_after(error)
            except _NO_ANSWER as error:
                reason, asked = _what_happened(error), 0.0
                # The server may have worked, and charge, for an answer that did not arrive.
                charged = reason != UNREACHABLE
            finally:
                self._budget.settle(bound, usage, charged)
            if asked > self._options.longest_wait:
                raise GaveUp(f"asked to wait {asked:.0f} s")
            wait = min(self._options.longest_wait, self._options.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
            pause = max(wait, asked)
            if reason == "HTTP 429":
                self._resume_at = max(self._resume_at, time.monotonic() + pause)
            if attempt + 1 < self._options.max_attempts:
                self._wait(pause)
        raise GaveUp(reason)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise NotAsked("stopped")

    def _reason(self, error: openai.APIStatusError) -> str:
        """Why to try again, in a few words.

        Raises:
            Refused, UserError: trying again is of no use.
        """
        status, model, url = error.status_code, self._options.model, self._url
        if status == 401:
            raise UserError(f"--judge openai: {url} does not accept the key (401); check openai.key") from None
        if status == 403:
            raise UserError(f"--judge openai: {url} forbids this key to use {model} (403)") from None
        if status == 404:
            raise UserError(
                f"--judge-model {model}: {url} does not know it (404); check the name, and the path of --base-url "
                "(often /v1)"
            ) from None
        if status == 402 or error.code == "insufficient_quota":
            raise UserError(f"--judge openai: the quota of this key at {url} is spent ({status})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            return f"HTTP {status}"
        body = error.body if isinstance(error.body, dict) else {}
        raise Refused(printable(scrub(str(body.get("message") or f"HTTP {status}")))[:300]) from None


class _Unreadable(Exception):
    """A response with status 200 that is no chat completion."""


# The client lets errors of the JSON parser through.
_NO_ANSWER = (
    openai.APIConnectionError,
    openai.APIResponseValidationError,
    _Unreadable,
    JSONDecodeError,
    UnicodeDecodeError,
)


def _text(completion: Any) -> str:
    try:
        choice = completion.choices[0]
        content = choice.message.content
    except (AttributeError, IndexError, TypeError):
        raise _Unreadable from None
    whole = choice.finish_reason not in ("length", "content_filter")
    return content if whole and isinstance(content, str) else ""


def _usage(completion: Any) -> tuple[int, int] | None:
    usage = getattr(completion, "usage", None)
    tokens = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return tokens if all(isinstance(n, int) for n in tokens) else None


def _what_happened(error: Exception) -> str:
    """In a few words, why there is no answer; UNREACHABLE when the server cannot have seen the request."""
    if not isinstance(error, openai.APIConnectionError):
        return "unreadable response"
    if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):  # of the client's HTTP library
        return UNREACHABLE
    return "timeout" if isinstance(error, openai.APITimeoutError) else "connection lost"


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number, or a date), 0 when it does not."""
    value = error.response.headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
