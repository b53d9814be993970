"""What in the environment keeps the judge from its server: one line, with the variable and the remedy."""

import ssl

import pytest
from judge_server import judge_server

from config.user_error import UserError
from utils.judging.connection import what_is_in_the_way
from utils.judging.language_model import OpenAIJudge
from utils.judging.pairwise import Question, Verdict
from utils.judging.requests import JudgeOptions

VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")


@pytest.fixture
def make(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    defaults = dict(
        model="judge-1", base_url="http://judge.example/v1", cache=tmp_path / "cache.jsonl", key_folders=(),
        first_wait=0.001, max_attempts=2, timeout=5.0,
    )  # fmt: skip
    return lambda **options: OpenAIJudge(JudgeOptions(**{**defaults, **options}))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1080"}, ("ALL_PROXY=socks5://127.0.0.1:1080", "pip install socksio")),
        ({"all_proxy": "socks5h://u:hidden@127.0.0.1:1080"}, ("all_proxy=socks5h://127", "NO_PROXY=judge.example")),
        ({"HTTPS_PROXY": "foo://127.0.0.1"}, ("HTTPS_PROXY=foo://127.0.0.1", "http://HOST:PORT")),
        ({"http_proxy": "http://[::bad"}, ("http_proxy=http://[::bad", "http://HOST:PORT")),
        ({"SSL_CERT_FILE": "/nowhere.pem"}, ("SSL_CERT_FILE=/nowhere.pem", "No such file", "unset it")),
        ({"SSL_CERT_FILE": __file__}, (f"SSL_CERT_FILE={__file__}", "PEM")),
        ({"OPENAI_ORG_ID": "\u00fcber"}, ("OPENAI_ORG_ID", "unset it")),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_is_asked(make, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        make()
    told = str(error.value)
    assert "\n" not in told and "hidden" not in told and all(word in told for word in words), told


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "foo://x", "http://127.0.0.1:1"])
def test_a_proxy_does_not_matter_to_a_server_that_is_excepted(make, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    with judge_server() as server:
        assert make(base_url=server.url).judge([Question("p", "a", "bb")]) == [Verdict.SECOND]


@pytest.mark.parametrize("slash", ["", "/"])
def test_parameters_of_the_url_stay_behind_the_path(make, slash):
    with judge_server() as server:
        url = f"{server.url}{slash}?api-version=preview&k="
        assert make(base_url=url).judge([Question("p", "a", "bb")]) == [Verdict.SECOND]
        assert server.queries == {"api-version=preview&k="}


def test_a_proxy_that_does_not_answer_is_named(make, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached \(.*proxy of HTTP_PROXY; set NO_PROXY=judge.example"):
        make().judge([Question("p", "a", "b")])


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("http://", ""), ("http:///v1", ""), ("http://host:99999999/v1", ""), ("http://host:port/v1", ""),
        ("http://[::bad/v1", ""), ("https://ho st/v1", ""), ("localhost:8000", ""), ("ws://host/v1", ""),
        ("localhost:8000", "OPENAI_BASE_URL"), ("http://host:0/v1", ""),
    ],
)  # fmt: skip
def test_a_url_that_is_none_names_where_it_came_from(make, monkeypatch, url, variable):
    if variable:
        monkeypatch.setenv(variable, url)
    with pytest.raises(UserError, match=f"^{variable or '--base-url'} .*http://"):
        make(base_url=None if variable else url)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ssl.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), "SSL_CERT_FILE"),
        (ssl.SSLError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), "http:// in --base-url"),
        (OSError(-2, "Name or service not known"), "no such host"),
        (OSError("something else"), ""),
    ],
)
def test_reasons_below_the_client_are_found(make, error, words):
    wrapped = RuntimeError("Connection error.")
    wrapped.__cause__ = error
    told = what_is_in_the_way(wrapped, "https://host/v1")
    assert words in told and bool(told) == bool(words)


def test_a_plain_server_asked_by_https_is_told(make):
    with judge_server() as server, pytest.raises(UserError, match="cannot be reached .*try http:// in --base-url"):
        make(base_url=server.url.replace("http://", "https://")).judge([Question("p", "a", "b")])
