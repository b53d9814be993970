"""A language model as judge, behind the API of OpenAI or of any server that speaks it.

Every verdict is kept at once (`judging/verdict_cache.py`): a run that was stopped or killed is started again and asks
only what is missing. Limits, an overloaded server and lost connections are waited out; a question that still has no
answer is FAILED. A wrong key or an unknown model ends the run in one line.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from config.scrub import remember_url, scrubbed
from config.user_error import UserError
from utils.judging.cost import PRICES, PRICES_OF, Budget, Price
from utils.judging.key import KEY_FILE, KEY_NAME, find_key
from utils.judging.pairwise import JudgePlan, Question, Verdict
from utils.judging.prompt import RESPONSE_FORMATS, TEMPERATURE, messages, parse_verdict, template_hash
from utils.judging.requests import (
    OVER_BUDGET,
    UNREACHABLE,
    GaveUp,
    JudgeOptions,
    NotAsked,
    PatientRequests,
    Refused,
)
from utils.judging.verdict_cache import VerdictCache

OPENAI_URL = "https://api.openai.com/v1"
_MAX_TOKENS = 64
_READINGS = 3  # requests for an answer that is not clear
_REFUSALS = 3  # questions that a server may refuse before it has answered one; then it is not about the question


class OpenAIJudge:
    """Asks a chat model at temperature 0 which of two answers is better; see `utils/judging/prompt.py` for the words.

    Identical answers are a tie that nobody is asked about. An answer that is not clear is asked for again, three times
    in all, and then UNPARSED.
    """

    def __init__(self, options: JudgeOptions) -> None:
        """Ask nobody yet; UserError without a key, or for an unusable option or cache file."""
        url = (options.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        remember_url(url)
        _check(options)
        self.options = options
        self.url = scrubbed(url)
        key = find_key(options.key_folders)
        if key is None and url == OPENAI_URL:
            raise UserError(
                f'--judge openai: no key; write {{"{KEY_NAME}": "..."}} to {KEY_FILE} in the working folder or set '
                f"{KEY_NAME}"
            )
        prices = options.price or (PRICES.get(options.model) if url == OPENAI_URL else None)
        self.price = Price(*prices) if prices else None
        self.budget = Budget(self.price, options.max_cost)
        self.cache = VerdictCache(options.cache, ["openai", self.url, options.model, template_hash()])
        # A server of one's own often wants no key, but the client does.
        self._requests = PatientRequests(options, url, key.value if key else "none", self.budget)
        self._stop = self._requests.stop
        self._formats = list(RESPONSE_FORMATS)  # those that the server may still turn out to take, best first
        self._lock = threading.Lock()
        self._answers = self._from_cache = self._failed_in_a_row = self._not_asked = self._refusals = 0
        self._failures: Counter[str] = Counter()
        self._stopped: str | None = None

    def describe(self) -> dict[str, Any]:
        """What was asked, how, and what came of it so far."""
        spent = self.budget.spent
        return {
            "kind": "openai",
            "model": self.options.model,
            "base_url": self.url,
            "template": template_hash(),
            "temperature": TEMPERATURE,
            "response_format": self._formats[0],
            "requests": self._requests.made,
            "from_cache": self._from_cache,
            "input_tokens": self.budget.input_tokens,
            "output_tokens": self.budget.output_tokens,
            "cost_usd": None if spent is None else round(spent, 6),
            "failures": dict(self._failures),
            "not_asked": self._not_asked,
            "stopped": self._stopped,
        }

    def plan(self, questions: Sequence[Question]) -> JudgePlan:
        """Calls that are not in the cache, and an estimate of what they cost."""
        distinct = [question for question in dict.fromkeys(questions) if question.first != question.second]
        missing = [question for question in distinct if self.cache.get(question) is None]
        cost, money = (0.0, "") if not missing else (None, "; the price is not known")
        if missing and self.price:
            cost = sum(self.price.estimate("".join(m["content"] for m in messages(q))) for q in missing)
            money = f"; about ${cost:.2f} ({'the given price' if self.options.price else f'prices of {PRICES_OF}'})"
        cached = len(distinct) - len(missing)
        note = f"judge {self.options.model} at {self.url}: {len(missing)} calls, {cached} answered before{money}"
        return JudgePlan(len(questions), len(missing), cached, cost, note)

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question; what was stopped, by --max-cost say, is FAILED and told by `describe`.

        Raises:
            UserError: wrong key, unknown model, a server that cannot be reached. Verdicts so far are kept.
        """
        self.cache.refresh()
        verdicts = {q: Verdict.TIE if q.first == q.second else self.cache.get(q) for q in questions}
        missing = [question for question, verdict in verdicts.items() if verdict is None]
        self._from_cache += sum(v is not None and q.first != q.second for q, v in verdicts.items())
        stopped_before = self._stop.is_set()  # a limit that was reached, or a dead server, holds for later calls, too
        with tqdm(total=len(missing), desc=f"judge {self.options.model}", disable=not missing) as bar:
            if missing and not self._answers:  # the first alone: it shows a wrong key, and what the server takes
                first = missing.pop(0)
                verdicts[first] = self._verdict(first)
                bar.update()
                if self._failures[UNREACHABLE]:
                    raise UserError(f"--judge openai: {self.url} {UNREACHABLE}; verdicts so far are kept")
            verdicts |= self._judge_all(missing, bar)
        if self._stop.is_set() and not stopped_before:
            print(f"warning: {self._stopped}; verdicts so far are kept in {self.cache.path}", file=sys.stderr)
        return [verdicts[question] for question in questions]

    def _judge_all(self, questions: Sequence[Question], bar: tqdm) -> dict[Question, Verdict]:
        verdicts = {}
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            waiting = {pool.submit(self._verdict, question): question for question in questions}
            try:
                for future in as_completed(waiting):
                    verdicts[waiting[future]] = future.result()
                    bar.update()
            except BaseException:
                self._stop.set()  # Ctrl-C among others: nothing new is asked; what is in flight is paid for, and kept
                raise
        return verdicts

    def _verdict(self, question: Question) -> Verdict:
        """Ask until the answer is clear; what is clear is kept at once."""
        verdict = Verdict.UNPARSED
        try:
            for _ in range(_READINGS):
                if (verdict := parse_verdict(self._ask(question))).clear:
                    break
        except (GaveUp, NotAsked) as why:
            self._note_failure(why)
            return Verdict.FAILED
        except UserError:
            self._stop.set()  # here, and not where the result is looked at: nothing is to be asked meanwhile
            raise
        with self._lock:
            self._failed_in_a_row = 0
        self.cache.add(question, verdict)
        return verdict

    def _ask(self, question: Question) -> str:
        """The text of one answer, "" for one that was cut short or withheld; raises what `send` does, but Refused."""
        if self._stop.is_set():
            raise NotAsked("stopped")
        formats = self._formats
        for i, name in enumerate(formats):
            try:
                text = self._requests.send(
                    messages=messages(question), response_format=RESPONSE_FORMATS[name], max_tokens=_MAX_TOKENS,
                    temperature=TEMPERATURE,
                )  # fmt: skip
            except Refused as error:
                if self._answers or name == "text":  # not the format: it is the question that the server refuses
                    self._note_refusal(str(error))
                    raise GaveUp("question refused") from None
                continue
            with self._lock:
                if i and not self._answers:
                    print(f"note: {self.url} does not take {formats[0]}; asking for {name} instead", file=sys.stderr)
                    self._formats = formats[i:]
                self._answers += 1
            return text
        raise AssertionError("the last format returns or raises")

    def _note_refusal(self, message: str) -> None:
        with self._lock:
            self._refusals += 1
            if self._refusals >= _REFUSALS and not self._answers:
                raise UserError(f"--judge-model {self.options.model}: {self.url} refuses every question: {message}")
            if self._refusals == 1:
                print(f"warning: {self.url} refuses a question: {message}", file=sys.stderr)

    def _note_failure(self, why: GaveUp | NotAsked) -> None:
        """Count it, and stop at a spent budget or at too many in a row."""
        with self._lock:
            if isinstance(why, NotAsked):
                self._not_asked += 1
                if str(why) == OVER_BUDGET:
                    self._stopped = f"stopped before --max-cost ${self.options.max_cost:g} would be passed"
            else:
                self._failures[str(why)] += 1
                self._failed_in_a_row = count = self._failed_in_a_row + 1
                if count >= self.options.give_up_after and not self._stop.is_set():
                    self._stopped = f"stopped after {count} questions in a row without an answer ({why})"
            if self._stopped:
                self._stop.set()


def _check(options: JudgeOptions) -> None:
    if not options.model.strip():
        raise UserError("--judge-model: give the model's name")
    if options.base_url is not None and urlsplit(options.base_url).scheme not in ("http", "https"):
        raise UserError(f"--base-url {scrubbed(options.base_url)}: must begin with http:// or https://")
    if options.concurrency < 1:
        raise UserError(f"--concurrency {options.concurrency}: must be at least 1")
    if options.price is not None and not (len(options.price) == 2 and min(options.price) >= 0):
        raise UserError(f"--judge-price {options.price}: give two numbers of at least 0")
