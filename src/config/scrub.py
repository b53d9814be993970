"""What must not be shown, taken out of everything that is printed or recorded: secrets, and terminal control.

`run_main` puts `config.terminal.Terminal` in the place of stdout and stderr, so every line, warning and traceback of a
script passes `scrub` and `printable`; records (hyperparams.json, evaluation.json, ...) pass `scrubbed`. A secret is
known by

- its place: user info and secret-looking parameters of a URL, an Authorization header, a flag called --...-key;
- its form: `sk-...`, `hf_...`;
- its text, wherever it turns up (a server may repeat a key in an error): the judge's key, the password and parameters
  of its URL, variables of the environment called ..._KEY, ..._TOKEN and the like, passwords in the URLs of proxies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus, urlsplit

SHOWN = "[secret]"

_SHORTEST = 6  # shorter texts stand in too many places by chance
_NAME = r"[\w.-]*(?:key|token|secret|passw(?:or)?d|pwd|auth|signature|credentials?)[\w.-]*"
_URL = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]+:/{1,2})([^\s\"'<>]+)")  # pathlib makes one / of two
_QUERY = re.compile(r"(\bhttps?:/{1,2}[^\s\"'<>?#]*)[?#][^\s\"'<>]*", re.IGNORECASE)
_IN_PLACE = (
    re.compile(rf"([?&;](?:{_NAME}|sig|sas|pat|code)=)[^&;#\s\"'<>]+", re.IGNORECASE),
    re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token)\s+)?[^\s\"',}]+", re.IGNORECASE),
    re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(--(?:[\w-]+[-_])?(?:key|token|secret|password)(?:=|,?\s+))[^\s-]\S*", re.IGNORECASE),
    re.compile(r"(\bsk-)(?=[\w-]*\d)[\w-]{8,}"),
    re.compile(r"(\bhf_)[A-Za-z0-9]{20,}"),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_URL_VARIABLE = re.compile(r"(?:^|_)(?:PROXY|URL|ENDPOINT)$", re.IGNORECASE)
# All but line break and tab, and the marks that turn the direction of writing round.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_known: set[str] = set()


def remember(secret: str) -> None:
    """Take this text out of everything from now on, whatever surrounds it; short ones only where their place tells."""
    if len(secret) >= _SHORTEST:
        _known.add(secret)


def remember_url(url: str) -> None:
    """`remember` the user info and the parameters of a URL, as written and decoded."""
    for secret in _of_url(url):
        remember(secret)


def scrub(text: str) -> str:
    """A text for people without the secrets in it."""
    for secret in sorted({*_known, *_of_environment()}, key=len, reverse=True):
        text = text.replace(secret, SHOWN)
    text = _URL.sub(lambda match: match[1] + _without_user(match[2]), text) if ":/" in text else text
    for pattern in _IN_PLACE:
        text = pattern.sub(rf"\1{SHOWN}", text)
    return text


def scrubbed(value: Any) -> Any:
    """JSON values for a record without secrets. Web addresses lose their whole query: any name may stand for a key."""
    if isinstance(value, str):
        return scrub(_QUERY.sub(r"\1", value))
    if isinstance(value, dict):
        return {key: scrubbed(inner) for key, inner in value.items()}
    return [scrubbed(inner) for inner in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    """A text whose control characters are shown (`\\x1b`), line breaks and tabs aside, so that none of them works."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _without_user(rest: str) -> str:
    """What stands behind :// of a URL, without user and password."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return rest[authority.rindex("@") + 1 :]
    port = authority.partition(":")[2]
    if port and not port.isdigit() and "@" in rest and not authority.startswith("["):
        return rest[rest.rindex("@") + 1 :]  # a password with a slash, which should have been %2F
    return rest


def _of_url(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        user, password = parts.username, parts.password
    except ValueError:  # no URL after all
        return
    values = [pair.rpartition("=")[2] for pair in re.split("[&;]", parts.query)]
    for secret in (password or user or "", *values):  # a user alone is a token
        yield from (secret, unquote_plus(secret))


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            yield from (v for v in (value, value.strip()) if len(v) >= _SHORTEST)
        elif _URL_VARIABLE.search(name):
            yield from (secret for secret in _of_url(value) if len(secret) >= _SHORTEST)
