"""The prompts that an evaluation asks: the project's own, a file of yours, the demo's held-out ones, or the hub's.

    FILE.csv          a column "prompt"; other columns are ignored
    FILE.jsonl        rows with a "prompt", or dialogues in the HH form; the forms of `utils.data.rows`
    FILE.txt          one prompt a line; blank lines are passed over
    demo              the held-out test prompts of the offline demo
    hub:OWNER/NAME    the column "prompt" of a dataset on the Hugging Face hub, for instance
                      hub:fka/awesome-chatgpt-prompts

Files may be compressed with gzip. Every prompt is brought to the form that training used (`utils.template`), and one
that occurs twice is asked once, because the figures take prompts for independent.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.user_error import UserError
from utils.data.rows import BadRow, open_binary, parse_row, read_jsonl
from utils.data.sources import load_from_hub
from utils.runs.folder import REPO
from utils.template import PromptTemplate

DEFAULT_FILE = REPO / "assets/prompts.csv"
DEMO_FILE = REPO / "assets/demo/prompts-test.jsonl.gz"
FLAG = "--prompts"
_FORMS = "FILE.csv, FILE.jsonl, FILE.txt, hub:OWNER/NAME or demo"


@dataclass(frozen=True)
class Prompts:
    """Prompts as the models see them.

    texts: in the template's form, no two alike. repeated: how many more there were of the same text. of_demo: they are
    the demo's, so its gold reward knows what they ask.
    """

    texts: list[str]
    source: str
    repeated: int
    of_demo: bool = False


def read_prompts(spec: str, template: PromptTemplate, limit: int = 0) -> Prompts:
    """The prompts that `--prompts` means.

    Args:
        spec: see above; a path counts from the working directory, or else from the repository.
        template: how dialogues are written.
        limit: take the first so many; 0: all.

    Raises:
        UserError: no such file, a form that is not known, a malformed row (named by its line), or no prompt at all.
    """
    rows, source = _rows(spec)
    texts: dict[str, None] = {}
    read = 0
    for where, data in rows:
        if isinstance(data, BadRow):
            raise data
        texts[parse_row(data, "ppo", where, template).prompts[0]] = None
        read += 1
        if limit and len(texts) == limit:
            break
    if not texts:
        raise UserError(f"{FLAG} {spec}: has no prompt in it")
    return Prompts(list(texts), source, read - len(texts), spec == "demo")


def _rows(spec: str) -> tuple[Iterator[tuple[str, Any]], str]:
    """(file and line, decoded row) of every prompt, and what to call the source."""
    if spec.startswith("hub:"):
        return _hub_rows(spec), spec
    path = DEMO_FILE if spec == "demo" else Path(spec).expanduser()
    if not path.exists() and (REPO / path).exists():
        path = REPO / path
    if not path.is_file():
        raise UserError(f"{FLAG} {spec}: no such file; give {_FORMS}")
    readers = {"csv": _csv_rows, "jsonl": read_jsonl, "txt": _txt_rows}
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in readers:
        raise UserError(f"{FLAG} {spec}: what kind of file that is, its name has to tell; give {_FORMS}")
    rows = ((f"{path}:{number}", data) for number, data in readers[kind](path))
    return rows, "the demo's held-out test prompts" if spec == "demo" else str(path)


def _txt_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(path), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(_text(path), strict=True)
    try:
        columns = reader.fieldnames or []
        if "prompt" not in columns:
            raise UserError(f'{path}:1: has no column "prompt" (columns: {", ".join(columns) or "none"}); add one')
        for row in reader:
            yield reader.line_num, {"prompt": row["prompt"] or ""}
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own count stops at the last good row
        raise UserError(f"{path}:{line}: not CSV ({error}); quote fields that hold commas or quotes") from None


def _text(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file, line ends untouched: a CSV field may hold some."""
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _hub_rows(spec: str) -> Iterator[tuple[str, Any]]:
    """Rows of the hub's training split."""
    name = spec.removeprefix("hub:")
    rows = load_from_hub(name, "train", f"{FLAG} {spec}:", "give a local file")
    if "prompt" not in rows.column_names:
        raise UserError(f'{FLAG} {spec}: has no column "prompt" (columns: {", ".join(rows.column_names)})')
    for i, prompt in enumerate(rows["prompt"]):
        yield f"{name} train, row {i}", {"prompt": prompt}
