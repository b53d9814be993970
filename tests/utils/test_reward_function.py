"""Rewards written in Python: what is accepted, and one-line errors for everything else."""

import math
import sys
import threading
from pathlib import Path

import pytest
import torch

from config.user_error import UserError
from utils import reward_function
from utils.reward_function import NonFiniteReward, load_reward_function, moved
from utils.runs.folder import REPO

FLAG = "--reward-fn"


@pytest.fixture
def write(tmp_path):
    """`write(body)` makes tmp_path/reward.py and returns its path."""

    def make(text: str, name: str = "reward.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_a_function_is_called_with_texts(write) -> None:
    path = write(
        "def by_length(prompts, responses):\n"
        "    assert isinstance(prompts, list) and isinstance(responses, list)\n"
        "    return [len(r) / len(p) for p, r in zip(prompts, responses)]\n"
    )
    function = load_reward_function(f"{path}:by_length", FLAG)
    assert function(("ab", "c"), ("abcd", "")) == [2.0, 0.0]


@pytest.mark.parametrize(
    "expression",
    [
        "np.ones(2)", "torch.ones(2)", "(1, True)", "iter([1, 1])", "[np.float32(1), torch.tensor(1)]",
        "[torch.ones(1), np.ones(1)]", "torch.ones(2, 1)", "np.ones((2, 1, 1))", "np.array([True, True])",
        "torch.ones(2, requires_grad=True)", "torch.ones(2, dtype=torch.bfloat16)", "[Decimal(1), Fraction(1)]",
        "(1.0 for _ in responses)", "{'a': 1, 'b': 1}.values()", "map(float, [1, 1])", "print('at work') or [1, 1]",
    ],
)  # fmt: skip
def test_any_sequence_of_numbers_will_do(write, expression: str) -> None:
    path = write(
        "from decimal import Decimal\nfrom fractions import Fraction\nimport numpy as np, torch\n"
        f"def score(prompts, responses):\n    return {expression}\n"
    )
    scores = load_reward_function(f"{path}:score", FLAG)(["a", "b"], ["c", "d"])
    assert scores == [1.0, 1.0] and all(type(s) is float for s in scores)


def test_a_file_may_hold_dataclasses_and_state(write) -> None:
    path = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n    calls: int = 0\n    def __call__(self, p, r):\n"
        "        self.calls += 1\n        return [self.calls] * len(r)\n"
        "judge = Judge()\n"
    )
    function = load_reward_function(f"{path}:judge", FLAG)
    assert [function(["p"], ["r"]) for _ in range(2)] == [[1.0], [2.0]]


def test_the_same_texts_cannot_be_changed_under_the_trainer(write) -> None:
    path = write("def score(prompts, responses):\n    prompts.clear()\n    return [float(len(responses.pop()))]\n")
    prompts, responses = ["p"], ["abc"]
    assert load_reward_function(f"{path}:score", FLAG)(prompts, responses) == [3.0]
    assert (prompts, responses) == (["p"], ["abc"])


@pytest.mark.parametrize(
    "definition",
    [
        "class Judge:\n    def __call__(self, p, r): return [1.0]\nscore = Judge()",
        "class Judge:\n    def of(self, p, r): return [1.0]\nscore = Judge().of",
        "def weighted(w, p, r): return [w]\nscore = partial(weighted, 1.0)",
        "def weighted(p, r, w): return [w]\nscore = partial(weighted, w=1.0)",
        "@cache\ndef slow(r): return 1.0\ndef score(*texts): return [slow(r) for r in texts[1]]",
        "def plain(p, r): return [1.0]\n@wraps(plain)\ndef score(*a, **k): return plain(*a, **k)",
        "score = lambda p, r, scale=1.0: [scale]",
        "async def ask(r): return 1.0\nimport asyncio\ndef score(p, r): return [asyncio.run(ask(x)) for x in r]",
    ],
)  # fmt: skip
def test_whatever_can_be_called_with_two_lists_will_do(write, definition: str) -> None:
    path = write(f"from functools import cache, partial, wraps\n{definition}\n")
    assert load_reward_function(f"{path}:score", FLAG)(["p"], ["r"]) == [1.0]


@pytest.mark.parametrize(
    "definition,message",
    [
        ("class score:\n    def __call__(self, p, r): return [1.0]", "score is a class; name a function, or an object"),
        ("async def score(p, r): return [1.0]", "is an async function"),
        ("async def score(p, r): yield 1.0", "is an async function"),
        ("class Judge:\n    async def __call__(self, p, r): return [1.0]\nscore = Judge()", "is an async function"),
        ("async def slow(w, p, r): return [w]\nimport functools\nscore = functools.partial(slow, 1)", "is an async"),
        ("def score(response): return 1.0", "takes \\(response\\); it must take"),
        ("def score(prompts, responses, answers): return []", "takes \\(prompts, responses, answers\\)"),
        ("def score(*, prompts, responses): return []", "takes \\(\\*, prompts, responses\\)"),
        ("def score(): return []", "takes \\(\\)"),
    ],
)  # fmt: skip
def test_what_can_never_be_called_so_is_told_before_any_work(write, definition: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_reward_function(f"{write(definition)}:score", FLAG)
    check_is_one_line(error)


def check_is_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value) and str(error.value).startswith(FLAG)


@pytest.mark.parametrize("spec", ["reward.py", "missing.py:score", "", ":score", "notes.txt:score", "folder.py:score"])
def test_a_spec_that_names_no_file(spec: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("def score(p, r): return [0] * len(r)")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "reward.py").write_text("def score(p, r): return [0] * len(r)")
    with pytest.raises(UserError, match="give FILE.py:FUNCTION") as error:
        load_reward_function(spec, FLAG)
    check_is_one_line(error)


@pytest.mark.parametrize(
    "text,message",
    [
        ("def score(:", "importing .* failed: SyntaxError"),
        ("import not_a_package", "importing .* failed: ModuleNotFoundError"),
        ("def other(p, r): return []", "has no function score"),
        ("score = 3", "has no function score"),
        ("raise SystemExit(0)", "importing .* failed: SystemExit"),
    ],
)
def test_a_file_without_the_function(write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_reward_function(f"{write(text)}:score", FLAG)
    check_is_one_line(error)


@pytest.mark.parametrize(
    "body,message",
    [
        ("raise KeyError('x')", "failed with KeyError"),
        ("raise RuntimeError('two\\nlines')", "failed with RuntimeError: two lines"),
        ("raise SystemExit(0)", "failed with SystemExit"),
        ("return None", "returned None for all responses"),
        ("return 1.0", "returned 1.0 for all responses"),
        ("import numpy; return numpy.float32(1)", "returned a float32 of shape \\(\\) for all responses"),
        ("import torch; return torch.tensor(1.0)", "returned a Tensor of shape \\(\\) for all responses"),
        ("return '12'", "returned '12' for all responses"),
        ("return {0: 1.0, 1: 2.0}", "returned a dict for all responses"),
        ("return {1.0, 2.0}", "returned a set for all responses"),
        ("return [1.0, None]", "returned None for response 2"),
        ("return ['a', 'b']", "returned 'a' for response 1"),
        ("return ['0.5', '1']", "returned '0.5' for response 1"),
        ("import numpy; return numpy.array(['0.5', '1'])", "returned .*'0.5'.* for response 1"),
        ("return [[1.0], [2.0]]", "returned a list for response 1"),
        ("return [1.0, 1j]", "returned a complex for response 2"),
        ("import torch; return torch.ones(2, 3)", "returned a Tensor of shape \\(3,\\) for response 1"),
        ("import numpy; return numpy.ones((2, 0))", "returned a ndarray of shape \\(0,\\) for response 1"),
        ("return [0.0]", "gave 1 scores for 2 responses"),
        ("return [0.0] * 3", "gave 3 scores for 2 responses"),
        ("return [0.0, float('nan')]", "gave nan for 'the second'"),
        ("return [float('-inf'), 0.0]", "gave -inf for 'the first'"),
        ("return [1e39, 0.0]", "gave 1e\\+39 for 'the first'"),
    ],
)
def test_what_the_function_gives_is_checked(write, body: str, message: str) -> None:
    path = write(f"def score(prompts, responses):\n    {body}\n")
    function = load_reward_function(f"{path}:score", FLAG)
    with pytest.raises(UserError, match=message) as error:
        function(["p", "q"], ["the first", "the second"])
    check_is_one_line(error)


def test_scores_that_are_not_finite_come_with_the_error(write) -> None:
    path = write("def score(p, r): return [1, float('nan')]")
    function = load_reward_function(f"{path}:score", FLAG)
    with pytest.raises(NonFiniteReward) as error:
        function(["p", "q"], ["a", "b"])
    assert error.value.scores[0] == 1.0 and math.isnan(error.value.scores[1])


def test_what_a_file_does_to_its_surroundings_is_felt_by_it_alone(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "words.txt").write_text("a b c")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "found_late.py").write_text("two = 2.0")
    path = write(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "here = Path(__file__).parent\n"
        "os.chdir(here); sys.path.insert(0, str(here / 'late'))\n"
        "torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)\n"
        "def score(prompts, responses):\n"
        "    from found_late import two\n"
        "    words = len(Path('words.txt').read_text().split())\n"
        "    torch.set_grad_enabled(False); sys.path.clear(); os.chdir(here)\n"
        "    return torch.ones(len(responses)) * two * words + 1e-9\n"
    )
    (tmp_path / "started_here").mkdir()
    monkeypatch.chdir(tmp_path / "started_here")
    before = list(sys.path)
    function = load_reward_function(f"{path}:score", FLAG)
    for _ in range(2):
        assert Path.cwd().name == "started_here" and sys.path == before
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
        assert function(["a"], ["b"]) == [6.0 + 1e-9]


def test_a_slow_function_is_not_waited_for_in_silence(write, monkeypatch, capsys) -> None:
    """A line on stderr from time to time, none for a quick function, and no thread is left behind."""
    monkeypatch.setattr(reward_function, "TELL_EVERY", 0.05)
    path = write(
        "import time\ndef slow(p, r):\n    time.sleep(0.18)\n    return [1.0]\ndef quick(p, r): return [1.0]\n"
    )
    assert load_reward_function(f"{path}:quick", FLAG)(["p"], ["r"]) == [1.0]
    assert capsys.readouterr().err == ""
    assert load_reward_function(f"{path}:slow", FLAG)(["p"], ["r"]) == [1.0]
    told = capsys.readouterr().err
    assert told.startswith(f"waiting for {FLAG} {path}:slow: 0 s so far for 1 responses") and told.count("waiting") >= 2
    assert not [thread for thread in threading.enumerate() if "watch" in thread.name]


def test_a_file_of_this_repository_is_found_under_its_earlier_name(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    now = load_reward_function("src/utils/demo/gold.py:gold_reward", FLAG)
    then = load_reward_function("src/utils/demo_gold.py:gold_reward", FLAG)
    texts = ["\n\nHuman: What is the capital of Italy?\n\nAssistant:"], ["It is Rome."]
    assert then(*texts) == now(*texts)
    # A file of the user's own that is there is taken as it is.
    mine = tmp_path / "utils/demo_gold.py"
    mine.parent.mkdir()
    mine.write_text("def gold_reward(prompts, responses):\n    return [7.0] * len(responses)\n")
    assert load_reward_function(f"{mine}:gold_reward", FLAG)(*texts) == [7.0]
    assert moved("demo_gold.py:gold_reward") == "demo_gold.py:gold_reward"
