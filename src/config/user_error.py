"""The one exception that means "your input is wrong", and the one place that turns it into exit code 2.

Exit codes of every script: 0 done; 2 the user's input is wrong, told in one line on stderr; 1 anything else (with its
traceback).
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """The user's input is wrong.

    The message is one line that names the flag, or the file and line, and says what would be right. Line breaks that
    slip in with a file name or a piece of the input are shown as spaces, so that the promise of one line always holds.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and ends the process with the exit code of the contract above.

    Args:
        main: takes nothing, returns an exit code or None for 0. A `UserError` becomes exit code 2 and one line on
            stderr; every other exception keeps its traceback and Python's exit code 1.
    """
    try:
        code = main()
    except UserError as error:
        # A path or a row can hold characters that the terminal's encoding lacks: escape them rather than fail while
        # failing.
        line = f"error: {error}".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        print(line.decode(sys.stderr.encoding or "utf-8"), file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
