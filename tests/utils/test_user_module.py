"""Files of the user's that import what lies beside them, and neither get ours nor get into our way."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from config.user_error import UserError
from utils import user_module
from utils.reward_function import load_reward_function
from utils.runs.folder import REPO
from utils.user_module import import_user_file

SCORE = "def score(prompts, responses):\n    return [{} for _ in responses]\n"


def lay(folder: Path, files: dict[str, str]) -> Path:
    """Write files of these names and texts; the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def score(folder: Path, name: str = "reward.py") -> float:
    return load_reward_function(f"{folder / name}:score", "--reward-fn")(["p"], ["r"])[0]


LEXICON = {"lexicon.py": "WORTH = 7"}
WORDS = {"words/__init__.py": "", "words/good.py": "WORTH = 7"}
# what lies beside reward.py, and how it gets 7 from there
BESIDE = {
    "a module": (LEXICON, "from lexicon import WORTH as x\n"),
    "a module by name": (LEXICON, "import lexicon\nx = lexicon.WORTH\n"),
    "inside the function": (
        LEXICON, "def get():\n    from lexicon import WORTH\n    return WORTH\n", "get()"),
    "a package": (WORDS, "from words.good import WORTH as x\n"),
    "a package's module": (WORDS, "from words import good\n", "good.WORTH"),
    "a dotted name": (WORDS, "import words.good\n", "words.good.WORTH"),
    "a dotted name as": (WORDS, "import words.good as g\n", "g.WORTH"),
    "a folder without __init__": ({"words/good.py": "WORTH = 7"}, "from words.good import WORTH as x\n"),
    "a package that is relative inside": (
        {"words/__init__.py": "from .good import WORTH", "words/good.py": "from . import deep\nWORTH = deep.X",
         "words/deep.py": "X = 7"}, "from words import WORTH as x\n"),
    "a package that is absolute inside": (
        {"words/__init__.py": "from words.good import WORTH", "words/good.py": "WORTH = 7"},
        "from words import WORTH as x\n"),
    "a chain": ({"a.py": "def f():\n    import b\n    return b.X", "b.py": "X = 7"}, "from a import f\n", "f()"),
    "a circle": ({"a.py": "import reward\ndef f(): return reward.seven"}, "seven = 7\nfrom a import f\n", "f()"),
    "a relative import": (LEXICON, "from .lexicon import WORTH as x\n"),
    "everything": ({"lexicon.py": "x = 7"}, "from lexicon import *\n"),
    "a data file": (
        {"worth.txt": "7"}, "from pathlib import Path as P\nx = P(__file__).with_name('worth.txt').read_text()\n",
        "float(x)"),
    "one called like ours": ({"utils.py": "WORTH = 7"}, "from utils import WORTH as x\n"),
    "a package called like ours": (
        {"models/__init__.py": "", "models/gpt.py": "X = 7"}, "from models.gpt import X as x\n"),
    "config, inside the function": (
        {"config.py": "X = 7"}, "def f():\n    import config\n    return config.X\n", "f()"),
    "one called like a package": ({"torch.py": "X = 7"}, "from torch import X as x\n"),
    "one called like the standard library's": ({"random.py": "X = 7"}, "from random import X as x\n"),
    "a folder called like a package": ({"numpy/notes.txt": ""}, "import numpy\n", "numpy.float32(7)"),
    "one called like what is built in": ({"time.py": "1 / 0"}, "import time\n", "7 if time.time() else 0"),
    "the standard library": (
        {}, "import collections.abc, os.path\n", "7 if os.path.sep and collections.abc.Sized else 0"),
    "typing and dataclasses": (
        {}, "from __future__ import annotations\nfrom dataclasses import dataclass, field\n@dataclass\nclass J:\n"
            "    x: int = field(default=7)\n", "J().x"),
    "worker processes": (
        {"lexicon.py": "def worth(_): return 7"},
        "from multiprocessing import get_context\nfrom lexicon import worth\ndef f():\n"
        "    with get_context('fork').Pool(1) as pool: return pool.map(worth, [0])[0]\n", "f()"),
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_a_file_is_found(beside, tmp_path: Path) -> None:
    files, text, *value = beside
    before, ours = [*sys.path], {name: module for name, module in sys.modules.items() if "user_folder" not in name}
    lay(tmp_path, {"reward.py": text + SCORE.format(*value or ["x"])} | files)
    assert score(tmp_path) == 7.0
    assert sys.path == before
    assert {name: sys.modules.get(name) for name in ours} == ours


def test_ours_are_ours_for_a_file_that_has_none_of_that_name(tmp_path: Path) -> None:
    text = "from utils.demo.gold import gold_reward\n" + SCORE.format("gold_reward is not None")
    assert score(lay(tmp_path, {"reward.py": text})) == 1.0
    gold = import_user_file(REPO / "src" / "utils" / "demo" / "gold.py")
    assert gold.facts is sys.modules["utils.demo.facts"]


def test_a_file_in_src_gets_ours_and_no_copies(monkeypatch, tmp_path: Path) -> None:
    lay(tmp_path, {"reward.py": "import inner.deep\n" + SCORE.format("inner.deep.X"), "inner/__init__.py": "",
                   "inner/deep.py": "X = 7"})  # fmt: skip
    monkeypatch.setattr(user_module, "_SRC", tmp_path.resolve())
    monkeypatch.syspath_prepend(tmp_path)
    assert score(tmp_path) == 7.0 and sys.modules.pop("inner.deep").X == 7 and sys.modules.pop("inner")


def test_two_files_of_one_name_and_their_neighbours_are_kept_apart(tmp_path: Path) -> None:
    text = "def score(p, r):\n    import lexicon\n    return [lexicon.WORTH]\n"
    one, two = (lay(tmp_path / str(i), {"reward.py": text, "lexicon.py": f"WORTH = {i}"}) for i in (1, 2))
    scores = [load_reward_function(f"{folder}/reward.py:score", "--reward-fn") for folder in (one, two)]
    assert [function(["p"], ["r"]) for function in scores * 2] == [[1.0], [2.0], [1.0], [2.0]]


def test_a_file_that_is_named_twice_has_its_state_twice_and_can_be_pickled(tmp_path: Path) -> None:
    """As `--reward-fn` and `--eval-reward-fn`; what it imports from its folder is one module."""
    text = "import shared\nclass Own: pass\nshared.n += 1\ncalls = []\n" + SCORE.format("calls.append(1) or len(calls)")
    lay(tmp_path, {"reward.py": text, "shared.py": "n = 0"})
    assert [score(tmp_path), score(tmp_path)] == [1.0, 1.0]
    modules = [import_user_file(tmp_path / "reward.py") for _ in range(2)]
    assert modules[0].shared is modules[1].shared and modules[0].shared.n == 4
    for module in modules:
        assert type(pickle.loads(pickle.dumps(module.Own()))) is module.Own


@pytest.mark.parametrize("name", ["my-reward.py", "my reward.py", "1.py", "v1.2.py", "utils.py", "caf\u00e9.py"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    lay(tmp_path, {name: "from lexicon import WORTH\n" + SCORE.format("WORTH")} | LEXICON)
    assert score(tmp_path, name) == 7.0


def test_what_a_file_makes_can_be_pickled(tmp_path: Path) -> None:
    lay(tmp_path, {"reward.py": "from lexicon import Word\nclass Own: pass\n", "lexicon.py": "class Word: pass\n"})
    module = import_user_file(tmp_path / "reward.py")
    for kind in (module.Own, module.Word):
        assert type(pickle.loads(pickle.dumps(kind()))) is kind


@pytest.mark.parametrize(("text", "told"), [
    ("import lexicon", "ModuleNotFoundError: No module named 'lexicon'"),
    ("from broken import x", "SyntaxError"),
    ("from here import nothing", "ImportError: cannot import name 'nothing'"),
    ("from ... import x", "ImportError: attempted relative import beyond"),
])  # fmt: skip
def test_what_cannot_be_imported_is_told_and_may_be_mended(text: str, told: str, tmp_path: Path) -> None:
    lay(tmp_path, {"reward.py": text, "broken.py": "x = (", "here.py": ""})
    with pytest.raises(UserError, match=f"importing .*reward.py failed: {told}"):
        score(tmp_path)
    lay(tmp_path, {"reward.py": SCORE.format(7)})
    assert score(tmp_path) == 7.0


def test_from_another_folder_and_with_a_relative_path(tmp_path: Path) -> None:
    """As a process: `python src/training/...` from the repo, the file by a relative path, a neighbour that is lazy."""
    lay(tmp_path, {"reward.py": "from pathlib import Path\ndef score(p, r):\n    import utils\n"
                                "    return [utils.X + float(Path(__file__).with_name('n.txt').read_text())]\n",
                   "utils.py": "X = 3", "n.txt": "4"})  # fmt: skip
    code = (
        f"import sys, json; sys.path[0] = {str(REPO / 'src')!r}\n"
        "from utils.reward_function import load_reward_function\n"
        "f = load_reward_function('reward.py:score', '--reward-fn')\nimport os; os.chdir('/')\n"
        "import utils, utils.metrics\nprint(json.dumps([f(['p'], ['r']), utils.__file__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[7.0], str(REPO / "src" / "utils" / "__init__.py")]
