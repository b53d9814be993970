"""Chat requests that wait out limits, an overloaded server and lost connections.

The client's own retries are off. It repeats a request unseen, so that none of the repetitions could be held against
--max-cost, counted or stopped; its pauses end at 8 s; and a limit that one thread has met would not hold the others.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from config.scrub import scrubbed
from config.user_error import UserError
from utils.judging.connection import connect, what_is_in_the_way
from utils.judging.cost import Budget
from utils.judging.negotiation import LIMITS, Form, GaveUp, Refused
from utils.judging.pauses import Pauses, asked_pause
from utils.judging.replies import ErrorInside, NoChat, Reply, Unreadable, error_text, read_reply, shown
from utils.runs.folder import REPO

DEFAULT_JUDGE_MODEL = "gpt-4.1-mini"
UNREACHABLE = "cannot be reached"
OVER_BUDGET = "over budget"
_SLOWER = 10  # times the timeout for answers with thoughts before them
# What some servers say with status 400 that is 401 or 402 elsewhere.
_NO_KEY = re.compile(
    r"\bAPI[ _]key\b.{0,20}\b(?:not|invalid|expired|missing)|\b(?:invalid|incorrect|missing|no) (?:API[ _]key|auth)",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(r"credit balance|budget has been exceeded|insufficient (?:balance|credit)", re.IGNORECASE)


@dataclass(frozen=True)
class JudgeOptions:
    """How a language model is asked.

    model: as the server calls it. base_url: of an OpenAI-compatible server; None takes OPENAI_BASE_URL or OpenAI's own.
    cache: file of the verdicts so far. concurrency: requests at a time. max_cost: US dollars for this process, None for
    no limit. price: US dollars per million input and output tokens, None takes `assets/judge_prices.json`. timeout:
    seconds for one answer, ten times as long where there are thoughts before it. max_attempts: for one answer.
    first_wait, longest_wait: seconds before the second attempt, doubling up to the longest. max_wait: seconds; a server
    that asks for a longer pause is given up on. give_up_after: questions in a row without an answer, or without a clear
    one, after which the rest is not asked. key_folders: where `openai.key` is looked for, None for the usual places.
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
    max_wait: float = 3600.0
    give_up_after: int = 10
    key_folders: Sequence[Path] | None = None


class PauseTooLong(GaveUp):
    """The server asks for a longer pause than is waited for; it would ask every other question's request, too."""


class NotAsked(Exception):
    """Stopped before an answer: by the caller's event, or because the call could pass the budget."""


@dataclass(frozen=True)
class _Trouble:
    """Why an attempt brought no answer. charged: the server may have worked for it."""

    reason: str
    text: str = ""
    pause: float = 0.0
    charged: bool = False
    limited: bool = False


class PatientRequests:
    """Sends one chat request at a time per calling thread; made for many threads.

    made: requests sent so far, repeated ones included. answered: those of them that brought an answer.
    last_output_tokens: of the newest answer, where the server tells. stop: set it, and nothing more is sent.
    """

    def __init__(self, options: JudgeOptions, url: str, key: str, budget: Budget) -> None:
        """Send nothing yet. Every request is reserved and settled in the budget. UserError as in `connect`."""
        self._client = connect(url, key, options.timeout)
        self._options, self._budget, self._url = options, budget, scrubbed(url)
        self.made = self.answered = 0
        self.last_output_tokens: int | None = None
        self.stop = threading.Event()
        self.pauses = Pauses(self._url, options.max_wait, self.stop)
        self._lock = threading.Lock()

    def send(self, chat: Sequence[dict[str, str]], form: Form, after_errors: int | None = None) -> Reply:
        """The answer to one question.

        Args:
            chat: instructions and question. form: how they are put.
            after_errors: attempts where the server answers 5xx; None: as many as for other trouble.

        Raises:
            GaveUp, NotAsked, Refused: as they say.
            UserError: no request can succeed: wrong key, unknown model, quota spent, no chat API there.
        """
        attempt, answered = 0, self.answered
        while True:
            if not self.pauses.wait():
                raise NotAsked("stopped")
            found = self._attempt(chat, form)
            if isinstance(found, Reply):
                return found
            if found.pause > self._options.max_wait:
                raise PauseTooLong(f"asked to wait {found.pause:.0f} s", found.text)
            # Where many threads share a strict limit, one that comes too late each time has not failed.
            attempt = 0 if found.pause and self.answered > answered else attempt + 1
            answered = self.answered
            wait = min(self._options.longest_wait, self._options.first_wait * 2 ** max(0, attempt - 1))
            wait *= random.uniform(0.5, 1.0)
            if found.limited:
                self.pauses.ask(max(wait, found.pause))
            server_error = found.reason.startswith("HTTP 5")
            if attempt >= (after_errors if server_error and after_errors else self._options.max_attempts):
                raise GaveUp(found.reason, found.text)
            if not self.pauses.wait(wait):
                raise NotAsked("stopped")

    def _attempt(self, chat: Sequence[dict[str, str]], form: Form) -> Reply | _Trouble:
        """One request, reserved before and settled after; raises what `send` does, but GaveUp."""
        price = self._budget.price
        bound = price.bound("".join(message["content"] for message in chat), form.bound) if price else 0.0
        if not self._budget.reserve(bound):
            raise NotAsked(OVER_BUDGET)
        usage, charged = None, False
        try:
            with self._lock:
                self.made += 1
            found = self._sent(form.request(chat), form.max_tokens > LIMITS[0])
            if isinstance(found, Reply):
                usage, charged = found.usage, True
                with self._lock:
                    self.answered += 1
                    self.last_output_tokens = usage[1] if usage else None
            else:
                charged = found.charged
            return found
        finally:
            self._budget.settle(bound, usage, charged)

    def _sent(self, request: dict[str, Any], slower: bool) -> Reply | _Trouble:
        timeout = self._options.timeout * (_SLOWER if slower else 1)
        completions = self._client.chat.completions.with_raw_response
        try:
            response = completions.create(model=self._options.model, timeout=timeout, **request).http_response
            return read_reply(response.text)
        except openai.APIStatusError as error:
            return self._trouble(error.status_code, error.response.text, error.response.headers, error)
        except ErrorInside as error:
            return self._trouble(error.status, error.text, {})
        except NoChat as error:
            if self.answered:
                return _Trouble("unreadable response", str(error), charged=True)
            raise UserError(
                f"--base-url {self._url}: no chat API answers there, but: {error}; give the address of the API (it "
                "often ends in /v1)"
            ) from None
        except Unreadable:
            return _Trouble("unreadable response", charged=True)
        except openai.APIConnectionError as error:
            reason = _what_happened(error)
            # The server may have worked, and charge, for an answer that did not arrive.
            return _Trouble(reason, what_is_in_the_way(error, self._url), charged=reason != UNREACHABLE)

    def _trouble(
        self, status: int, body: str, headers: Mapping[str, str], error: openai.APIStatusError | None = None
    ) -> _Trouble:
        """Why to try again.

        Raises:
            Refused, UserError: trying again is of no use.
        """
        model, url, text = self._options.model, self._url, error_text(body)
        told = f"{status}: {shown(text)}" if text else str(status)
        if status == 401 or (status == 400 and _NO_KEY.search(text)):
            raise UserError(f"--judge openai: {url} does not accept the key ({told}); check openai.key") from None
        if status == 403:
            raise UserError(f"--judge openai: {url} forbids this key to use {model} ({told})") from None
        if status == 404:
            raise UserError(
                f"--judge-model {model}: {url} does not know it ({told}); check the name, and the path of --base-url "
                "(often /v1)"
            ) from None
        if status in (405, 501):
            raise UserError(f"--base-url {url}: takes no chat requests ({told}); check its path (often /v1)") from None
        no_money = status == 402 or (status == 400 and _NO_MONEY.search(text))
        if no_money or getattr(error, "code", None) == "insufficient_quota":
            raise UserError(f"--judge openai: the quota of this key at {url} is spent ({told})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            pause = asked_pause(status, headers, body)
            return _Trouble(f"HTTP {status}", shown(text), pause, limited=status == 429 or pause > 0)
        raise Refused(text or f"HTTP {status}", str(getattr(error, "param", None) or "")) from None


def _what_happened(error: openai.APIConnectionError) -> str:
    """In a few words, why there is no answer; UNREACHABLE when the server cannot have seen the request."""
    if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"):
        return UNREACHABLE  # errors of the client's HTTP library
    return "timeout" if isinstance(error, openai.APITimeoutError) else "connection lost"
