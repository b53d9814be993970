"""Data files of every kind: their rows, where each stands, and what is told of a file that cannot be read."""

import gzip
import random

import pytest

from config.user_error import UserError
from utils.data.files import read_jsonl
from utils.data.rows import BadRow


def read(path):
    return list(read_jsonl(path))


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
def test_reads_bom_crlf_blank_lines_and_a_missing_last_line_end(tmp_path, name):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa4"}'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name) == [(1, {"a": 1}), (4, {"a": "ä"})]


def test_gzip_is_told_by_its_content(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert read(tmp_path / "f.jsonl") == [(1, {"a": 1})]


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert read(tmp_path / "f.jsonl") == [(1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON (Expecting value at character 0)"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 text (byte 0xff at 7); save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b"[" * 100_000, "one JSON object per line"),
        (b"9" * 5000, "one JSON object per line"),
    ],
)
def test_bad_lines_name_their_line_and_reading_goes_on(tmp_path, line, message):
    (tmp_path / "f.jsonl").write_bytes(b'{"a": 1}\n' + line.replace(b"\n", b"") + b'\n{"a": 2}\n')
    rows = read(tmp_path / "f.jsonl")
    assert [number for number, _ in rows] == [1, 2, 3] and rows[2][1] == {"a": 2}
    assert isinstance(rows[1][1], BadRow)
    assert str(rows[1][1]).startswith(f"{tmp_path}/f.jsonl:2: ") and message in str(rows[1][1])


def test_unreadable_files(tmp_path, monkeypatch):
    whole = gzip.compress(b'{"a": 1}\n' * 5000 + random.Random(0).randbytes(5000).hex().encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"a": 1}\n')
    (tmp_path / "folder.jsonl").mkdir()
    cases = {
        "torn.jsonl.gz": "gzip data is damaged or cut short after line",
        "plain.jsonl.gz": "is named .gz but is not gzip data",
        "folder.jsonl": "is a directory; a .jsonl, .json, .csv, .tsv, .parquet or .txt file is needed",
        "missing.jsonl": "no such file",
        "x" * 5000: "cannot be read: File name too long",
        "nul\0.jsonl": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert message in str(caught.value) and "\n" not in str(caught.value)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("utils.data.files.open_binary", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read(tmp_path / "plain.jsonl.gz")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.files.MAX_LINE_BYTES", 2**20)
    (tmp_path / "f.jsonl").write_bytes(b"[" + b"1," * 2**20)
    with pytest.raises(UserError, match="f.jsonl:1: a line over 1 MiB; write one JSON object per line"):
        read(tmp_path / "f.jsonl")
