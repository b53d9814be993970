"""A language model as judge, behind the API of OpenAI or of any server that speaks it.

Every verdict is kept at once (`judging/verdict_cache.py`): a run that was stopped or killed is started again and asks
only what is missing. The first question goes alone and shows which parameters the server takes
(`judging/negotiation.py`). Limits, an overloaded server and lost connections are waited out; a question that still has
no answer is FAILED. A wrong key or an unknown model ends the run in one line, and answers that are no verdicts stop it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from config.scrub import remember_url, scrubbed
from config.user_error import UserError
from utils.judging.connection import check_url
from utils.judging.cost import Budget, Price, read_prices
from utils.judging.key import KEY_FILE, KEY_NAME, find_key
from utils.judging.negotiation import Form, GaveUp, Refused, negotiate
from utils.judging.pairwise import JudgePlan, Question, Verdict
from utils.judging.prompt import messages, parse_verdict, template_hash
from utils.judging.replies import Reply, shown
from utils.judging.requests import (
    OVER_BUDGET,
    UNREACHABLE,
    JudgeOptions,
    NotAsked,
    PatientRequests,
    PauseTooLong,
)
from utils.judging.verdict_cache import VerdictCache

OPENAI_URL = "https://api.openai.com/v1"
_READINGS = 3  # requests for an answer that is not clear
_REFUSALS = 3  # questions that a server may refuse before it has answered one; then it is not about the question
_UNCLEAR_AT_FIRST = 5  # questions without a clear answer before there was any; then it is not about the question
_REFUSED = "question refused"
_OWN_TEMPERATURE = "the server's own temperature"  # the cache's variant for verdicts that are not of temperature 0

# Why an answer is not clear, and what is likely behind it when many are.
_NO_VERDICT, _EMPTY, _CUT, _WITHHELD = "no verdict", "empty", "cut short", "withheld"
_LIKELY = {
    _NO_VERDICT: "the model does not keep to the form that it is asked for; try a larger --judge-model",
    _EMPTY: "the server's chat template does not fit the model, or --judge-model is no chat model",
    _CUT: "the model thinks or repeats itself without end, or the server gives it little room",
    _WITHHELD: "the server's content filter, or a model that declines to compare",
}


class OpenAIJudge:
    """Asks a chat model at temperature 0, where it takes one, which of two answers is better; see
    `utils/judging/prompt.py` for the words.

    Identical answers are a tie that nobody is asked about. An answer that is not clear is asked for again, three times
    in all, and then UNPARSED.
    """

    def __init__(self, options: JudgeOptions) -> None:
        """Ask nobody yet; UserError without a key, or for an unusable option, environment or cache file."""
        url = (options.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        remember_url(url)
        check_url(url, "--base-url" if options.base_url is not None else "OPENAI_BASE_URL")
        _check(options)
        self.options = options
        self.url = scrubbed(url)
        key = find_key(options.key_folders)
        if key is None and url == OPENAI_URL:
            raise UserError(
                f'--judge openai: no key; write {{"{KEY_NAME}": "..."}} to {KEY_FILE} in the working folder or set '
                f"{KEY_NAME}"
            )
        known = read_prices() if options.price is None and url == OPENAI_URL else None
        self.price = Price(*options.price) if options.price else known.models.get(options.model) if known else None
        self._prices_of = f"prices of {known.as_of}" if known else "the given price"
        self.budget = Budget(self.price, options.max_cost)
        self.cache = VerdictCache(options.cache, ["openai", self.url, options.model, template_hash()])
        # A server of one's own often wants no key, but the client does.
        self._requests = PatientRequests(options, url, key.value if key else "none", self.budget)
        self._stop = self._requests.stop
        self._form = replace(Form(), temperature=None) if self.cache.variant else Form()
        self._agreed = False  # whether the server has answered in this form
        self._lock = threading.Lock()
        self._from_cache = self._failed_in_a_row = self._not_asked = self._refusals = self._clear = 0
        self._unclear_in_a_row = 0
        self._failures: Counter[str] = Counter()
        self._unclear: dict[Question, str] = {}
        self._examples: dict[str, str] = {}  # of every reason, what the server or the model said the first time
        self._stopped: str | None = None

    def describe(self) -> dict[str, Any]:
        """What was asked, how, and what came of it so far. examples: what was said, by the reasons of failures and
        unclear answers."""
        spent = self.budget.spent
        return {
            "kind": "openai",
            "model": self.options.model,
            "base_url": self.url,
            "template": template_hash(),
            "temperature": self._form.temperature,
            "response_format": self._form.response_format,
            "parameters": self._form.describe(),
            "requests": self._requests.made,
            "from_cache": self._from_cache,
            "input_tokens": self.budget.input_tokens,
            "output_tokens": self.budget.output_tokens,
            "cost_usd": None if spent is None else round(spent, 6),
            "failures": dict(self._failures),
            "unclear": dict(Counter(self._unclear.values())),
            "examples": dict(self._examples),
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
            money = f"; about ${cost:.2f} ({self._prices_of})"
        cached = len(distinct) - len(missing)
        note = f"judge {self.options.model} at {self.url}: {len(missing)} calls, {cached} answered before{money}"
        return JudgePlan(len(questions), len(missing), cached, cost, note)

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question; what was stopped, by --max-cost say, is FAILED and told by `describe`.

        Raises:
            UserError: wrong key, unknown model, a server that cannot be reached. Verdicts so far are kept.
        """
        self.cache.refresh()
        asked = dict.fromkeys(question for question in questions if question.first != question.second)
        stopped_before = self._stop.is_set()  # a limit that was reached, or a dead server, holds for later calls, too
        verdicts: dict[Question, Verdict] = {}
        missing = self._missing(asked)
        with tqdm(total=len(missing), desc=f"judge {self.options.model}", disable=not missing) as bar:
            if missing and not self._clear:
                verdicts = self._judge_alone(missing, bar)
                again = () if self._stop.is_set() else (Verdict.UNPARSED,)
                missing = [q for q in self._missing(asked) if q not in verdicts or verdicts[q] in again]
            self._from_cache += sum(q not in verdicts and self.cache.get(q) is not None for q in asked)
            verdicts |= self._judge_all({q: _READINGS - (q in verdicts) for q in missing}, bar)
        if self._stop.is_set() and not stopped_before:
            print(f"warning: {self._stopped}; verdicts so far are kept in {self.cache.path}", file=sys.stderr)
        same = {question: Verdict.TIE for question in questions if question.first == question.second}
        verdicts = {question: self.cache.get(question) for question in asked} | same | verdicts
        return [verdicts[question] for question in questions]

    def _missing(self, questions: Sequence[Question] | Mapping[Question, None]) -> list[Question]:
        return [question for question in questions if self.cache.get(question) is None]

    def _judge_alone(self, questions: Sequence[Question], bar: tqdm) -> dict[Question, Verdict]:
        """One question after the other, each asked once, until one is clear: that shows a wrong key, what the server
        takes, and whether its answers are verdicts, before many are asked at a time."""
        verdicts: dict[Question, Verdict] = {}
        for question in questions:
            verdict = verdicts[question] = self._verdict(question, 1)
            if self._failures[UNREACHABLE]:
                why = self._examples.get(UNREACHABLE)
                raise UserError(
                    f"--judge openai: {self.url} {UNREACHABLE}{f' ({why})' if why else ''}; verdicts so far are kept"
                )
            bar.update(verdict is not Verdict.UNPARSED)
            failed = sum(found is Verdict.FAILED for found in verdicts.values())
            if verdict.clear or self._stop.is_set() or failed == _REFUSALS:
                break
        if self._agreed and self._form.max_tokens > Form().max_tokens:
            self._tell_cost(len(questions) - len(verdicts))
        return verdicts

    def _judge_all(self, readings: Mapping[Question, int], bar: tqdm) -> dict[Question, Verdict]:
        """Many at a time; `readings` says how often each may be asked."""
        verdicts = {}
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            waiting = {pool.submit(self._verdict, question, often): question for question, often in readings.items()}
            try:
                for future in as_completed(waiting):
                    verdicts[waiting[future]] = future.result()
                    bar.update()
            except BaseException:
                self._stop.set()  # Ctrl-C among others: nothing new is asked; what is in flight is paid for, and kept
                raise
        return verdicts

    def _verdict(self, question: Question, readings: int) -> Verdict:
        """Ask until the answer is clear; what is clear is kept at once."""
        try:
            for _ in range(readings):
                reply = self._ask(question)
                verdict = parse_verdict(reply.text) if reply.readable else Verdict.UNPARSED
                if verdict.clear or reply.cut:  # an answer without end is not asked for again
                    break
        except (GaveUp, NotAsked) as why:
            self._note_failure(why)
            return Verdict.FAILED
        except UserError:
            self._stop.set()  # here, and not where the result is looked at: nothing is to be asked meanwhile
            raise
        self._note_answer(question, verdict, reply)
        self.cache.add(question, verdict)
        return verdict

    def _ask(self, question: Question) -> Reply:
        """One answer, with more room where it was cut short; raises what `send` does, but Refused."""
        if self._stop.is_set():
            raise NotAsked("stopped")
        chat, form = messages(question), self._form
        try:
            if self._agreed:
                reply = self._sent_twice(chat, form)
            else:

                def ask(form: Form, patient: bool) -> Reply:
                    return self._requests.send(chat, form, None if patient else 2)

                form, reply = negotiate(form, ask, server_errors=not self._failures)
                self._agree(form)
        except Refused as error:
            self._note_refusal(error)
            raise GaveUp(_REFUSED, shown(error.text)) from None
        while reply.cut and (wider := form.wider()) is not None:
            try:
                reply, form = self._requests.send(chat, wider), wider
            except Refused:  # the server has no more room
                break
            self._give_room(form.max_tokens)
        return reply

    def _sent_twice(self, chat: Sequence[dict[str, str]], form: Form) -> Reply:
        try:
            return self._requests.send(chat, form)
        except Refused:  # it may have been a passing fault
            return self._requests.send(chat, form)

    def _agree(self, form: Form) -> None:
        """Hold this form from now on. Verdicts at another temperature are other verdicts."""
        if (told := form.told()) and not self._agreed:
            print(f"note: {self.url} does not take every parameter: {told}", file=sys.stderr)
        self._form, self._agreed = form, True
        self.cache.variant = _OWN_TEMPERATURE if form.temperature is None else ""

    def _give_room(self, max_tokens: int) -> None:
        with self._lock:
            if max_tokens <= self._form.max_tokens:
                return
            print(
                f"note: {self.options.model} needs more than {self._form.max_tokens} tokens for an answer; from now on "
                f"it may write {max_tokens}"
                + (f", at most ${self.price.of(0, max_tokens):.4f} an answer" if self.price else ""),
                file=sys.stderr,
            )
            self._form = replace(self._form, max_tokens=max_tokens)

    def _tell_cost(self, left: int) -> None:
        """Thoughts before the verdict were in no estimate: say what one more answer like the last is likely to cost."""
        tokens = self._requests.last_output_tokens
        if not left or tokens is None:
            return
        money = f", about ${self.price.of(0, tokens * left):.2f}" if self.price else ""
        print(
            f"note: the answer so far took {tokens} output tokens; {left} more like it: {tokens * left:,}{money}; "
            "Ctrl-C stops, --max-cost limits",
            file=sys.stderr,
        )

    def _note_answer(self, question: Question, verdict: Verdict, reply: Reply) -> None:
        """Count what is clear and what is not, and stop at too many in a row that are not."""
        with self._lock:
            self._failed_in_a_row = 0
            if verdict.clear:
                self._clear, self._unclear_in_a_row = self._clear + 1, 0
                self._unclear.pop(question, None)
                return
            why = _CUT if reply.cut else _WITHHELD if reply.withheld else _NO_VERDICT if reply.text.strip() else _EMPTY
            self._unclear_in_a_row += question not in self._unclear
            self._unclear[question] = why
            said = self._examples.setdefault(why, shown(reply.text))
            most = self.options.give_up_after if self._clear else min(_UNCLEAR_AT_FIRST, self.options.give_up_after)
            if self._unclear_in_a_row >= most and not self._stop.is_set():
                self._stopped = (
                    f"stopped after {self._unclear_in_a_row} questions in a row without a clear answer ({why}); one "
                    f"answer was: {said or '(nothing)'}; likely: {_LIKELY[why]}"
                )
                self._stop.set()

    def _note_refusal(self, error: Refused) -> None:
        told = shown(error.text)
        with self._lock:
            self._refusals += 1
            if not self._agreed and (self._refusals >= _REFUSALS or error.of_the_model):
                raise UserError(f"--judge-model {self.options.model}: {self.url} refuses every question: {told}")
            if self._refusals == 1:
                print(f"warning: {self.url} refuses a question: {told}", file=sys.stderr)

    def _note_failure(self, why: GaveUp | NotAsked) -> None:
        """Count it, and stop at a spent budget or at too many in a row."""
        with self._lock:
            if isinstance(why, NotAsked):
                self._not_asked += 1
                if str(why) == OVER_BUDGET:
                    self._stopped = f"stopped before --max-cost ${self.options.max_cost:g} would be passed"
            else:
                self._failures[str(why)] += 1
                self._examples.setdefault(str(why), why.text)
                self._failed_in_a_row = count = self._failed_in_a_row + 1
                told = f"{why}: {why.text}" if why.text else str(why)
                if isinstance(why, PauseTooLong):
                    self._stopped = f"stopped: {self.url} {told}, longer than --max-wait {self.options.max_wait:g}"
                elif str(why) == _REFUSED and not self._agreed:
                    pass  # `_note_refusal` ends the run before long
                elif count >= self.options.give_up_after and not self._stop.is_set():
                    self._stopped = f"stopped after {count} questions in a row without an answer ({told})"
            if self._stopped:
                self._stop.set()


def _check(options: JudgeOptions) -> None:
    if not options.model.strip():
        raise UserError("--judge-model: give the model's name")
    if options.concurrency < 1:
        raise UserError(f"--concurrency {options.concurrency}: must be at least 1")
    if options.price is not None and not (len(options.price) == 2 and min(options.price) >= 0):
        raise UserError(f"--judge-price {options.price}: give two numbers of at least 0")
