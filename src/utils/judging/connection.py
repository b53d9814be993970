"""The client, and in one line what in the environment keeps it from reaching a server."""

from __future__ import annotations

import os
import ssl
import urllib.request
from urllib.parse import parse_qsl, urlsplit

import openai

from config.scrub import scrubbed
from config.user_error import UserError

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def check_url(url: str, source: str) -> None:
    """UserError where no server can have this URL; `source` is the flag or variable that it came from."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        good = False
    if not good or any(character.isspace() for character in url):
        raise UserError(f"{source} {scrubbed(url)}: must begin with http:// or https:// and a host")


def connect(url: str, key: str, timeout: float) -> openai.OpenAI:
    """A client for a server; nothing is sent yet. Its own retries are off, see `judging/requests.py`.

    UserError where a variable of the environment is of no use: a proxy, a certificate file.
    """
    parts = urlsplit(url)
    # The client would put the path of a request behind the parameters (?api-version=preview).
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    address = parts._replace(query="", fragment="").geturl()
    settings = dict(api_key=key, base_url=address, default_query=query, timeout=timeout, max_retries=0)
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        if not os.environ.get(name, "").isascii():
            raise UserError(f"{name}: has characters that cannot be sent in a header; set it anew, or unset it")
    host = parts.hostname or ""
    try:
        if _proxies() and urllib.request.proxy_bypass(host):
            # The client makes all proxies ready, even those that NO_PROXY keeps from this server.
            settings["http_client"] = openai.DefaultHttpxClient(trust_env=False, verify=_trusted())
        return openai.OpenAI(**settings)
    except ImportError:
        name = next((name for name in _proxies() if _value(name).startswith("socks")), "ALL_PROXY")
        raise UserError(
            f"{name}={scrubbed(_value(name))}: a SOCKS proxy needs a package that is not installed; run: pip install "
            f"socksio, or set NO_PROXY={host}"
        ) from None
    except (OSError, ssl.SSLError) as error:
        name = next(filter(_value, _CERTIFICATES), "SSL_CERT_FILE")
        raise UserError(
            f"{name}={_value(name)}: no certificates can be read there ({error.strerror or error}); give a file in PEM "
            "form, or unset it"
        ) from None
    except Exception as error:  # of the URL of a proxy: the client has no one class for them
        if not _proxies():
            raise
        told = ", ".join(f"{name}={scrubbed(_value(name))}" for name in _proxies())
        raise UserError(f"{told}: is no proxy that can be used ({error}); give http://HOST:PORT, or unset it") from None


def what_is_in_the_way(error: BaseException, url: str) -> str:
    """In a few words and with a remedy, why a server could not be reached; "" when nothing more is known."""
    chain = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 6:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    told = " ".join(f"{type(c).__name__} {c}" for c in chain)
    if "CERTIFICATE_VERIFY_FAILED" in told:
        return "its certificate is not trusted; set SSL_CERT_FILE to the file of the authority that signed it"
    if "WRONG_VERSION_NUMBER" in told or "record layer failure" in told:
        return "it does not speak TLS; try http:// in --base-url"
    names = [] if urllib.request.proxy_bypass(urlsplit(url).hostname or "") else _proxies()
    if names:
        return f"the way goes through the proxy of {names[0]}; set NO_PROXY={urlsplit(url).hostname} to go without"
    if "Name or service not known" in told or "nodename nor servname" in told or "name resolution" in told:
        return "no such host is known here; check --base-url"
    return ""


def _proxies() -> list[str]:
    """The variables that name a proxy; of two in different case the one that counts."""
    found = urllib.request.getproxies()
    names = {f"{scheme}_proxy": found[scheme] for scheme in ("all", "https", "http") if found.get(scheme)}
    return [name if _value(name) == value else name.upper() for name, value in names.items()]


def _value(name: str) -> str:
    return os.environ.get(name, "")


def _trusted() -> ssl.SSLContext | bool:
    file, folder = _value("SSL_CERT_FILE") or None, _value("SSL_CERT_DIR") or None
    return ssl.create_default_context(cafile=file, capath=folder) if file or folder else True
