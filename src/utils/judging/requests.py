"""Chat requests that wait out limits, an overloaded server and lost connections."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from json import JSONDecodeError
from typing import Any

import openai

from config.scrub import printable, scrub
from config.user_error import UserError
from utils.judging.cost import Budget

UNREACHABLE = "cannot be reached"


class GaveUp(Exception):
    """No answer to this question after all attempts; the message says why in a few words."""


class NotAsked(Exception):
    """Stopped before an answer: by the caller's event, or because the call could pass the budget."""


class Refused(Exception):
    """The server finds fault with the request itself; the message is the server's, without secrets."""


class PatientRequests:
    """Sends one chat request at a time per calling thread; made for many threads.

    Attributes:
        made: requests sent so far, repeated ones included.
        stop: set it, and nothing more is sent.
    """

    def __init__(
        self,
        client: openai.OpenAI,
        model: str,
        budget: Budget,
        *,
        url: str,
        attempts: int,
        first_wait: float,
        longest_wait: float,
    ) -> None:
        """Send nothing yet.

        Args:
            client: with its own retries off, so that waits, budget and counts are kept here alone.
            model: as the server calls it. url: for messages.
            budget: every request is reserved and settled there.
            attempts: requests for one answer.
            first_wait, longest_wait: seconds between attempts; the pause doubles from one to the other.
        """
        self._client, self._model, self._budget, self._url = client, model, budget, url
        self._attempts, self._first_wait, self._longest_wait = attempts, first_wait, longest_wait
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
        for attempt in range(self._attempts):
            self._wait(self._resume_at - time.monotonic())
            if not self._budget.reserve(bound):
                raise NotAsked("over budget")
            usage, charged = None, False
            try:
                with self._lock:
                    self.made += 1
                completion = self._client.chat.completions.create(model=self._model, **request)
                charged = True
                usage = _usage(completion)
                return _text(completion)
            except openai.APIStatusError as error:
                reason = self._reason(error)
                pause = self._pause(attempt, _retry_after(error))
                if error.status_code == 429:
                    self._resume_at = max(self._resume_at, time.monotonic() + pause)
            except _NO_ANSWER as error:
                reason = _what_happened(error)
                # The server may have worked, and charge, for an answer that did not arrive.
                charged = reason != UNREACHABLE
                pause = self._pause(attempt)
            finally:
                self._budget.settle(bound, usage, charged)
            if attempt + 1 < self._attempts:
                self._wait(pause)
        raise GaveUp(reason)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise NotAsked("stopped")

    def _pause(self, attempt: int, asked: float | None = None) -> float:
        """Seconds before the next attempt: exponential with jitter, and never less than the server asks for.

        Raises:
            GaveUp: the server asks for more than the longest wait.
        """
        if asked is not None and asked > self._longest_wait:
            raise GaveUp(f"asked to wait {asked:.0f} s")
        wait = min(self._longest_wait, self._first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        return max(wait, asked or 0.0)

    def _reason(self, error: openai.APIStatusError) -> str:
        """Why to try again, in a few words.

        Raises:
            Refused, UserError: trying again is of no use.
        """
        status = error.status_code
        if status == 401:
            raise UserError(f"--judge openai: {self._url} does not accept the key (401); check openai.key") from None
        if status == 403:
            raise UserError(f"--judge openai: {self._url} forbids this key to use {self._model} (403)") from None
        if status == 404:
            raise UserError(
                f"--judge-model {self._model}: {self._url} does not know it (404); check the name, and the path of "
                "--base-url (often /v1)"
            ) from None
        if status == 402 or error.code == "insufficient_quota":
            raise UserError(f"--judge openai: the quota of this key at {self._url} is spent ({status})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            return f"HTTP {status}"
        raise Refused(_server_message(error)) from None


class _Unreadable(Exception):
    """A response with status 200 that is no chat completion."""


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


# The client lets errors of the JSON parser through.
_NO_ANSWER = (
    openai.APIConnectionError,
    openai.APIResponseValidationError,
    _Unreadable,
    JSONDecodeError,
    UnicodeDecodeError,
)


def _what_happened(error: Exception) -> str:
    """In a few words, why there is no answer; UNREACHABLE when the server cannot have seen the request."""
    if not isinstance(error, openai.APIConnectionError):
        return "unreadable response"
    if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):  # of the client's HTTP library
        return UNREACHABLE
    return "timeout" if isinstance(error, openai.APITimeoutError) else "connection lost"


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number, or a date), None when it does not."""
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _server_message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or f"HTTP {error.status_code}"
    return printable(scrub(str(message)))[:300]
