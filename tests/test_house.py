"""The house of src/: how large folders and files may be, what they are called, and which way imports run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src"
MODULES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")
MOST_MODULES, MOST_LINES = 14, 500
# Files that may be longer, each with the reason.
LONGER: dict[str, str] = {}


def test_no_folder_has_more_modules_than_a_reader_takes_in():
    folders = {path.parent for path in MODULES}
    counts = {str(folder.relative_to(REPO)): sum(m.parent == folder for m in MODULES) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_MODULES} == {}


def test_no_file_is_longer_than_a_reader_follows():
    lines = {str(path.relative_to(SRC)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {name for name, count in lines.items() if count > MOST_LINES}
    assert long == set(LONGER), {name: lines[name] for name in long}


def test_names_do_not_repeat_their_room():
    stutter = [
        path for path in MODULES if path.parent.parent != SRC and path.parent.name.rstrip("s") in path.stem.split("_")
    ]
    assert stutter == []


def test_names_say_what_is_inside():
    nothing = {"helper", "helpers", "common", "misc", "base", "util", "tools"}
    assert [path for path in MODULES if nothing & set(path.stem.split("_"))] == []


def test_tests_stand_where_their_modules_do():
    """A test file in a folder of src/ is about that folder: the folder exists there."""
    folders = {path.parent.relative_to(REPO / "tests") for path in (REPO / "tests").rglob("test_*.py")}
    assert [folder for folder in folders if not (SRC / folder).is_dir()] == []


@pytest.mark.parametrize(
    ("importer", "line", "broken"),
    [
        ("", "", ""),
        ("utils/loss.py", "import training.loop", "config <- utils"),
        ("models/gpt.py", "from inference import answers", "config <- utils"),
        ("models/lora.py", "def late():\n    from models import gpt", "No circles"),
        ("training/start.py", "from utils import evaluate", "Nothing imports a script"),
    ],
)  # fmt: skip
def test_imports_run_downward_and_never_in_a_circle(tmp_path, importer, line, broken):
    """The contracts of pyproject.toml hold, and one import that breaks one of them is found."""
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    if importer:
        with (tmp_path / "src" / importer).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=tmp_path, env={"PYTHONPATH": "src"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == bool(broken), done.stdout
    assert [name for name in re.findall(r"^(.+) BROKEN", done.stdout, re.M) if not name.startswith(broken)] == []
