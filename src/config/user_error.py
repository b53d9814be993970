"""The two exceptions that are told in one line without a traceback, and the one place that makes them exit codes.

Exit codes of every script: 0 done; 2 the user's input is wrong, or a place has no permission, told in one line on
stderr; 1 a run that cannot go on, or an output that cannot be written (one line that reports why), or anything else
(with its traceback); 130 and 143 after Ctrl-C and SIGTERM; 141 when the reader of the output has gone (`| head -1`).
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from config.scrub import printable, scrub
from config.terminal import OutputLost, guard_terminal

_INTERRUPTED = 128 + signal.SIGINT


class _OneLine(Exception):
    """Its message is one line, whatever slips in with a file name or a piece of the input: line breaks are shown as
    spaces, secrets left out and control characters shown (`config.scrub`)."""

    def __init__(self, message: str):
        super().__init__(printable(scrub(" ".join(message.split()))))


class UserError(_OneLine):
    """The user's input is wrong. The message names the flag, or the file and line, and says what would be right."""


class RunStopped(_OneLine):
    """The run cannot go on although the input is right: numbers that are not finite, a policy that runs away.

    The message says what was found, where, what is left to go on from, and what may help.
    """


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and ends the process with the exit code of the contract above.

    From here on everything printed, tracebacks too, passes `config.terminal`.

    Args:
        main: takes nothing, returns an exit code or None for 0.
    """
    guard_terminal()
    code: Any = 1
    try:
        with _no_interrupt_lost():
            code = _code_of(main)
    finally:
        try:
            sys.stdout.flush()
        except OutputLost as lost:
            without_output = _code_without_output(lost)
            code = code or without_output
    if code == _INTERRUPTED:
        # Python still waits for its threads; who asks once more will not.
        signal.signal(signal.SIGINT, _leave_now)
    sys.exit(code)


def _leave_now(*_: object) -> None:
    os._exit(_INTERRUPTED)


def _interrupt() -> None:
    """Ctrl-C from within: also ends a sleep or a read, where the system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()  # Windows


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Ctrl-C counts also where Python can only report it and go on: in a destructor, in a callback of an import."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _interrupt).start()  # once more, when that place has been left
        else:
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _code_of(main: Callable[[], int | None]) -> Any:
    """What `main` comes to, as an argument of `sys.exit`; an error that is told in one line has been told."""
    try:
        return main() or 0
    except (UserError, RunStopped, PermissionError) as error:
        if isinstance(error, PermissionError):
            error = UserError(f"{error.filename}: permission denied; give a place that can be read and written")
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SystemExit as stop:  # of --help
        return stop.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OutputLost as lost:
        return _code_without_output(lost)


def _code_without_output(lost: OutputLost) -> int:
    if lost.reader_left:
        return 141  # 128 + SIGPIPE, as shells report it of other programs
    print(f"error: stdout: cannot be written to ({lost})", file=sys.stderr)
    return 1
