"""A local server that speaks OpenAI's chat API and plays judges, for tests: real HTTP, real threads."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from utils.judging.prompt import USER

_PATTERN = re.escape(USER).replace(r"\{\{", r"\{").replace(r"\}\}", r"\}")
_PATTERN = _PATTERN.replace(re.escape("{code}"), r"\w+")
for _name in ("prompt", "first", "second"):
    _PATTERN = _PATTERN.replace(re.escape("{" + _name + "}"), f"(?P<{_name}>.*)")
_ASKED = re.compile(_PATTERN, re.DOTALL)

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


class JudgeServer:
    """Counts and plays.

    behaviour: a key of ANSWERS, or "401", "403", "404", "500", "400", "quota", "hang-up", "no-json", "bad-json", "cut";
    it may be changed while running. answer: instead of a behaviour, any function of the texts. limited: how many
    requests are first answered 429 with `retry_after`; flaky: how many 500; refused: how many 400, as are all with a
    format in `refused_formats`. delay: seconds before every answer. usage: tokens that it reports.

    requests: all of them; asked: of each question (prompt, first, second). most_at_once: the largest number of requests
    under way at one time. times: of arrival, monotonic. keys: Authorization headers seen.
    """

    def __init__(self) -> None:
        self.behaviour = "longer"
        self.answer: Callable[[Texts], str] | None = None
        self.limited = self.flaky = self.refused = 0
        self.retry_after: str | None = None
        self.delay = 0.0
        self.refused_formats: set[str] = set()
        self.usage: tuple[int, int] | None = (400, 6)
        self.requests, self.most_at_once, self._under_way = 0, 0, 0
        self.asked: Counter[Texts] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
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
        match = _ASKED.fullmatch(body["messages"][1]["content"])
        assert match and http.path == "/v1/chat/completions"
        texts = (match["prompt"], match["first"], match["second"])
        with self.lock:
            self.requests += 1
            self.asked[texts] += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.add(http.headers["Authorization"])
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            self.limited, limited = max(0, self.limited - 1), self.limited > 0
            self.flaky, flaky = max(0, self.flaky - 1), self.flaky > 0
            self.refused, refused = max(0, self.refused - 1), self.refused > 0
        time.sleep(self.delay)
        with self.lock:
            self._under_way -= 1  # before the answer is sent: the client may ask again the moment it has it
        try:
            if limited:
                self._error(http, 429, "slow down", {"Retry-After": self.retry_after} if self.retry_after else {})
            elif flaky:
                self._error(http, 500, "try again")
            elif refused or body["response_format"]["type"] in self.refused_formats:
                self._error(http, 400, f"request with {http.headers['Authorization']} is not supported")
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
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
            ],
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
