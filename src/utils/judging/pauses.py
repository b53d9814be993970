"""Pauses that a server asks for: read from its answer, kept by all threads, told once."""

from __future__ import annotations

import email.utils
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

_TOLD_FROM = 20.0  # seconds; a shorter pause is over before it is read
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)(?:ec(?:ond)?s?|in(?:ute)?s?|ours?|ays?)?\s*", re.IGNORECASE)
_IN_WORDS = re.compile(rf"(?:try again in|retry in|retry after|retryDelay\W+)\s*((?:{_PART.pattern})+)", re.IGNORECASE)


class Pauses:
    """When the next request may be sent. stop: ends every wait. longest: seconds; more is not waited for."""

    def __init__(self, url: str, longest: float, stop: threading.Event) -> None:
        self.longest = longest
        self.clock: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], bool] = stop.wait  # True when it was ended early
        self._url = url
        self._resume_at, self._told_from = -math.inf, _TOLD_FROM
        self._lock = threading.Lock()

    def wait(self, seconds: float = 0.0) -> bool:
        """Wait for the end of all pauses, and at least so long; False when it was stopped."""
        return not self.sleep(max(0.0, seconds, self._resume_at - self.clock()))

    def ask(self, seconds: float) -> None:
        """Hold all threads from now on; the first long pause is told on the terminal, and then only a much longer one:
        a strict server asks every minute."""
        with self._lock:
            if seconds >= self._told_from:
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
                print(
                    f"note: {self._url} limits the rate and asks for a pause of {seconds:.0f} s; waiting until {until} "
                    "(Ctrl-C stops; verdicts so far are kept)",
                    file=sys.stderr,
                )
                self._told_from = 2 * seconds
            self._resume_at = max(self._resume_at, self.clock() + seconds)


def asked_pause(status: int, headers: Mapping[str, str], text: str = "") -> float:
    """Seconds that a server asks to wait, 0 when it does not.

    The first that is there of: Retry-After-Ms, Retry-After (RFC 9110, 10.2.3: a number, or a date), and of a 429 the
    reset times of its limits that have nothing left, or the words "try again in 20s".
    """
    named = (("retry-after-ms", 0.001), ("retry-after", 1.0))
    for name, unit in named:
        if name in headers:
            return _seconds(headers[name], unit)
    if status != 429:
        return 0.0
    if resets := list(_resets(headers)):
        return max(resets)
    found = _IN_WORDS.search(text)
    return _seconds(found[1]) if found else 0.0


def _resets(headers: Mapping[str, str]) -> Iterator[float]:
    """Of x-ratelimit-reset-requests and the like, those whose limit is used up or does not say."""
    for name, value in headers.items():
        name = name.lower()
        if "ratelimit" in name and "reset" in name:
            left = headers.get(name.replace("reset", "remaining"), "0")
            if left.strip() in ("0", "0.0"):
                yield _seconds(value)


def _seconds(value: str, unit: float = 1.0) -> float:
    """Seconds from now of "12", "6m0s", "350ms", a date, or a time since 1970 in seconds or milliseconds."""
    value = value.strip()
    parts = [float(number) * _UNITS[word.lower()] for number, word in _PART.findall(value)]
    if parts and not _PART.sub("", value):
        return sum(parts)
    try:
        number = float(value)
        if number > 1e9 and unit == 1.0:
            number = (number / 1000 if number > 1e11 else number) - time.time()
        return max(0.0, number * unit) if math.isfinite(number) else 0.0
    except ValueError:
        pass
    for read in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        try:
            return max(0.0, read(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            continue
    return 0.0
