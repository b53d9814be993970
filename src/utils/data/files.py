"""Rows of data files, whatever kind of file they are in: one at a time, each with the row or line it stands at.

    JSON Lines   an object a line                     any name but those below; blank lines are passed over
    JSON         one array of objects                 .json that starts with "[" (any other .json is JSON Lines)
    CSV, TSV     the first line names the columns     .csv, .tsv; every cell stays the text that it is
    text         one prompt a line                    .txt; blank lines are passed over
    parquet      a column a key, also nested ones     told by its first bytes

Text is UTF-8, with or without a byte order mark. All but parquet may be compressed with gzip or zstandard, also told by
the first bytes.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

from config.user_error import UserError
from utils.data.rows import BadRow

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is no row: most likely the file is one big JSON array under another name."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Names of files that are read; also before .gz and .zst."""

KINDS_TOLD = ".jsonl, .json, .csv, .tsv, .parquet or .txt"

# First bytes of what is not read, and what to do with it.
_FOREIGN = {
    b"PK\x03\x04": "is an Excel workbook or a zip archive; save the sheet as CSV UTF-8, or unpack the archive",
    b"\xd0\xcf\x11\xe0": "is an old Office document; save the sheet as CSV UTF-8",
    b"ARROW1": "is an Arrow file; save it as .parquet with `datasets.Dataset.from_file(...).to_parquet(...)`",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed with xz; unpack it, or compress it with gzip",
    b"%PDF": f"is a PDF document; give rows in a {KINDS_TOLD} file",
    b"version https://git-lfs": "is a pointer of Git LFS; `git lfs pull` fetches the file itself",
    b"<!DOCTYPE": "is a web page; download the file itself",
    b"<!doctype": "is a web page; download the file itself",
    b"SQLite": "is a database; write the table as CSV",
}
_CHUNK = 2**16  # characters: more would be copied too often, once for every row in it
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_JSON = re.compile(rb'(\[\s*)?\{\s*"[^"]*"\s*:')
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Rows = Iterator[tuple[int, Any | BadRow]]


def is_data_file(name: str) -> bool:
    """Whether a name is one of a data file, whether or not there is such a file."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES) or name.endswith((".gz", ".zst"))


def read_rows(path: Path) -> Rows:
    """Every row of a file of any kind, read one after another.

    Yields:
        (number from 1, decoded value), or (number, BadRow) for a row that is malformed, so that the caller can count it
        and read on. The number is the line in JSON Lines, text and tables (where a row begins), else the row.

    Raises:
        UserError: the file cannot be read at all, or not to its end, or is of a kind that is not read.
    """
    readers = {"jsonl": read_jsonl, "json": _read_array, "parquet": _read_parquet, "txt": _read_prompts}
    kind = file_kind(path)
    yield from readers[kind](path) if kind in readers else _read_table(path, "," if kind == "csv" else "\t")


def file_kind(path: Path) -> str:
    """"jsonl", "json" (one array), "csv", "tsv", "txt" or "parquet".

    Raises:
        UserError: the file cannot be read, or is of a kind that is not read.
    """
    with _told(path):
        with open_binary(path) as file:
            start = file.peek(4096)[:4096]
    if start.startswith(_PARQUET):
        if path.suffix in (".gz", ".zst"):
            raise UserError(f"{path}: is compressed parquet; unpack it")
        return "parquet"
    if start.startswith(_UTF16):
        raise UserError(f"{path}: is UTF-16 text; save the file as UTF-8")
    for magic, remedy in _FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {remedy}")
    suffix = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    if suffix == ".parquet" and start:
        raise UserError(f"{path}: is named .parquet but is no parquet data; give it the name of what it is")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in (".csv", ".tsv", ".txt"):
        if _JSON.match(text) and text.partition(b"\n")[0].rstrip()[-1:] in b"}],{[":
            name = ".jsonl" if text.startswith(b"{") else ".json"
            raise UserError(f"{path}: is named {suffix} but holds JSON; name it {name}")
        return suffix.removeprefix(".")
    return "json" if suffix == ".json" and text.startswith(b"[") else "jsonl"


def read_jsonl(path: Path) -> Rows:
    """Reads JSON Lines; see `read_rows`. Lines end with LF or CRLF."""
    for number, line in _lines(path, open_binary):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _decode(line, f"{path}:{number}", number == 1)


def _decode(line: bytes, where: str, is_first: bool) -> Any | BadRow:
    told = "one JSON object per line is needed"
    if is_first and line.startswith(b"["):
        told += "; a file that is one JSON array is read when its name ends in .json"
    elif is_first and line.strip() == b"{":
        told += "; objects over many lines are read as one JSON array in a file whose name ends in .json"
    elif is_first and not line.lstrip().startswith((b"{", b'"')):
        told += "; what other kind of file it is, its name has to tell: .json, .csv, .tsv, .parquet, .txt"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            f"{where}: not UTF-8 text (byte 0x{line[error.start]:02x} at {error.start}); save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRow(f"{where}: not JSON ({error.msg} at character {error.pos}); {told}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"{where}: not usable JSON ({error}); one JSON object per line is needed")
    if is_first and isinstance(value, list):
        return BadRow(f"{where}: is a list of {len(value)}; {told}")
    return value


def _read_array(path: Path) -> Rows:
    """The elements of one JSON array, decoded one after another as the text comes in."""
    decoder, number = json.JSONDecoder(), 0
    with _told(path), _text(path) as file:
        text = file.read(_CHUNK).lstrip()[1:]
        while not (text := text.lstrip()).startswith("]"):
            where, end, fault = f"{path}:{number + 1}", len(text), "the file ends inside the array"
            try:
                value, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                fault = error.msg if text else fault
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not usable JSON ({error})") from None
            rest = text[end:].lstrip()
            if rest.startswith((",", "]")):  # so the value is whole
                number += 1
                yield number, _with_utf8(text[:end], where) or value
                text = rest.removeprefix(",")
                continue
            more = file.read(max(_CHUNK, len(text))) if not rest and len(text) <= MAX_LINE_BYTES else ""
            if not more:
                raise UserError(f"{where}: not JSON ({fault if not rest else 'a comma is missing behind it'})")
            text += more
        if (text[1:] + file.read(_CHUNK)).strip():
            raise UserError(f"{path}:{number}: there is more behind the end of the JSON array; remove it")


def _read_table(path: Path, separator: str) -> Rows:
    """Reads CSV or TSV; every cell is a text, and a field may be as long as a line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in _lines(path, _text)), delimiter=separator, strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        where = f"{path}:{number}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            mark = _SEPARATORS[separator]
            if columns is None:
                raise UserError(f"{where}: not CSV ({error}); {mark} have to be between its columns") from None
            remedy = f"quote fields that hold {mark} or quotes, and double those quotes"
            yield number, BadRow(f"{where}: not CSV ({error}); {remedy}")
            continue
        if cells is None:
            return
        if not any(cells):  # a blank line, or what a spreadsheet writes for an empty row
            continue
        if columns is None:
            columns = _columns(cells, where, separator)
        elif len(cells) != len(columns):
            has = f"has {len(cells)} field{'s' * (len(cells) != 1)}, the first line names {len(columns)} columns"
            yield number, BadRow(f"{where}: {has}; quote fields that hold {_SEPARATORS[separator]}")
        else:
            yield number, _with_utf8("".join(cells), where) or dict(zip(columns, cells, strict=True))


_SEPARATORS = {",": "commas", "\t": "tabs"}


def _columns(cells: list[str], where: str, separator: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    fault = _with_utf8("".join(columns), where)
    if fault is not None:
        raise UserError(str(fault))
    other = next((mark for mark in (",", "\t", ";", "|") if mark in columns[0]), None)
    if len(columns) == 1 and other not in (None, separator):
        remedy = {",": "name it .csv", "\t": "name it .tsv"}.get(other or "", "save it with commas, or tabs as .tsv")
        raise UserError(f"{where}: its columns are separated by {other!r}; {remedy}")
    return _without_twins(columns, where)


def _without_twins(columns: list[str], where: str) -> list[str]:
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called {json.dumps(twice)}; rename one of them")
    return columns


def _read_prompts(path: Path) -> Rows:
    for number, line in _lines(path, _text):
        if text := line.strip():
            yield number, _with_utf8(text, f"{path}:{number}") or {"prompt": text}


def _read_parquet(path: Path) -> Rows:
    """The rows of a parquet file, a thousand in memory at a time."""
    import pyarrow.parquet  # takes a moment; `datasets` brings it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _without_twins(file.schema_arrow.names, str(path))
            rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: parquet data is damaged or cut short ({reason}); copy the file again") from None


def _with_utf8(text: str, where: str) -> BadRow | None:
    """None, or what is wrong with a text that was decoded with "surrogateescape"."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return BadRow(f"{where}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8")
    return None


def _lines(path: Path, opener: Callable[[Path], IO[AnyStr]]) -> Iterator[tuple[int, AnyStr]]:
    """(number from 1, line with its end) of a file."""
    number = 0
    with _told(path, lambda: f"line {number}"), opener(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}:{number}: a line over {MAX_LINE_BYTES >> 20} MiB; write one JSON object per line"
                )
            yield number, line


def _text(path: Path) -> io.TextIOWrapper:
    """The text of a file, whose lines end with LF, CRLF or CR; bytes that are not UTF-8 become lone surrogates, which
    `_with_utf8` finds."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


@contextmanager
def _told(path: Path, position: Callable[[], str] = str) -> Iterator[None]:
    """Tells in one line that a file cannot be read, or not to its end."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        after = position() and f" after {position()}"
        raise UserError(
            f"{path}: gzip data is damaged or cut short{after} ({error}); copy the file again"
        ) from None
    except OSError as error:
        if error.errno is None:  # of the zstandard decoder
            raise UserError(f"{path}: zstandard data is damaged or cut short ({error}); copy the file again") from None
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading, through gzip or zstandard if it is compressed.

    Raises:
        UserError: there is no such regular file, or its name says another compression than it has. OSError when it
            cannot be opened.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; {_remedy_for(path)}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; a {KINDS_TOLD} file is needed")
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_GZIP):
        return gzip.open(path, "rb")
    if start == _ZSTD:
        import pyarrow  # Python's own decoder comes with 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(os.fspath(path)), "zstd"))
    for suffix, name in ((".gz", "gzip"), (".zst", "zstandard")):
        if path.suffix == suffix and start:
            raise UserError(f"{path}: is named {suffix} but is not {name} data; rename it, or compress it with {name}")
    return path.open("rb")


def _remedy_for(folder: Path) -> str:
    if (folder / "dataset_info.json").is_file():
        return f"one file is needed: datasets.load_from_disk({str(folder)!r}).to_parquet('all.parquet') writes it"
    if any(folder.glob("*.parquet")):
        made = f"datasets.load_dataset('parquet', data_files='{folder}/*.parquet', split='train')"
        return f"one file is needed: {made}.to_parquet('all.parquet') joins its parts"
    return f"a {KINDS_TOLD} file is needed"
