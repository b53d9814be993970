"""The two exceptions that are told in one line without a traceback, and the one place that makes them exit codes.

Exit codes of every script: 0 done; 2 the user's input is wrong, told in one line on stderr; 1 a run that cannot go on
(one line that reports why), or anything else (with its traceback).
"""

import sys
from collections.abc import Callable

from config.scrub import guard_terminal, printable, scrub


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

    From here on everything printed, tracebacks too, is without secrets and control characters (`config.scrub`).

    Args:
        main: takes nothing, returns an exit code or None for 0. A `UserError` becomes exit code 2 and one line on
            stderr, a `RunStopped` exit code 1 and one line, a place without permission exit code 2 and one line;
            every other exception keeps its traceback and Python's exit code 1.
    """
    guard_terminal()
    try:
        code = main()
    except (UserError, RunStopped, PermissionError) as error:
        if isinstance(error, PermissionError):
            error = UserError(f"{error.filename}: permission denied; give a place that can be read and written")
        # A path or a row can hold characters that the terminal's encoding lacks: escape them rather than fail while
        # failing.
        line = f"error: {error}".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        print(line.decode(sys.stderr.encoding or "utf-8"), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    sys.exit(code or 0)
