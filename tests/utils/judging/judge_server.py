"""A local server that speaks OpenAI's chat API and plays judges, for tests: real HTTP, real threads."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from utils.judging.prompt import SYSTEM, USER

_PATTERN = re.escape(USER).replace(r"\{\{", r"\{").replace(r"\}\}", r"\}")
_PATTERN = _PATTERN.replace(re.escape("{code}"), r"\w+")
for _name in ("prompt", "first", "second"):
    _PATTERN = _PATTERN.replace(re.escape("{" + _name + "}"), f"(?P<{_name}>.*)")
_ASKED = re.compile(rf"(?:{re.escape(SYSTEM)}\n\n)?{_PATTERN}", re.DOTALL)

Texts = tuple[str, str, str]  # prompt, first, second


def winner(letter: str) -> str:
    return json.dumps({"winner": letter})


def longer_wins(texts: Texts) -> str:
    _, first, second = texts
    return winner("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


# What a judge that answers says: text of the message from prompt, first and second response.
ANSWERS: dict[str, Callable[[Texts], str]] = {
    "first": lambda _: winner("A"),
    "second": lambda _: winner("B"),
    "quoted": lambda _: '"A"',
    "ties": lambda _: winner("tie"),
    "longer": longer_wins,
    "garbage": lambda _: "A is better because B is not.",
}


Body = dict[str, Any]
Check = Callable[[Body], tuple[int, Any] | None]  # a request -> status and body of an error, None for no objection


def refuses(field: str, status: int, error: Any, taken: Callable[[Any], bool] = lambda value: value is None) -> Check:
    """Answers with an error where the body's field (None: it is not there) is not as it is taken."""
    return lambda body: None if taken(body.get(field)) else (status, error)


def wants_role(role: str, status: int, error: Any) -> Check:
    """Answers with an error where the first message is of another role."""
    return lambda body: None if body["messages"][0]["role"] == role else (status, error)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


@dataclass(frozen=True)
class Persona:
    """A kind of server.

    checks: what it refuses. message: an answer's text -> what the message has. tokens: that its answers take; with a
    lower limit they are cut to nothing. changed: the parameters that a client has to change for it. extra: requests
    that finding out takes at most, beside one for every question.
    """

    checks: tuple[Check, ...] = ()
    message: Callable[[str], Body] = lambda text: {"content": text}
    tokens: int = 6
    changed: Body = field(default_factory=dict)
    extra: int = 0


def _said(before: str, after: str = "") -> Callable[[str], Body]:
    return lambda text: {"content": f"{before}{text}{after}"}


_NOT_MAX_TOKENS = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "param": "max_tokens",
        "code": "unsupported_parameter",
    }
}
_TEMPERATURE_1 = {
    "error": {
        "message": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the "
        "default (1) value is supported.",
        "param": "temperature",
        "code": "unsupported_value",
    }
}
_EXTRA_FORMAT = {"detail": [{"loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]}
_NO_FORMAT = {"response_format": None}
_JSON = {"type": "json_object"}

# The servers of today. A new one is a row here: what it refuses, how it answers, what has to come of it.
PERSONAS = {
    "classic": Persona(),
    "wants max_completion_tokens and temperature 1": Persona(
        (refuses("max_tokens", 400, _NOT_MAX_TOKENS), refuses("temperature", 400, _TEMPERATURE_1, _one_of(None, 1))),
        changed={"limit": "max_completion_tokens", "temperature": None},
        extra=3,
    ),
    "knows no parameter": Persona(
        tuple(
            refuses(name, 422, {"detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted"}]})
            for name in ("temperature", "max_tokens", "max_completion_tokens", "response_format")
        ),
        changed={"temperature": None, "limit": None, **_NO_FORMAT},
        extra=6,
    ),
    "json_object only, error as text": Persona(
        (refuses("response_format", 400, {"error": "json_schema is not supported"}, _one_of(None, _JSON)),),
        changed={"response_format": "json_object"},
        extra=2,
    ),
    "no response_format, FastAPI": Persona(
        (refuses("response_format", 422, _EXTRA_FORMAT),),
        changed=_NO_FORMAT,
        extra=3,
    ),
    "no response_format, vLLM": Persona(
        (
            refuses(
                "response_format", 400, {"object": "error", "message": "guided decoding is not available", "code": 400}
            ),
        ),
        changed=_NO_FORMAT,
        extra=3,
    ),
    "no response_format, 400 without a reason": Persona(
        (refuses("response_format", 400, {"message": "Bad Request"}),),
        changed=_NO_FORMAT,
        extra=5,
    ),
    "no response_format, 500": Persona(
        (refuses("response_format", 500, {"error": {"message": "Internal Server Error"}}),),
        changed=_NO_FORMAT,
        extra=10,
    ),
    "no system role": Persona(
        (wants_role("user", 400, {"error": {"message": "System role not supported"}}),),
        changed={"role": "user"},
        extra=2,
    ),
    "roles that alternate": Persona(
        (wants_role("user", 400, {"message": "Conversation roles must alternate user/assistant/user/assistant/..."}),),
        changed={"role": "user"},
        extra=2,
    ),
    "no system role, llama.cpp": Persona(
        (
            wants_role(
                "user", 500, {"error": {"code": 500, "message": "System role not supported at row 1, column 42"}}
            ),
        ),
        changed={"role": "user"},
        extra=8,
    ),
    "no system role, LM Studio": Persona(
        (
            wants_role(
                "user",
                400,
                {
                    "error": "Error rendering prompt with jinja template: "
                    '"Only user and assistant roles are supported!".'
                },
            ),
        ),
        changed={"role": "user"},
        extra=2,
    ),
    "no system role, without a reason": Persona(
        (wants_role("user", 400, "bad request"),),
        changed={"role": "user"},
        extra=14,
    ),
    "developer role": Persona(
        (wants_role("developer", 400, [{"error": {"message": "Use the 'developer' role, 'system' is gone"}}]),),
        changed={"role": "developer"},
        extra=2,
    ),
    "no developer role either": Persona(
        (wants_role("user", 400, {"error": {"message": "Developer instruction is not enabled for this model"}}),),
        changed={"role": "user"},
        extra=2,
    ),
    "thinks aloud": Persona(
        message=_said('<think>\nPerhaps {"winner": "B"}? Or A.\n</think>\n\n'),
        tokens=700,
        changed={"max_tokens": 2048},
        extra=2,
    ),
    "thinks apart": Persona(
        message=lambda text: {"content": text, "reasoning_content": "Answer: B"},
        tokens=300,
        changed={"max_tokens": 512},
        extra=1,
    ),
    "thinks apart, and says all of it there": Persona(
        message=lambda text: {"content": None, "reasoning": f"Let me see.</think>{text}"},
    ),
    "thinks, wants max_completion_tokens and temperature 1": Persona(
        (refuses("max_tokens", 400, _NOT_MAX_TOKENS), refuses("temperature", 400, _TEMPERATURE_1, _one_of(None, 1))),
        tokens=300,
        changed={"limit": "max_completion_tokens", "temperature": None, "max_tokens": 512},
        extra=4,
    ),
    "asks for more room in an error": Persona(
        (
            refuses(
                "max_tokens",
                400,
                {
                    "error": {
                        "message": "Could not finish the message because max_tokens or model "
                        "output limit was reached. Please try again with higher max_tokens."
                    }
                },
                lambda value: value > 500,
            ),
        ),
        changed={"max_tokens": 512},
        extra=2,
    ),
    "content in parts": Persona(
        message=lambda text: {"content": [{"type": "thinking", "thinking": "B"}, {"type": "text", "text": text}]},
    ),
    "end mark": Persona(message=_said("", "<|im_end|>")),
    "fenced, with words around": Persona(
        message=_said("Sure! Here it is:\n\n```json\n", "\n```\nIs there more to do?")
    ),
    "bold": Persona(message=_said("**", "**")),
    "smart quotes": Persona(message=lambda text: {"content": text.replace('"', "\u201d")}),
    "lower case": Persona(message=lambda text: {"content": text.lower()}),
    "a line of its own": Persona(
        message=lambda text: {"content": f"A is polite, B is right.\n\n**Answer:** {json.loads(text)['winner']}"}
    ),
}


class JudgeServer:
    """Counts and plays.

    behaviour: a key of ANSWERS, or "401", "403", "404", "500", "400", "quota", "hang-up", "no-json", "bad-json", "cut";
    it may be changed while running. answer: instead of a behaviour, any function of the texts. limited: how many
    requests are first answered 429 with `retry_after`; flaky: how many 500; refused: how many 400, as are all with a
    format in `refused_formats`. delay: seconds before every answer. usage: tokens that it reports.

    raw: status and body of every answer, instead. persona: the kind of server. often_500: every second (2), third (3),
    ... request is answered 500; 0: none is.

    requests: all of them; asked: of each question (prompt, first, second). most_at_once: the largest number of requests
    under way at one time. times: of arrival, monotonic. keys: Authorization headers seen. queries: what stood
    behind the ? of the address.
    """

    def __init__(self) -> None:
        self.behaviour = "longer"
        self.answer: Callable[[Texts], str] | None = None
        self.limited = self.flaky = self.refused = 0
        self.retry_after: str | None = None
        self.headers: dict[str, str] = {}  # of a 429, beside Retry-After
        self.persona = Persona()
        self.often_500 = 0
        self.raw: tuple[int, str] | None = None
        self.delay = 0.0
        self.refused_formats: set[str] = set()
        self.usage: tuple[int, int] | None = (400, 6)
        self.requests, self.most_at_once, self._under_way = 0, 0, 0
        self.asked: Counter[Texts] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.queries: set[str] = set()
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def serve(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        match = _ASKED.fullmatch(body["messages"][-1]["content"])
        path, _, query = http.path.partition("?")
        assert match and path == "/v1/chat/completions"
        texts = (match["prompt"], match["first"], match["second"])
        with self.lock:
            self.requests += 1
            self.asked[texts] += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.queries.add(query)
            self.keys.add(http.headers["Authorization"])
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self.limited, limited = max(0, self.limited - 1), self.limited > 0
            self.flaky, flaky = max(0, self.flaky - 1), self.flaky > 0
            self.refused, refused = max(0, self.refused - 1), self.refused > 0
            flaky = flaky or bool(self.often_500 and self.requests % self.often_500 == 0)
        time.sleep(self.delay)
        with self.lock:
            self._under_way -= 1  # before the answer is sent: the client may ask again the moment it has it
        try:
            if self.raw:
                self._send(http, self.raw[0], self.raw[1].encode(), {"Content-Type": "application/json"})
            elif limited:
                asked = {"Retry-After": self.retry_after} if self.retry_after else {}
                self._error(http, 429, "slow down", asked | self.headers)
            elif flaky:
                self._error(http, 500, "try again")
            elif refused or body.get("response_format", {}).get("type") in self.refused_formats:
                self._error(http, 400, f"request with {http.headers['Authorization']} is not supported")
            elif objection := next((found for check in self.persona.checks if (found := check(body))), None):
                status, error = objection
                self._send(http, status, json.dumps(error).encode(), {"Content-Type": "application/json"})
            else:
                self._play(http, body, texts)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed, or did not wait

    def _play(self, http: BaseHTTPRequestHandler, body: dict[str, Any], texts: Texts) -> None:
        key = http.headers["Authorization"]
        if self.behaviour == "quota":
            self._error(http, 429, "You exceeded your current quota", code="insufficient_quota")
        elif self.behaviour.isdigit():  # servers have been seen to repeat the key
            self._error(http, int(self.behaviour), f"request with {key} went wrong")
        elif self.behaviour == "hang-up":
            http.send_response(200)
            http.send_header("Content-Type", "application/json")
            http.send_header("Content-Length", "10000")
            http.end_headers()
            http.wfile.write(b'{"id": "x", "choices": [')
            http.close_connection = True
        elif self.behaviour == "no-json":
            self._send(http, 200, b"<html>welcome</html>", {"Content-Type": "text/html"})
        elif self.behaviour == "bad-json":
            self._send(http, 200, b'{"choices": [', {"Content-Type": "application/json"})
        else:
            answer = self.answer or ANSWERS["first" if self.behaviour == "cut" else self.behaviour]
            self._completion(http, body, answer(texts), "length" if self.behaviour == "cut" else "stop")

    def _completion(self, http: BaseHTTPRequestHandler, body: dict[str, Any], text: str, finish_reason: str) -> None:
        message = {"role": "assistant", **self.persona.message(text)}
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10**6
        if self.persona.tokens > limit:
            message, finish_reason = {"role": "assistant", "content": ""}, "length"
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        }
        if self.usage:
            read, written = self.usage
            reply["usage"] = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        self._send(http, 200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _error(
        self,
        http: BaseHTTPRequestHandler,
        status: int,
        message: str,
        headers: dict[str, str] | None = None,
        code: str = "",
    ) -> None:
        error = {"error": {"message": message, "type": "test", "code": code or None}}
        self._send(http, status, json.dumps(error).encode(), {"Content-Type": "application/json", **(headers or {})})

    @staticmethod
    def _send(http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        http.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(body)


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """A running server."""
    server = JudgeServer()
    server.start()
    try:
        yield server
    finally:
        server.close()
