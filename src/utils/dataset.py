"""Tokenised datasets that trainers index, by name or file, and the cache that makes them once.

The names and where their rows come from are in utils/data/sources.py; how rows are divided into splits in
utils/data/splits.py; how they are tokenised and cut in utils/data/token_table.py.

Shapes: N rows, P tokens of a prompt, T tokens of a response, K completions of one row.
"""

import hashlib
import json
import operator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from config.scrub import scrubbed
from config.user_error import UserError
from utils.data.examples import RankedExample, SFTExample
from utils.data.rows import STAGES
from utils.data.sources import open_source
from utils.data.splits import SPLITS, SplitOptions
from utils.data.token_cache import default_cache_dir, read_arrays, write_arrays
from utils.data.token_table import Counts, LengthLimits, TokenTable, tokenize_rows
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer

_CACHE_VERSION = 3  # raise it when the same rows would give other tokens
# Version 2 read fewer forms, kept CR in some texts and dropped long plain texts: data without any of these
# (`Counts.renewed`) have its fingerprint still, so that its runs can be gone on with.
_SAME_ROWS_VERSION = 2
# Runs of version 1 may be gone on with: its rows were the same, but that white space in a first turn could put parts of
# one conversation on two sides of a split.
_EARLIER_VERSION = 1


@dataclass
class DatasetReport(Counts):
    """What was read and what became of it; see `Counts` for the fields."""

    name: str = ""
    stage: str = ""
    split: str = ""
    tokens: int = 0
    """Of all rows kept, prompts and responses (a shared prompt once)."""

    def summary(self) -> str:
        """One line for the terminal."""
        notes = {
            "with the prompt cut from the left": self.cut,
            "dropped as too long": self.dropped,
            f"long texts in {self.pieces:,} pieces": self.long,
            "bad": self.bad,
            "with nothing said": self.empty,
            "duplicates": self.duplicates,
            "left out because their conversation is in the test split": self.of_test,
        }
        shown = "".join(f", {count:,} {what}" for what, count in notes.items() if count)
        first = f" (first bad row: {self.first_bad})" if self.first_bad else ""
        return f"{self.name} {self.stage} {self.split}: {self.kept:,} rows, {self.tokens:,} tokens{shown}{first}"


class TokenDataset:
    """Tokenised rows that can be indexed; `lengths` [N] int64 are the tokens of each row.

    fingerprint: of all that decides the rows. earlier_fingerprint: what the code of version 1 gave for them, or "".
    """

    def __init__(self, table: TokenTable, report: DatasetReport, fingerprint: str, earlier: str):
        self.table = table
        self.report = report
        self.fingerprint = fingerprint
        self.earlier_fingerprint = earlier
        self.lengths = table.lengths

    def __len__(self) -> int:
        return len(self.table)

    def _row(self, i: int) -> int:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return i % len(self)


class SFTDataset(TokenDataset):
    """Demonstrations or plain text."""

    def __getitem__(self, i: int) -> SFTExample:
        row = self._row(i)
        return SFTExample(self.table.prompts[self.table.prompt_of[row]], self.table.responses[row])


class RankedDataset(TokenDataset):
    """Rankings of K >= 2 completions; K may differ from row to row, and `lengths` are of the longest completion."""

    def __getitem__(self, i: int) -> RankedExample:
        row = self._row(i)
        completions = range(self.table.row_start[row], self.table.row_start[row + 1])
        return RankedExample(
            tuple(self.table.prompts[self.table.prompt_of[m]] for m in completions),
            tuple(self.table.responses[m] for m in completions),
        )


class PromptDataset(TokenDataset):
    """Prompts, each an array [P] int32."""

    def __getitem__(self, i: int) -> np.ndarray:
        return self.table.prompts[self._row(i)]


def load_dataset(
    name_or_path: str,
    stage: str,
    split: str,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    max_prompt_length: int | None = None,
    cache_dir: str | Path | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    splits: SplitOptions | None = None,
    template: PromptTemplate | None = None,
) -> SFTDataset | RankedDataset | PromptDataset:
    """Reads, divides, tokenises and cuts a dataset, or takes the result of doing so from the cache.

    Args:
        name_or_path: a name of the table above, or the path of a file.
        stage: "sft" (prompt and response), "rm" (ranked completions), "ppo" (prompts), "text" (plain text).
        split: "train", "validation" or "test".
        tokenizer: gives the ids.
        max_length: tokens of prompt, response and EOS together. A longer row loses the beginning of its prompt; it is
            dropped when the response alone does not fit. A response is never cut.
        max_prompt_length: tokens of a prompt alone; for "ppo" by default `max_length` - 1.
        cache_dir: of the token cache; by default `utils.data.token_cache.default_cache_dir()`.
        skip_bad_rows: count malformed rows instead of stopping at the first.
        limit: use at most the first so many rows of the split.
        splits: how rows are divided; the same in all stages of an experiment.
        template: how dialogues are written; by default HH-RLHF's way.

    Raises:
        UserError: there is no such dataset, it does not suit the stage, it cannot be read, or nothing of it is left.
    """
    _check_arguments(stage, split, max_length, max_prompt_length, limit)
    splits, template = splits or SplitOptions(), template or PromptTemplate()
    source = open_source(name_or_path, stage, template=template, options=splits, skip_bad_rows=skip_bad_rows)
    if stage == "ppo" and max_prompt_length is None:
        max_prompt_length = max_length - 1
    limits = LengthLimits(max_length, max_prompt_length, template.cue_length(tokenizer))
    if max_prompt_length is not None and max_prompt_length < limits.cue_length:
        raise UserError(
            f"max_prompt_length: {max_prompt_length} tokens do not hold the cue to answer ({limits.cue_length} tokens)"
        )
    content = source.fingerprint()
    settings = [stage, split, skip_bad_rows, limit, asdict(splits), template.to_dict(), asdict(limits)]
    decides = [type(source).__name__, content, tokenizer.identity()["sha256"], settings]
    key, same, earlier = (
        _sha256([version, *decides]) for version in (_CACHE_VERSION, _SAME_ROWS_VERSION, _EARLIER_VERSION)
    )
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)

    cached = _from_cache(folder, key, tokenizer.vocab_size)
    if cached is None:
        shown = f"{source.name} {stage} {split}"
        table = tokenize_rows(islice(source.rows(split), limit), tokenizer, limits, source.counts, shown, template)
        tokens = len(table.prompts.flat) + len(table.responses.flat)
        report = DatasetReport(**asdict(source.counts), name=source.name, stage=stage, split=split, tokens=tokens)
        if source.fingerprint() != content:
            raise UserError(f"{name_or_path}: was changed while it was being read; start again when it is complete")
        if not len(table):
            raise UserError(
                f"--dataset {name_or_path}: nothing is left: {report.summary()} (at most {max_length} tokens a row)"
            )
        write_arrays(folder, key, table.to_arrays() | {"report": _json_array(scrubbed(asdict(report)))})
    else:
        table, report = cached
        # The entry may have been made from a copy of the data under another name.
        if report.first_bad.startswith(f"{report.name}:"):
            report.first_bad = source.name + report.first_bad.removeprefix(report.name)
        report.name = source.name
    fingerprints = (key, "") if report.renewed or report.long else (same, earlier)
    return _DATASET_OF_STAGE[stage](table, report, *fingerprints)


_DATASET_OF_STAGE = {"sft": SFTDataset, "text": SFTDataset, "rm": RankedDataset, "ppo": PromptDataset}


def _check_arguments(stage: str, split: str, max_length: int, max_prompt_length: int | None, limit: int | None) -> None:
    if stage not in STAGES:
        raise UserError(f"stage {stage}: not known; choose {', '.join(STAGES)}")
    if split not in SPLITS:
        raise UserError(f"split {split}: not known; choose {', '.join(SPLITS)}")
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name}: has to be at least 1, not {value}")


def _from_cache(folder: Path, key: str, vocab_size: int) -> tuple[TokenTable, DatasetReport] | None:
    arrays = read_arrays(folder, key)
    if arrays is None:
        return None
    try:
        report = DatasetReport(**json.loads(bytes(arrays["report"])))
        return TokenTable.from_arrays(arrays, vocab_size), report
    except (KeyError, ValueError, TypeError):
        return None  # written by other code under the same key: as good as no entry


def _json_array(data: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(data).encode(), dtype=np.uint8)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
