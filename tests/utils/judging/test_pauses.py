"""Pauses that a server asks for: every form of asking, one pause for all threads, told once, ended at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate

import pytest

from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Question, Verdict
from utils.judging.pauses import Pauses, asked_pause
from utils.judging.requests import JudgeOptions
from utils.runs.folder import REPO


class Clock:
    """Time that passes only in sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> bool:
        until = self.now + seconds
        if seconds > 1:
            time.sleep(0.3)  # as all threads wait side by side
        with self.lock:
            self.slept.append(seconds)
            self.now = max(self.now, until)
        return False


@pytest.mark.parametrize(
    ("headers", "text", "seconds"),
    [
        ({}, "", 0),
        ({"retry-after": "7"}, "", 7),
        ({"retry-after": "1.5"}, "", 1.5),
        ({"retry-after": "300"}, "", 300),
        ({"retry-after-ms": "250"}, "", 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
        ({"retry-after": "-3"}, "", 0),
        ({"retry-after": "soon"}, "", 0),
        ({"retry-after": "nan"}, "", 0),
        ({"retry-after": "inf"}, "", 0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, "", 0),
        ({"x-ratelimit-reset-requests": "6m0s"}, "", 360),
        ({"x-ratelimit-reset-requests": "1h2m3.5s"}, "", 3723.5),
        ({"x-ratelimit-reset-tokens": "350ms"}, "", 0.35),
        ({"x-ratelimit-reset-tokens": "2s", "x-ratelimit-reset-requests": "20s"}, "", 20),
        (
            {
                "x-ratelimit-reset-tokens": "2s", "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-requests": "20s", "x-ratelimit-remaining-requests": "5",
            }, "", 2,
        ),
        ({"ratelimit-reset": "12"}, "", 12),
        ({"X-RateLimit-Reset": "12"}, "", 12),
        ({"retry-after": "3", "x-ratelimit-reset-requests": "20s"}, "", 3),
        ({}, "Rate limit reached for gpt in org. Please try again in 20s. Visit", 20),
        ({}, "Please try again in 1m26.4s", 86.4),
        ({}, "please retry in 34.5 seconds", 34.5),
        ({}, '{"error": {"details": [{"retryDelay": "34s"}]}}', 34),
        ({}, "You have sent 20s requests", 0),
    ],
)  # fmt: skip
def test_every_form_of_asking(headers, text, seconds):
    assert asked_pause(429, headers, text) == pytest.approx(seconds)


def test_dates_and_times_since_1970():
    then = time.time() + 100
    for value in (formatdate(then, usegmt=True), (datetime.now(UTC) + timedelta(seconds=100)).isoformat()):
        assert 98 < asked_pause(429, {"retry-after": value}) <= 100
    for value in (f"{then:.0f}", f"{then * 1000:.0f}"):
        assert 98 < asked_pause(429, {"x-ratelimit-reset": value}) < 102
    assert 98 < asked_pause(429, {"anthropic-ratelimit-requests-reset": formatdate(then, usegmt=True)}) <= 100


def test_limits_are_read_from_a_429_alone():
    """OpenAI's headers tell of its limits with every answer."""
    assert asked_pause(500, {"x-ratelimit-reset-requests": "6m0s"}, "try again in 20s") == 0
    assert asked_pause(503, {"retry-after": "5"}) == 5


def test_a_pause_holds_everyone_and_is_told_once(capsys):
    pauses, clock = Pauses("http://x", 3600, threading.Event()), Clock()
    pauses.clock, pauses.sleep = clock, clock.sleep
    for _ in range(5):
        pauses.ask(300)
    assert pauses.wait() and clock.slept == [300] and pauses.wait() and clock.slept == [300, 0]
    assert capsys.readouterr().err.count("asks for a pause of 300 s") == 1
    for seconds in (5, 100, 400):
        pauses.ask(seconds)
    assert capsys.readouterr().err == ""
    pauses.ask(900)
    assert capsys.readouterr().err.count("pause of 900 s") == 1


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    defaults = dict(model="judge-1", base_url=server.url, cache=tmp_path / "cache.jsonl", key_folders=(), timeout=5.0)

    def judge(**options):
        made = OpenAIJudge(JudgeOptions(**{**defaults, **options}))
        made.clock = made._requests.pauses.clock = Clock()
        made._requests.pauses.sleep = made.clock.sleep
        return made

    return judge


@pytest.mark.parametrize("headers", [{"Retry-After": "300"}, {"retry-after-ms": "300000"}, {"X-RateLimit-Reset": "5m"}])
def test_a_pause_of_minutes_is_waited_for_by_all_and_told_once(make, server, capsys, headers):
    judge = make()
    judge.judge([Question("warm", "a", "bb")])
    server.limited, server.headers = 4, headers
    assert judge.judge([Question(f"p{i}", "a", "bb") for i in range(12)]) == [Verdict.SECOND] * 12
    assert 299 < max(judge.clock.slept) <= 300
    assert capsys.readouterr().err.count("asks for a pause of 300 s") == 1


def test_a_longer_pause_than_max_wait_stops_the_run(make, server, capsys):
    server.limited, server.retry_after = 99, "7200"
    judge = make(concurrency=1)
    verdicts = judge.judge([Question(f"p{i}", "a", "bb") for i in range(12)])
    assert verdicts == [Verdict.FAILED] * 12 and server.requests == 1 and max(judge.clock.slept) == 0
    assert "asked to wait 7200 s" in judge.describe()["stopped"] and "--max-wait 3600" in capsys.readouterr().err


SCRIPT = """
import sys
from pathlib import Path
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Question
from utils.judging.requests import JudgeOptions

judge = OpenAIJudge(JudgeOptions(model="m", base_url=sys.argv[1], cache=Path(sys.argv[2]), key_folders=()))
try:
    judge.judge([Question(f"p{i}", "a", "bb") for i in range(20)])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("answered", [0, 5])
def test_ctrl_c_ends_a_long_pause_at_once(server, tmp_path, answered):
    """Before the first answer, when one thread waits, and later, when all do."""
    server.retry_after = "600"
    server.limited = 99 if not answered else 0

    def answer(texts):
        server.limited = 99 if server.requests >= answered else 0
        return '{"winner": "A"}'

    server.answer = answer
    env = {**os.environ, "PYTHONPATH": str(REPO / "src"), "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache.jsonl")], env=env, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    told = ""
    while "pause of 600 s" not in told:
        told += process.stderr.read(1)
    time.sleep(0.1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - start < 10
    assert server.requests < answered + 12
