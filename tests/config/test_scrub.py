"""What is a secret and what is not, in every form and place."""

import pytest

from config import scrub as module
from config.scrub import SHOWN, remember, remember_url, scrub, scrubbed

SECRET = "hunter2-x9"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_known", set())


@pytest.mark.parametrize("text", [
    f"http://user:{SECRET}@host/v1", f"https://{SECRET}@host:80/v1?x=1", f"see http://u:{SECRET}@[::1]:8000/v1, please",
    f"http://user:{SECRET}@inner@host/v1", f"http://user:{SECRET}/more@host/v1", f"socks5://u:{SECRET}@proxy:1080",
    f"http://user:a?b{SECRET}@host/v1", f"git+https://{SECRET}@github.com/a/b", f"hub:https://me:{SECRET}@hub.co/a/b",
    f"/tmp/https:/me:{SECRET}@host/x: no such file", f"options: --judge-key, {SECRET}",
    f"ProxyError('http://u:{SECRET}@proxy:3128')", f'{{"url": "http://u:{SECRET}@h/"}}',
    f"http://host/v1?api_key={SECRET}", f"http://host/v1?a=1&Access-Token={SECRET}#end", f"http://h/?sig={SECRET}&b=2",
    f"/v1/chat?x=1&client_secret={SECRET}", f"https://h/x;auth={SECRET}",
    f"Authorization: Bearer {SECRET}", f"authorization={SECRET}", f"{{'Authorization': 'Basic {SECRET}'}}",
    f'"Authorization":"{SECRET}"', f"Proxy-Authorization: Basic {SECRET}", f"sent Bearer {SECRET} to it",
    f"--api-key {SECRET}", f"--judge-key={SECRET}", f"--hf-token {SECRET} -n x", f"--password={SECRET}",
    "sk-proj-0123456789", "hf_abcdefghijKLMNOPQRST0123",
])  # fmt: skip
def test_a_secret_is_known_by_its_place_or_form(text):
    for told in (scrub(text), scrubbed(text), str(scrubbed({"a": [text], "b": {"c": (text, 1)}}))):
        assert SECRET not in told and "0123" not in told and "inner" not in told and "more" not in told


@pytest.mark.parametrize("text", [
    "http://localhost:8000/v1", "https://no-color.org", "a basic introduction to token budgets",
    "https://youtube.com/watch?v=abcdef", "step 3: held-out loss 2.1 nats/token", "--tokens-per-micro-batch 8192",
    "--max-new-tokens 64 --eval-every 10", "a@b.example", "key: value", "the bearer certificates", "task-0123456789",
    "http://[::1]:8000/v1", "/home/me@work/runs/sft_demo_20260101000000", "C=3; key=3", "ratio 3:4@5",
    "C:/me:you@here", "see x:/a/b:c@d", "hub:/a/me@b",
])  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert scrub(text) == text


def test_records_lose_all_queries():
    url = f"http://user:{SECRET}@host:8000/v1?k={SECRET}#{SECRET}"
    record = {
        "command": ["evaluate.py", "--base-url", url, f"--base-url={url}"],
        "n": 3,
        "x": None,
        "f": 0.5,
        "b": True,
    }
    plain = "http://host:8000/v1"
    assert scrubbed(record) == record | {"command": ["evaluate.py", "--base-url", plain, f"--base-url={plain}"]}


@pytest.mark.parametrize("url", [
    f"http://me:{SECRET}@host/v1", f"http://host/v1?k={SECRET}", f"http://host/v1?{SECRET}", f"me:{SECRET}@host:3128",
    f"http://{SECRET}@host", "http://me:hunter2%2Dx9@host/v1",
])  # fmt: skip
def test_what_a_url_holds_is_known_everywhere(url):
    remember_url(url)
    assert scrub(f"the server says {SECRET}!") == f"the server says {SHOWN}!"


def test_what_is_no_url_is_passed_over():
    for text in ("", "http://[", "//", "http://host:port", "hello"):
        remember_url(text)
    assert scrub("hello http://[ port") == "hello http://[ port"


@pytest.mark.parametrize("name", [
    "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET", "DB_PASSWORD", "TOKEN", "my_api_key",
])  # fmt: skip
def test_the_environment_is_known(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert scrub(f"wrong key: {SECRET}") == f"wrong key: {SHOWN}"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy", "OPENAI_BASE_URL", "HF_ENDPOINT"])
def test_urls_in_the_environment_are_known(name, monkeypatch):
    monkeypatch.setenv(name, f"http://me:{SECRET}@host:3128")
    assert scrub(f"cannot connect as {SECRET}") == f"cannot connect as {SHOWN}"


@pytest.mark.parametrize(("name", "value"), [("TOKENIZERS_PARALLELISM", "offline-mode"), ("SHORT_KEY", "gpt2")])
def test_other_variables_are_not(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert scrub(f"{value} here") == f"{value} here"


def test_longer_secrets_go_first_and_short_ones_stay():
    for secret in ("abcdef", "abcdef-ghijkl", "abc"):
        remember(secret)
    assert scrub("abcdef-ghijkl abcdef abc") == f"{SHOWN} {SHOWN} abc"
