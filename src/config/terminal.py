"""stdout and stderr as every script has them: without secrets, for any encoding, and whoever still reads them.

A reader may go away (`| head -1`, a lost connection), a disk may be full, a stream may be closed from the start, and an
encoding may lack a character. A quick look ends with its reader; a training run goes on, for its results are in files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from config.scrub import printable, scrub

_OWN_CONTROL = re.compile(r"(\x1b\[(?:0|2|7|32|90)m)")  # the colours of experiments/quick_looks.py
_OF_PROGRESS_BARS = re.compile(r"(?:\n|\x1b\[A)+")


class OutputLost(BaseException):
    """stdout cannot be written to, and it is all that the work was for. Like KeyboardInterrupt it is nobody's to catch
    but `run_main`'s."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror or str(error))
        self.reader_left = isinstance(error, BrokenPipeError)


class Terminal:
    """A text stream behind which nothing secret is shown and no text moves the cursor but our own colours and progress
    bars; all else is the stream's.

    Args:
        stream: what is written to. A character that its encoding lacks is written as its escape.
        needed: whether a failed write raises `OutputLost`. Otherwise, and always from then on, what is written is lost.
    """

    def __init__(self, stream: TextIO, needed: bool = False) -> None:
        self._stream, self._needed = stream, needed
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what may be shown of a text."""
        try:
            self._stream.write(_clean(text))
        except OSError as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one text after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what has been written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def outlived(self) -> None:
        """From now on the work goes on when this stream cannot be written to; one line on stderr tells it."""
        self._needed = False

    def _lose(self, error: OSError) -> None:
        # The interpreter flushes what is left once more when it ends; now it goes nowhere.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if self._needed:
            self._needed = False
            raise OutputLost(error)
        if self is sys.stdout:
            reason = error.strerror or error
            print(f"warning: stdout cannot be written to ({reason}); the work goes on, its files tell", file=sys.stderr)


def guard_terminal() -> None:
    """Put `Terminal` in the place of stdout and stderr, also for loggers that have them already.

    A standard stream that was closed when the process began becomes the null device: a file opened later would get its
    number, and what a library prints there would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - stays open to the end
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Terminal):
            continue
        guarded = Terminal(stream, needed=name == "stdout")
        setattr(sys, name, guarded)
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(guarded)


def outlive_terminal() -> None:
    """From now on the work goes on without a stdout: what counts goes to files."""
    if isinstance(sys.stdout, Terminal):
        sys.stdout.outlived()


def _clean(text: str) -> str:
    if not text.strip() or _OF_PROGRESS_BARS.fullmatch(text):
        return text
    start = "\r" if text[0] == "\r" else ""  # of a progress bar
    parts = _OWN_CONTROL.split(scrub(text[len(start) :]))
    return start + "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))
