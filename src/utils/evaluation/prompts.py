"""The prompts that an evaluation asks: the project's own, a file of yours, the demo's held-out ones, or the hub's.

    FILE              rows of a file of any kind and form that training reads (utils/data/files.py, utils/data/rows.py)
    FILE.txt          one prompt a line; blank lines are passed over
    demo              the held-out test prompts of the offline demo
    hub:OWNER/NAME    the training split of a dataset on the Hugging Face hub, for instance
                      hub:fka/awesome-chatgpt-prompts

Every prompt is brought to the form that training used (`utils.template`), and one that occurs twice is asked once,
because the figures take prompts for independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from config.user_error import UserError
from utils.data.files import KINDS_TOLD, read_rows
from utils.data.rows import BadRow, parse_row
from utils.data.sources import load_from_hub
from utils.runs.folder import REPO, typed_path
from utils.template import PromptTemplate

DEFAULT_FILE = REPO / "assets/prompts.csv"
DEMO_FILE = REPO / "assets/demo/prompts-test.jsonl.gz"
FLAG = "--prompts"


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
    path = DEMO_FILE if spec == "demo" else typed_path(spec)
    if not path.exists() and (REPO / path).exists():
        path = REPO / path
    if not path.exists():
        raise UserError(f"{FLAG} {spec}: no such file; give a {KINDS_TOLD} file, hub:OWNER/NAME or demo")
    rows = ((f"{path}:{number}", data) for number, data in read_rows(path))
    return rows, "the demo's held-out test prompts" if spec == "demo" else str(path)


def _hub_rows(spec: str) -> Iterator[tuple[str, Any]]:
    """Rows of the hub's training split."""
    name = spec.removeprefix("hub:")
    rows = load_from_hub(name, "train", f"{FLAG} {spec}:", "give a local file")
    return ((f"{name} train, row {i}", data) for i, data in enumerate(rows))
