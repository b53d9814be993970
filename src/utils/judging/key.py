"""The judge's key: where it is looked for, and a holder that does not show it."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.scrub import remember
from config.user_error import UserError
from utils.runs.folder import REPO

KEY_FILE, KEY_NAME = "openai.key", "OPENAI_API_KEY"
_FORM = f'{{"{KEY_NAME}": "..."}}'


@dataclass(frozen=True)
class ApiKey:
    """A key that neither repr nor str shows. source: the file or variable it came from."""

    value: str = field(repr=False)
    source: str


def find_key(folders: Sequence[Path] | None = None) -> ApiKey | None:
    """The key from the first `openai.key` in the folders (the working folder, the repo's root, its src/), else from the
    environment, else None.

    From now on it is in nothing that is printed or recorded (`config.scrub`): some servers repeat it in their errors.

    Raises:
        UserError: a key file that cannot be read, or a key that cannot be sent.
    """
    for folder in folders if folders is not None else (Path.cwd(), REPO, REPO / "src"):
        file = folder / KEY_FILE
        if file.exists():
            return _checked(_read(file), str(file))
    if value := os.environ.get(KEY_NAME, "").strip():
        return _checked(value, KEY_NAME)
    return None


def _read(file: Path) -> str:
    try:
        others = file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}); it must be {_FORM}") from None
    if others and os.name == "posix":  # elsewhere the bits say nothing
        print(f"warning: {file} can be read by other users of this machine; run: chmod 600 {file}", file=sys.stderr)
    try:
        value = json.loads(content)[KEY_NAME]
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{file}: must be {_FORM}") from None  # the parser's own error holds the file's text
    return value.strip()


def _checked(value: str, source: str) -> ApiKey:
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise UserError(f"{source}: the key has characters that no key has; copy it again")
    remember(value)
    return ApiKey(value, source)
