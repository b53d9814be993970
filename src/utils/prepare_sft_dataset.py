"""Makes the SFT split of HH-RLHF: `python src/utils/prepare_sft_dataset.py`, once, before `--dataset hh-sft`.

    --hh hub|PATH          HH-RLHF; the hub's training split by default, or a local file of whole dialogues
    --rm-static hub|PATH   what the reward model trains and is tested on; all its conversations stay out of the split
    --out PATH             runs/data/hh-sft.jsonl by default, which is where the dataset name hh-sft looks
    --skip-bad-rows        count malformed rows of a local file instead of stopping at the first

HH-RLHF holds several beginnings of one conversation. A row is kept unless its conversation, told by the person's first
turn as everywhere (utils/data/splits.py), is one of rm-static's. So no question that the reward model trains on was
answered in SFT. What is kept is written as {"prompt", "response"} of the chosen side, each demonstration once; rows
stream through, and only 8-byte hashes stay in memory.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    importlib.import_module("config")  # before any package: it tells of those that are missing

from tqdm import tqdm

from config.command_line import flags_of
from config.user_error import UserError, run_main
from utils.data.rows import Row
from utils.data.sources import HH_SFT_FILE, AnthropicHHRLHFDataset, DahoasRMStaticDataset, HubDataset, JSONLDataset
from utils.runs.durable import whole_file
from utils.runs.folder import typed_path
from utils.template import PromptTemplate


@dataclass(frozen=True)
class PrepareConfig:
    """Writes the rows of HH-RLHF whose conversation is not in rm-static, as demonstrations for SFT."""

    hh: str = "hub"
    """HH-RLHF: "hub", or a local file of "chosen" and "rejected" dialogues."""
    rm_static: str = "hub"
    """rm-static: "hub", or a local file of "prompt", "chosen" and "rejected"."""
    out: Path = HH_SFT_FILE
    """The file to write; it appears only when it is whole."""
    skip_bad_rows: bool = False
    """Count malformed rows of a local file instead of stopping at the first."""


@dataclass
class PrepareReport:
    """What became of the rows of HH-RLHF; `read` is the sum of written, in_rm_static, duplicates, empty and bad."""

    read: int = 0
    written: int = 0
    in_rm_static: int = 0
    """Rows of a conversation that rm-static has, whether with the same replies or others."""
    duplicates: int = 0
    empty: int = 0
    bad: int = 0


def prepare(config: PrepareConfig) -> PrepareReport:
    """Writes the file and returns the counts.

    Raises:
        UserError: a source cannot be read, the file cannot be written, or no row is left for it.
    """
    if config.out.is_dir():
        raise UserError(f"--out {config.out}: is a directory; give the path of a .jsonl file")
    hh = _source(config.hh, AnthropicHHRLHFDataset, "--hh", config.skip_bad_rows)
    rm_static = _source(config.rm_static, DahoasRMStaticDataset, "--rm-static", config.skip_bad_rows)
    seen_by_rm: set[bytes] = set()
    for row in tqdm(_rows(rm_static, ("train", "test")), desc="rm-static", unit=" rows", delay=1, disable=None):
        seen_by_rm |= _conversations(row)
    report = PrepareReport()
    rows = tqdm(_rows(hh, ("train",)), desc="HH-RLHF", unit=" rows", delay=1, disable=None)
    try:
        with whole_file(config.out) as file:
            if hasattr(os, "fchmod"):  # not on Windows
                os.fchmod(file.fileno(), 0o644)
            file.writelines(_demonstrations(rows, seen_by_rm, report))
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written: {error.strerror or error}") from None
    report.read, report.bad = hh.counts.read, hh.counts.bad
    return report


def _demonstrations(rows: Iterator[Row], seen_by_rm: set[bytes], report: PrepareReport) -> Iterator[bytes]:
    """Lines of JSON for the rows to keep; counts the others, and complains at the end if nothing was kept."""
    written: set[bytes] = set()
    for row in rows:
        demonstration = _hash(row.prompts[0] + row.completions[0])
        if _conversations(row) & seen_by_rm:
            report.in_rm_static += 1
        elif not row.completions[0]:
            report.empty += 1
        elif demonstration in written:
            report.duplicates += 1
        else:
            written.add(demonstration)
            report.written += 1
            line = json.dumps({"prompt": row.prompts[0], "response": row.completions[0]}, ensure_ascii=False)
            yield f"{line}\n".encode()
    if not written:
        raise UserError(
            f"--hh: no row is left to write: {report.in_rm_static} are of conversations in --rm-static, {report.empty} "
            "say nothing; are both flags the same file?"
        )


def _source(value: str, hub_class: type[HubDataset], flag: str, skip_bad_rows: bool) -> HubDataset | JSONLDataset:
    if value == "hub":
        source = hub_class("rm")
        source.flag = flag
        return source
    if not typed_path(value).exists():
        raise UserError(f'{flag} {value}: no such file; give "hub" or the path of a file of rankings')
    return JSONLDataset("rm", value, skip_bad_rows=skip_bad_rows)


def _rows(source: HubDataset | JSONLDataset, splits: tuple[str, ...]) -> Iterator[Row]:
    if isinstance(source, JSONLDataset):
        yield from source.file_rows(source.path)
        return
    for split in splits:
        yield from source.hub_rows(split)


def _conversations(row: Row) -> set[bytes]:
    """Hashes of the conversations that a row's dialogues begin: nearly always one."""
    return {_hash(PromptTemplate().opening(prompt)) for prompt in row.prompts}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` is for tests."""
    config = flags_of(PrepareConfig, argv, __doc__)
    report = prepare(config)
    print(
        f"{config.out}: {report.written:,} demonstrations from {report.read:,} rows; left out: "
        f"{report.in_rm_static:,} of conversations in rm-static, {report.duplicates:,} duplicates, "
        f"{report.empty:,} that say nothing, {report.bad:,} bad"
    )


if __name__ == "__main__":
    run_main(main)
