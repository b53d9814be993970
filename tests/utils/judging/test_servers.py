"""The servers of today (`judge_server.py` has the table): each judges as a plain one does, at what it costs to find out
what it takes."""

import json
from dataclasses import asdict

import pytest
from judge_server import PERSONAS

from config.user_error import UserError
from utils.judging.language_model import OpenAIJudge
from utils.judging.negotiation import Form
from utils.judging.pairwise import Question, Verdict, both_orders
from utils.judging.requests import JudgeOptions

pytestmark = pytest.mark.slow

QUESTIONS = both_orders(
    [f"question {i}?" for i in range(6)],
    [f"answer {i}" + " more" * (i % 3) for i in range(6)],
    [f"answer {i} x" for i in range(6)],
)
WANTED = {
    "first": [Verdict.FIRST] * 12,
    "ties": [Verdict.TIE] * 12,
    "longer": [Verdict.FIRST if len(q.first) > len(q.second) else Verdict.SECOND for q in QUESTIONS],
}


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    """`make(concurrency=1, ...)`: a new judge on the server, as a new process would make it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    defaults = dict(
        model="judge-1", base_url=server.url, cache=tmp_path / "cache.jsonl", key_folders=(),
        first_wait=0.002, longest_wait=0.05, max_attempts=4, timeout=5.0,
    )  # fmt: skip
    return lambda **options: OpenAIJudge(JudgeOptions(**{**defaults, **options}))


@pytest.mark.parametrize("answers", WANTED)
@pytest.mark.parametrize("name", PERSONAS)
def test_every_server_judges_as_a_plain_one(make, server, name, answers):
    server.persona, server.behaviour = PERSONAS[name], answers
    judge = make()
    assert judge.judge(QUESTIONS) == WANTED[answers]
    figures = judge.describe()
    assert figures["failures"] == figures["unclear"] == {} and figures["stopped"] is None
    assert server.requests <= len(QUESTIONS) + server.persona.extra
    wanted = asdict(Form()) | server.persona.changed
    told = figures["parameters"]
    assert {**{k: told[k] for k in wanted if k != "role"}, "role": told["role_of_instructions"]} == wanted
    assert set(told["changed"]) == set(server.persona.changed) - {"max_tokens"}


def test_what_was_found_out_holds_for_the_run_and_is_told_once(make, server, capsys):
    server.persona = PERSONAS["thinks, wants max_completion_tokens and temperature 1"]
    judge = make(price=(1.0, 10.0))
    judge.judge(QUESTIONS[:6])
    told = capsys.readouterr().err
    for words in ("max_tokens called max_completion_tokens", "temperature 0 left out", "may write 512", "$0.0051"):
        assert told.count(words) == 1, told
    before = server.requests
    judge.judge(QUESTIONS)
    assert server.requests == before + 6 and "note" not in capsys.readouterr().err


@pytest.mark.parametrize("often", [2, 3, 5])
@pytest.mark.parametrize("name", ["classic", "json_object only, error as text", "no system role, without a reason"])
def test_a_server_that_fails_now_and_then_is_not_misjudged(make, server, name, often):
    server.persona, server.often_500 = PERSONAS[name], often
    judge = make(max_attempts=8)
    assert judge.judge(QUESTIONS) == WANTED["longer"]
    assert set(judge.describe()["parameters"]["changed"]) == set(server.persona.changed)


@pytest.mark.parametrize("trouble", ["refused", "flaky"])
@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_a_fault_that_passes_decides_nothing(make, server, trouble, times):
    setattr(server, trouble, times)
    judge = make()
    assert judge.judge(QUESTIONS) == WANTED["longer"]
    assert judge.describe()["parameters"]["changed"] == []


def test_many_threads_under_a_strict_limit_all_get_their_answers(make, server):
    """More of them come too late than there are attempts for one answer."""
    answered = []

    def strict(body):
        if len(server.times) % 4:
            return 429, {"error": {"message": "Rate limit reached. Please try again in 10ms."}}
        return answered.append(body)

    server.persona = type(PERSONAS["classic"])(checks=(strict,))
    assert make(max_attempts=4).judge(QUESTIONS) == WANTED["longer"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, "<!DOCTYPE html><html><head><title>Open WebUI</title></head></html>", "a web page (Open WebUI)"),
        (200, "<html><body>hi</body></html>", "a web page (HTML)"),
        (200, "Ollama is running", "Ollama is running"),
        (200, '{"error": "Unexpected endpoint or method. (POST /chat/completions)"}', "Unexpected endpoint"),
        (200, '{"status": "ok"}', "status"),
        (200, '{"choices": []}', "choices"),
        (200, '{"choices": [{"text": "A"}]}', "choices"),
        (200, "[]", "[]"),
        (405, '{"detail": "Method Not Allowed"}', "Method Not Allowed"),
    ],
)
def test_something_else_than_a_chat_api_is_a_wrong_base_url_at_once(make, server, status, body, words):
    server.raw = (status, body)
    with pytest.raises(UserError, match="^--base-url http://127.0.0.1") as error:
        make().judge(QUESTIONS)
    assert words in str(error.value) and "/v1" in str(error.value) and "\n" not in str(error.value)
    assert server.requests == 1


def test_a_page_in_between_is_a_passing_fault(make, server):
    judge = make()
    judge.judge(QUESTIONS[:2])
    server.raw = (200, "<html>sign in to this network</html>")
    assert judge.judge([Question("p", "a", "b")]) == [Verdict.FAILED]
    assert judge.describe()["failures"] == {"unreadable response": 1}


@pytest.mark.parametrize("code", [502, "502"])
@pytest.mark.parametrize("in_choice", [False, True])
def test_an_error_inside_a_good_response_is_one_of_its_status(make, server, code, in_choice):
    inside = {"error": {"code": code, "message": "Provider returned error", "metadata": {"raw": "asleep"}}}
    choice = inside | {"finish_reason": "error", "message": {"role": "assistant", "content": ""}}
    server.raw = (200, json.dumps({"choices": [choice]} if in_choice else inside))
    judge = make(max_attempts=2)
    assert judge.judge([Question("p", "a", "b")]) == [Verdict.FAILED]
    assert judge.describe()["failures"] == {"HTTP 502": 1}
    assert judge.describe()["examples"] == {"HTTP 502": "Provider returned error: asleep"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"error": "no model is loaded"}', "no model is loaded"),
        ('{"error": {"message": "no model is loaded"}}', "no model is loaded"),
        ('{"detail": [{"loc": ["body", "x"], "msg": "field required"}]}', "body.x: field required"),
        ('{"detail": "no model is loaded"}', "no model is loaded"),
        ('{"message": "no model is loaded"}', "no model is loaded"),
        ('{"object": "error", "message": "no model is loaded", "code": 40001}', "no model is loaded"),
        ('[{"error": {"code": 400, "message": "no model is loaded"}}]', "no model is loaded"),
        ("no model is loaded", "no model is loaded"),
        ("<html><title>Bad gateway</title></html>", "Bad gateway"),
        ('{"error": ', '{"error":'),
        ("", "HTTP 4"),
        ("{}", "HTTP 4"),
    ],
)
@pytest.mark.parametrize("status", [400, 422, 500])
def test_what_a_server_says_is_shown(make, server, capsys, status, body, words):
    server.raw = (status, body)
    if status == 500:
        judge = make(max_attempts=2, give_up_after=2)
        judge.judge(QUESTIONS)
        assert (words if words != "HTTP 4" else "HTTP 500") in capsys.readouterr().err
        return
    with pytest.raises(UserError, match="refuses every question") as error:
        make().judge(QUESTIONS)
    assert words in str(error.value) and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        {"message": "Invalid model: judge-1"},
        {"error": {"message": "The model `judge-1` does not exist", "code": "model_not_found"}},
        {"error": 'model "judge-1" not found, try pulling it first'},
        {"detail": "judge-1 is not a valid model ID"},
        {"error": {"message": "This is only supported in v1/responses", "param": "model"}},
        {"error": {"message": "Multiple models are loaded. Please specify one", "param": "model", "code": None}},
    ],
)
def test_an_unknown_model_is_no_matter_of_parameters(make, server, body):
    server.raw = (400, json.dumps(body))
    with pytest.raises(UserError, match="^--judge-model judge-1: .*refuses every question"):
        make().judge(QUESTIONS)
    assert server.requests == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}], "accept the key"),
        ([{"error": {"code": 400, "message": "Missing or invalid Authorization header."}}], "accept the key"),
        ({"error": "Incorrect API key provided: ab***yz."}, "accept the key"),
        ({"error": {"message": "Your credit balance is too low to access the API."}}, "quota of this key"),
        ({"error": {"message": "Budget has been exceeded! Current cost: 10.1"}}, "quota of this key"),
    ],
)
def test_a_key_that_is_of_no_use_is_told_at_once_whatever_the_status(make, server, body, words):
    server.raw = (400, json.dumps(body))
    with pytest.raises(UserError, match=f"^--judge openai: .*{words}.*400: "):
        make().judge(QUESTIONS)
    assert server.requests == 1


@pytest.mark.parametrize(
    "text",
    [
        "the request exceeds the available context size, try increasing it",
        "This model's maximum context length is 512 tokens. However, you requested 600 tokens (536 in the messages, 64 "
        "in the completion). Please reduce the length of the messages or completion.",
        "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 512 tokens.",
    ],
)
def test_a_question_that_is_too_long_changes_no_parameter(make, server, text):
    server.persona = type(PERSONAS["classic"])(
        checks=(
            lambda body: (400, {"error": {"message": text}}) if "too long" in body["messages"][1]["content"] else None,
        )
    )
    judge = make()
    found = judge.judge([Question("p", "a", "too long"), *QUESTIONS])
    assert found == [Verdict.FAILED, *WANTED["longer"]] and server.requests == 2 + 12
    assert judge.describe()["parameters"]["changed"] == []
    assert judge.describe()["examples"]["question refused"] == text


def test_a_server_with_little_room_keeps_what_it_has(make, server):
    """Thoughts that would need more than the server grants: no answer, and no other parameter is blamed."""
    limit = dict(error=dict(message="max_tokens is too large: this model supports at most 512 completion tokens"))
    server.persona = type(PERSONAS["classic"])(
        checks=(lambda body: (400, limit) if body["max_tokens"] > 512 else None,), tokens=600
    )
    judge = make()
    assert judge.judge(QUESTIONS[:2]) == [Verdict.UNPARSED] * 2
    assert judge.describe()["parameters"]["max_tokens"] == 512 and judge.describe()["parameters"]["changed"] == []
    assert judge.describe()["unclear"] == {"cut short": 2}


def test_room_is_given_within_the_budget(make, server, capsys):
    server.persona, server.usage = PERSONAS["thinks aloud"], (400, 700)
    judge = make(price=(0.0, 1000.0), max_cost=5.0, concurrency=1)
    verdicts = judge.judge(QUESTIONS)
    figures = judge.describe()
    assert verdicts.count(Verdict.FAILED) == figures["not_asked"] > 0 and figures["cost_usd"] <= 5.0
    assert "--max-cost" in figures["stopped"] and "output tokens" in capsys.readouterr().err


def test_verdicts_at_another_temperature_are_other_verdicts(make, server):
    """The server changes its mind about temperature 0; verdicts of both kinds are never mixed, and none is lost."""
    make().judge(QUESTIONS[:4])
    assert server.requests == 4
    server.persona = PERSONAS["wants max_completion_tokens and temperature 1"]
    judge = make()
    assert judge.plan(QUESTIONS).cached == 4
    judge.judge(QUESTIONS)
    assert server.requests <= 4 + 12 + server.persona.extra and judge.describe()["from_cache"] == 0
    before = server.requests
    again = make()
    assert again.plan(QUESTIONS).calls == 0  # known before anything is asked: the cache tells how it was asked last
    assert again.judge(QUESTIONS) == WANTED["longer"] and server.requests == before
    temperatures = [body.get("temperature") for body in server.bodies]
    make().judge([*QUESTIONS, Question("p", "a", "bb")])
    assert [body.get("temperature") for body in server.bodies[len(temperatures) :]] == [None, None, None]
    kept = [json.loads(line) for line in again.cache.path.read_text().splitlines()]
    assert sorted({len(row["judge"]) for row in kept}) == [4, 5]


@pytest.mark.parametrize(
    ("answer", "words", "requests"),
    [
        ("I like both of them.", ("no verdict", "I like both of them.", "--judge-model"), 5),
        ("", ("empty", "(nothing)", "chat template"), 5),
        ("<think>" + "well " * 500, ("no verdict", "<think>well well", "--judge-model"), 5),
    ],
)
def test_answers_that_are_no_verdicts_stop_the_run_and_are_shown(make, server, capsys, answer, words, requests):
    server.answer = lambda texts: answer
    judge = make()
    verdicts = judge.judge(QUESTIONS)
    assert verdicts == [Verdict.UNPARSED] * 5 + [Verdict.FAILED] * 7 and server.requests == requests
    told = capsys.readouterr().err
    assert "5 questions in a row without a clear answer" in told and all(word in told for word in words)
    figures = judge.describe()
    assert figures["unclear"] == {words[0]: 5} and figures["not_asked"] == 7 and figures["stopped"] in told
    assert len(figures["examples"][words[0]]) <= 304
    assert judge.judge(QUESTIONS)[5:] == [Verdict.FAILED] * 7 and server.requests == requests


def test_answers_without_end_stop_the_run(make, server, capsys):
    server.persona = type(PERSONAS["classic"])(tokens=10**5)
    judge = make(price=(1.0, 1.0))
    judge.judge(QUESTIONS)
    assert server.requests == 4 + 4 and "cut short" in judge.describe()["stopped"]  # 64, 512, 2048, 8192; then 8192
    assert capsys.readouterr().err.count("may write") == 3


def test_withheld_answers_and_refusals_are_counted_as_such(make, server):
    server.persona = type(PERSONAS["classic"])(message=lambda text: {"content": None, "refusal": "I cannot compare."})
    judge = make()
    judge.judge(QUESTIONS)
    assert judge.describe()["unclear"] == {"withheld": 5}
    assert judge.describe()["examples"] == {"withheld": "I cannot compare."}


@pytest.mark.parametrize("choices", [[{"finish_reason": "content_filter: PROHIBITED_CONTENT", "index": 0}], [], None])
def test_an_answer_that_is_kept_back_whole_is_withheld(make, server, choices):
    server.raw = (200, json.dumps({"object": "chat.completion", "choices": choices}))
    judge = make()
    assert judge.judge(QUESTIONS[:1]) == [Verdict.UNPARSED]
    assert judge.describe()["unclear"] == {"withheld": 1} and judge.describe()["failures"] == {}


def test_a_judge_that_loses_its_way_later_stops_too(make, server):
    judge = make(give_up_after=4, concurrency=1)
    judge.judge(QUESTIONS[:4])
    server.answer = lambda texts: "no idea"
    verdicts = judge.judge(QUESTIONS)
    assert verdicts == WANTED["longer"][:4] + [Verdict.UNPARSED] * 4 + [Verdict.FAILED] * 4
    assert server.requests == 4 + 4 * 3


def test_unclear_answers_among_clear_ones_stop_nothing(make, server):
    server.answer = lambda texts: '{"winner": "A"}' if "2?" in texts[0] or "5?" in texts[0] else "no idea"
    judge = make(give_up_after=5, concurrency=1)
    verdicts = judge.judge(QUESTIONS)
    assert verdicts.count(Verdict.FIRST) == 4 and verdicts.count(Verdict.UNPARSED) == 8
    assert judge.describe()["stopped"] is None and judge.describe()["unclear"] == {"no verdict": 8}
