"""A language model as judge, over real HTTP: `judge_server.py` is the model, the real client asks it."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from judge_server import JudgeServer

from config.user_error import UserError
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Comparison, Question, Verdict, both_orders, compare, tally
from utils.judging.requests import JudgeOptions
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

KEY = "sk-test-0123456789abcdef"
FIRST, SECOND, TIE, UNPARSED, FAILED = Verdict


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    """`make(concurrency=1, ...)`: a new judge on the server, with short waits; as a new process would make it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_key(tmp_path)
    defaults = dict(
        model="judge-1", base_url=server.url, cache=tmp_path / "cache.jsonl", key_folders=(tmp_path,),
        first_wait=0.01, longest_wait=1.0, max_wait=5.0, max_attempts=3, timeout=5.0,
    )  # fmt: skip
    return lambda **options: OpenAIJudge(JudgeOptions(**{**defaults, **options}))


def write_key(folder: Path) -> None:
    file = folder / "openai.key"
    file.write_text(json.dumps({"OPENAI_API_KEY": KEY}))
    file.chmod(0o600)


def systems(n: int) -> tuple[list[str], list[str], list[str]]:
    """n prompts; a's answers are longer than b's in two of three."""
    prompts = [f"\n\nHuman: question {i}?\n\nAssistant:" for i in range(n)]
    return (
        prompts,
        [f" answer {i} of a" + " more" * (i % 3) for i in range(n)],
        [f" answer {i} of b " + "x" for i in range(n)],
    )


def run(judge: OpenAIJudge, n: int = 6) -> Comparison:
    return compare("a", "b", *systems(n), judge)


def test_a_judge_that_prefers_longer_answers(make, server):
    judge = make()
    prompts, a, b = systems(8)  # an eighth is exact in binary
    result = compare("a", "b", prompts, a, b, judge)
    assert result.scores.tolist() == [float(len(x.strip()) > len(y.strip())) for x, y in zip(a, b)]
    assert (result.consistency, result.first_position_rate, result.n) == (1.0, 0.5, 8)
    assert server.requests == len(server.asked) == 16
    swapped = compare("b", "a", prompts, b, a, judge)
    assert swapped.win_rate == 1 - result.win_rate and server.requests == 16


@pytest.mark.parametrize(("behaviour", "rate"), [("first", 1.0), ("second", 0.0), ("quoted", 1.0)])
def test_a_judge_of_positions_decides_nothing(make, server, behaviour, rate):
    server.behaviour = behaviour
    result = run(make())
    assert (result.win_rate, result.consistency, result.first_position_rate) == (0.5, 0.0, rate)
    assert (result.n, result.unparsed, result.failed) == (6, 0, 0)


def test_ties(make, server):
    server.behaviour = "ties"
    result = run(make())
    assert (result.win_rate, result.ties, result.consistency, result.first_position_rate) == (0.5, 6, 1.0, None)


def test_what_is_sent(make, server):
    prompts, a, b = systems(1)
    compare("secret-name-a", "secret-name-b", prompts, [a[0] + "<|endoftext|>"], b, make())
    assert set(server.asked) == {
        ("Human: question 0?\n\nAssistant:", "answer 0 of a", "answer 0 of b x"),
        ("Human: question 0?\n\nAssistant:", "answer 0 of b x", "answer 0 of a"),
    }
    for body in server.bodies:
        assert (body["temperature"], body["model"], body["response_format"]["type"]) == (0.0, "judge-1", "json_schema")
        assert "secret-name" not in json.dumps(body)
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("behaviour", "reason", "requests"), [("garbage", "no verdict", 4 * 3), ("cut", "cut short", 4 * 2 + 3)]
)
def test_unclear_answers_are_asked_again_then_counted_apart_and_never_kept(make, server, behaviour, reason, requests):
    server.behaviour = behaviour
    judge = make()
    result = run(judge, 2)
    assert (result.n, result.unparsed, result.failed, result.win_rate) == (0, 2, 0, None)
    assert server.requests == requests
    assert judge.describe()["failures"] == {} and judge.describe()["unclear"] == {reason: 4}
    assert not judge.cache.path.exists()
    server.behaviour = "longer"
    assert run(make(), 2).n == 2 and server.requests == requests + 4


def test_a_second_reading_may_be_clear(make, server):
    said = []

    def answer(texts):
        said.append(texts)
        return '{"winner": "A"}' if said.count(texts) == 3 else "well"

    server.answer = answer
    result = run(make(), 2)
    assert (result.n, result.unparsed, server.requests) == (2, 0, 12)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("500", "HTTP 500"),
        ("hang-up", "connection lost"),
        ("bad-json", "unreadable response"),
    ],
)
def test_no_answer_is_counted_apart_and_never_kept(make, server, behaviour, reason):
    server.behaviour = behaviour
    judge = make(max_attempts=2, give_up_after=100)
    result = run(judge, 3)
    assert (result.n, result.unparsed, result.failed, result.win_rate) == (0, 0, 3, None)
    first = 2 + 4 * (behaviour == "500")  # a 500 may come of the response format: two others are tried
    assert sorted(server.asked.values()) == [2] * 5 + [first] and judge.describe()["failures"] == {reason: 6}
    assert not judge.cache.path.exists()
    server.behaviour = "longer"
    assert run(make(), 3).n == 3


def test_some_answers_and_some_failures(make, server):
    run(make(), 2)
    server.behaviour = "500"
    judge = make(max_attempts=1)
    result = run(judge, 5)
    assert (result.n, result.failed, result.win_rate is None) == (2, 3, False)
    assert judge.describe()["from_cache"] == 4


def test_a_dead_server_is_not_asked_for_ever(make, server, capsys):
    server.behaviour = "500"
    judge = make(max_attempts=2, give_up_after=5, concurrency=2)
    result = run(judge, 20)
    figures = judge.describe()
    assert result.failed == 20 and server.requests <= 2 * (5 + 1) + 4
    assert figures["not_asked"] + sum(figures["failures"].values()) == 40 and figures["not_asked"] >= 34
    assert "5 questions in a row" in figures["stopped"] and "5 questions in a row" in capsys.readouterr().err
    before = server.requests
    assert run(judge, 20).failed == 20 and server.requests == before
    assert "warning" not in capsys.readouterr().err  # said once


@pytest.mark.parametrize("trouble", ["limited", "flaky"])
def test_passing_trouble_is_waited_out(make, server, trouble):
    setattr(server, trouble, 5)
    result = run(make(max_attempts=6))
    assert (result.n, result.failed, server.requests) == (6, 0, 12 + 5)


def test_waits_double(make, server):
    server.flaky = 4
    make(max_attempts=5, first_wait=0.04).judge([Question("p", "a", "bb")])
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:])]
    for i, wait in enumerate(waits):
        assert 0.5 * 0.04 * 2**i <= wait < 0.04 * 2**i + 0.25


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(make, server, form):
    server.limited, server.retry_after = 1, "0.4"
    judge = make(first_wait=0.001, longest_wait=5.0)
    moment = int(time.time() + 3)
    at = time.monotonic() + moment - time.time()
    if form == "date":
        server.retry_after = formatdate(moment, usegmt=True)
    assert judge.judge([Question("p", "a", "bb")]) == [SECOND]
    assert server.times[1] >= (server.times[0] + 0.4 if form == "seconds" else at - 0.01)


def test_a_limit_on_one_request_holds_the_others(make, server):
    judge = make(concurrency=4, longest_wait=1.0)
    judge.judge([Question("warm", "a", "bb")])
    server.times.clear()
    server.limited, server.retry_after = 4, "0.3"
    assert FAILED not in judge.judge([Question(f"p{i}", "a", "bb") for i in range(12)])
    start = server.times[0]
    assert sum(t - start < 0.3 for t in server.times) <= 4


def test_a_pause_longer_than_the_longest_wait_is_not_waited_for(make, server):
    server.limited, server.retry_after = 99, "3600"
    judge = make()
    start = time.monotonic()
    assert judge.judge([Question("p", "a", "b")]) == [FAILED]
    assert time.monotonic() - start < 2 and judge.describe()["failures"] == {"asked to wait 3600 s": 1}


def test_slow_answers_time_out(make, server):
    server.delay = 0.3
    judge = make(timeout=0.1, max_attempts=2)
    assert judge.judge([Question("p", "a", "b")]) == [FAILED]
    assert judge.describe()["failures"] == {"timeout": 1} and server.requests == 2


def test_requests_at_a_time_stay_below_the_limit_and_reach_it(make, server):
    server.delay = 0.05
    run(make(concurrency=3), 8)
    assert server.most_at_once == 3


def test_servers_without_schemas_are_asked_in_a_simpler_way(make, server, capsys):
    server.refused_formats = {"json_schema"}
    judge = make()
    assert run(judge).n == 6
    types = [body["response_format"]["type"] for body in server.bodies]
    # Twice, as a fault may pass, and once more after the other was taken: the error named nothing.
    assert types[:4] == ["json_schema"] * 2 + ["json_object", "json_schema"] and types[4:] == ["json_object"] * 11
    assert "json_object" in capsys.readouterr().err and judge.describe()["response_format"] == "json_object"


def test_servers_with_plain_text_only(make, server):
    server.refused_formats, server.behaviour = {"json_schema", "json_object"}, "quoted"
    assert run(make()).n == 6 and server.requests == 12 + 5


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("401", "openai.key"),
        ("403", "forbids"),
        ("404", "--judge-model judge-1"),
        ("400", "--judge-model judge-1"),
        ("quota", "quota"),
    ],
)
def test_what_cannot_succeed_is_one_line_at_the_first_call(make, server, behaviour, words):
    server.behaviour = behaviour
    with pytest.raises(UserError, match=words) as error:
        run(make())
    assert "\n" not in str(error.value) and KEY not in str(error.value)
    assert server.requests <= (3 * 9 if behaviour == "400" else 1)


def test_one_question_that_the_server_refuses_is_its_own_affair(make, server, capsys):
    judge = make()
    run(judge, 2)
    server.behaviour = "400"
    assert judge.judge([Question("p", "a", "b")]) == [FAILED]
    assert judge.describe()["failures"] == {"question refused": 1}
    shown = capsys.readouterr().err
    assert "went wrong" in shown and KEY not in shown


def test_a_key_that_is_withdrawn_half_way_ends_the_run_and_keeps_what_is_done(make, server):
    answered = []

    def answer(texts):
        answered.append(texts)
        if len(answered) == 5:
            server.behaviour, server.answer = "401", None
        return '{"winner": "A"}'

    server.answer = answer
    with pytest.raises(UserError, match="does not accept the key"):
        run(make(concurrency=1))
    assert server.requests == 6
    server.behaviour = "first"
    assert run(make()).n == 6 and server.requests == 6 + 12 - 5


def test_a_server_that_is_not_there(make):
    judge = make(base_url="http://127.0.0.1:9/v1", max_attempts=2, max_cost=1.0, price=(1.0, 1.0))
    with pytest.raises(UserError, match="127.0.0.1:9/v1 cannot be reached"):
        run(judge)
    assert judge.describe()["requests"] == 2 and judge.describe()["cost_usd"] == 0


def test_nothing_is_asked_twice(make, server):
    run(make(), 4)
    judge = make()
    assert judge.plan(both_orders(*systems(6))).calls == 4 and judge.plan(both_orders(*systems(6))).cached == 8
    run(judge, 6)
    assert server.requests == 12 and set(server.asked.values()) == {1}
    assert judge.judge([Question("p", "a", "bb")] * 5) == [SECOND] * 5 and server.requests == 13


def test_another_model_or_server_is_another_judge(make, server):
    run(make(), 2)
    run(make(model="judge-2"), 2)
    run(make(base_url=server.url.replace("127.0.0.1", "localhost")), 2)
    assert server.requests == 12


def test_identical_answers_are_a_tie_that_costs_nothing(make, server):
    judge = make()
    assert judge.plan([Question("p", "a", "a")]).calls == 0
    assert judge.judge([Question("p", "a", "a")]) == [TIE] and server.requests == 0


def test_the_plan_asks_nobody_and_says_what_it_would_cost(make, server):
    questions = both_orders(*systems(5))
    plan = make(price=(1.0, 2.0)).plan(questions)
    assert (plan.questions, plan.calls, plan.cached) == (10, 10, 0) and "10 calls" in plan.note
    unknown = make().plan(questions)
    assert unknown.cost is None and "not known" in unknown.note and server.requests == 0
    used = sum(len(m["content"]) for m in _bodies(make, server, questions)) / 4 / 1e6
    assert used < plan.cost < 3 * used
    done = make().plan(questions)
    assert (done.calls, done.cached, done.cost) == (0, 10, 0.0) and "0 calls" in done.note


def _bodies(make, server: JudgeServer, questions: list[Question]) -> list[dict[str, str]]:
    make().judge(questions)
    return [message for body in server.bodies for message in body["messages"]]


def test_cost_is_added_up_from_what_the_server_reports(make, server):
    judge = make(price=(1.0, 10.0))
    run(judge, 3)
    figures = judge.describe()
    assert (figures["requests"], figures["input_tokens"], figures["output_tokens"]) == (6, 2400, 36)
    assert figures["cost_usd"] == pytest.approx((2400 + 360) / 1e6)


def test_a_price_holds_for_openais_own_server_only(make):
    assert make(model="gpt-4o").price is None
    assert make(model="gpt-4o", base_url="https://api.openai.com/v1").price is not None


@pytest.mark.parametrize("usage", [(1000, 10), None])
def test_max_cost_stops_before_it_is_passed_and_keeps_what_is_done(make, server, capsys, usage):
    server.usage = usage
    judge = make(price=(1.0, 1.0), max_cost=0.015, concurrency=4)
    result = run(judge, 20)
    figures = judge.describe()
    assert 0 < result.n < 20 and result.failed == 20 - result.n and figures["cost_usd"] <= 0.015
    assert server.requests == 40 - figures["not_asked"] and figures["failures"] == {}
    assert "--max-cost" in figures["stopped"] and "--max-cost" in capsys.readouterr().err
    before = server.requests
    assert run(make(), 20).n == 20 and server.requests == 40 and before > 0


def test_max_cost_needs_a_price(make):
    with pytest.raises(UserError, match="--max-cost"):
        make(max_cost=1.0)


@pytest.mark.parametrize(
    ("options", "flag"),
    [(dict(model=" "), "--judge-model"), (dict(base_url="localhost:8000"), "--base-url"),
     (dict(concurrency=0), "--concurrency"), (dict(price=(1.0,)), "--judge-price"),
     (dict(price=(-1.0, 1.0)), "--judge-price")]
)  # fmt: skip
def test_bad_options_name_their_flag(make, options, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        make(**options)


def test_no_key(make, tmp_path, server):
    (tmp_path / "openai.key").unlink()
    with pytest.raises(UserError, match="--judge openai: no key; .*openai.key.*OPENAI_API_KEY"):
        make(base_url=None)
    assert run(make(), 1).n == 1  # a server of one's own
    assert server.keys == {"Bearer none"}


def test_secrets_in_the_url_are_not_shown(make, server):
    judge = make(base_url=server.url.replace("http://", "http://user:hidden@") + "?token=hidden")
    plan = judge.plan([Question("p", "a", "b")])
    assert "hidden" not in json.dumps(judge.describe()) + plan.note
    with pytest.raises(UserError) as error:
        make(base_url="ftp://user:hidden@host?token=hidden")
    assert "hidden" not in str(error.value)


SCRIPT = """
import sys
from pathlib import Path
from config.user_error import run_main
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import compare
from utils.judging.requests import JudgeOptions

def main():
    folder = Path(sys.argv[2])
    judge = OpenAIJudge(JudgeOptions(
        model="judge-1", base_url=sys.argv[1], cache=folder / "cache.jsonl", key_folders=(folder,), concurrency=4,
        first_wait=0.01, max_attempts=2,
    ))
    result = compare("a", "b", [f"p{i}" for i in range(30)], ["an answer"] * 30, ["another"] * 30, judge)
    print(judge.describe(), result, vars(judge), judge, judge.options)
    return 1 if result.failed else 0

run_main(main)
"""


def start(server: JudgeServer, folder: Path, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, server.url, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(REPO / "src"), "NO_PROXY": "127.0.0.1", **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=folder)


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    write_key(tmp_path)
    server.delay = 0.03
    process = start(server, tmp_path)
    while server.requests < 25:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    time.sleep(0.05)  # the server finishes what it had begun
    before = server.requests
    assert 25 <= before < 60
    server.delay = 0.0
    process = start(server, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert 60 <= server.requests <= 60 + 4  # four were under way and had to be asked again
    assert len(server.asked) == 60 and server.requests - before <= 60 - (before - 4)
    assert f"'from_cache': {60 - (server.requests - before)}" in out


@pytest.mark.parametrize(("behaviour", "code"), [("longer", 1), ("401", 2)])
def test_the_key_is_nowhere(server, tmp_path, behaviour, code):
    """Not in outputs, errors, logs at the loudest level, reprs or files; the server repeats it in its errors."""
    write_key(tmp_path)
    server.behaviour = behaviour
    server.refused = 9 if behaviour == "longer" else 0  # the first question, in every form
    process = start(server, tmp_path, OPENAI_LOG="debug")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert server.keys == {f"Bearer {KEY}"}
    assert "DEBUG" in err
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file() and file.name != "openai.key"]
    for text in (out, err, *written):
        assert KEY not in text


@pytest.mark.parametrize("behaviour", ["longer", "500", "400", "401"])
def test_the_key_is_in_no_log_record_of_any_library(make, server, behaviour):
    server.behaviour = behaviour
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        run(make(), 2)
    except UserError:
        assert behaviour in ("400", "401")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    assert stream.getvalue() and KEY not in stream.getvalue()


def test_verdicts_of_a_stopped_judge_add_up(make, server):
    """The 2N verdicts of one call can be cut into pairs of systems: all are judged behind one progress bar."""
    questions = both_orders(*systems(3)) + both_orders(*systems(4))
    verdicts = make().judge(questions)
    prompts, a, b = systems(4)
    assert tally("a", "b", a, b, verdicts[6:]).win_rate == run(make(), 4).win_rate
