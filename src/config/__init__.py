"""Presets and flags, devices, errors that are one line.

Every script imports this room first, so here stands what has to hold before anything else can: a Python that the code
is written for, and the packages of requirements.txt.
"""

import importlib.util
import sys

_OLDEST = (3, 11)
_PACKAGES = ("numpy", "torch", "tqdm", "tyro")
"""Those that every script imports before it reads its flags; who has them has the others."""


def _missing() -> str:
    """What this Python lacks, in words; "" where it will do."""
    if sys.version_info[:2] < _OLDEST:
        return f"this is Python {sys.version.split()[0]}, and {'.'.join(map(str, _OLDEST))} or newer is needed"
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"this Python ({sys.executable}) has no {', no '.join(missing)}" if missing else ""


if _missing():
    remedy = "activate the environment: `. .venv/bin/activate` (`make demo` makes it)"
    print(f"error: {_missing()}; {remedy}", file=sys.stderr)
    sys.exit(2)
