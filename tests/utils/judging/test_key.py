"""The key: where it comes from, and that it is never shown."""

import json
from pathlib import Path

import pytest

from config.scrub import scrub
from config.user_error import UserError
from utils.judging.key import find_key

KEY = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write(folder: Path, content: str, mode: int = 0o600) -> Path:
    file = folder / "openai.key"
    file.write_text(content)
    file.chmod(mode)
    return file


def test_the_first_file_comes_before_the_environment(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert find_key((one, two)) is None
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert find_key((one, two)).value == "from-environment"
    write(two, json.dumps({"OPENAI_API_KEY": KEY + "\n"}))
    assert find_key((one, two)).value == KEY
    write(one, json.dumps({"OPENAI_API_KEY": "first"}))
    assert find_key((one, two)).value == "first"


def test_the_working_folder_is_looked_in(tmp_path, monkeypatch):
    write(tmp_path, json.dumps({"OPENAI_API_KEY": KEY}))
    monkeypatch.chdir(tmp_path)
    key = find_key()
    assert key.value == KEY and key.source == str(tmp_path / "openai.key")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_can_open_is_warned_about(tmp_path, capsys, mode):
    file = write(tmp_path, json.dumps({"OPENAI_API_KEY": KEY}), mode)
    assert find_key((tmp_path,)).value == KEY
    shown = capsys.readouterr()
    assert shown.out == "" and KEY not in shown.err
    assert shown.err.startswith("warning:") and f"chmod 600 {file}" in shown.err and shown.err.count("\n") == 1


def test_a_private_file_is_not(tmp_path, capsys):
    write(tmp_path, json.dumps({"OPENAI_API_KEY": KEY}))
    find_key((tmp_path,))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content",
    ["", KEY, f'{{"OPENAI_API_KEY": {KEY}}}', f'{{"key": "{KEY}"}}', f'["{KEY}"]', '{"OPENAI_API_KEY": " "}',
     '{"OPENAI_API_KEY": 3}', f'{{"OPENAI_API_KEY": "{KEY} {KEY}"}}', f'{{"OPENAI_API_KEY": "{KEY}é"}}',
     f'{{"OPENAI_API_KEY": "{KEY}\\nx"}}']
)  # fmt: skip
def test_a_bad_file_is_one_line_without_the_key(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(UserError, match="openai.key: ") as error:
        find_key((tmp_path,))
    assert KEY not in str(error.value) and error.value.__suppress_context__ | (error.value.__context__ is None)


def test_neither_repr_nor_errors_show_it(tmp_path):
    write(tmp_path, json.dumps({"OPENAI_API_KEY": KEY}))
    key = find_key((tmp_path,))
    assert KEY not in repr(key) + str(key) + f"{key}"
    assert scrub(f"wrong key {KEY}!") == "wrong key [secret]!"
