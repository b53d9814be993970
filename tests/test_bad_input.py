"""Every row of docs/bad-input.md: its exit code, one line on stderr, no traceback, and nothing that was there changes.

The document is what the scripts are held to: it has a row for every case of bad_input_cases.py, with the very message.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from bad_input_cases import SECTIONS, Case, World
from permissions import permissions_count
from scripts import SHORT, Result, call, train_tiny

from config.user_error import run_main
from training.trainers import PPOTrainer, RewardModelTrainer, SFTTrainer
from utils import reward_function
from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

DOCUMENT = REPO / "docs" / "bad-input.md"
CASES = [(title, case) for title, cases in SECTIONS.items() for case in cases]


def table() -> dict[tuple[str, str], tuple[str, str, int]]:
    """The rows of the document: (section, input) -> (command, what is told, exit code)."""
    rows, section = {}, ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| input |"):
            given, command, told, code = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows[section, given] = (command.strip("`"), told.strip("`").replace("\\|", "|"), int(code))
    return rows


TABLE = table()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """Finished runs of a tiny model: sft_tiny, rm_tiny and ppo_tiny. Tokenised data go to a folder of their own."""
    parent = tempfile.TemporaryDirectory()
    folder = Path(parent.name) / "runs"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE_DIR", str(tmp_path_factory.mktemp("tokens")))
        train_tiny(folder)
        yield folder
    parent.cleanup()


@pytest.fixture
def world(runs) -> Iterator[World]:
    before = set(runs.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        yield World(Path(folder), runs)
        for path in Path(folder).glob("*"):
            path.chmod(0o755)
    for new in set(runs.iterdir()) - before:
        shutil.rmtree(new)


def command_line(case: Case, world: World) -> tuple[str, list[str]]:
    """The script of a case, and its words."""
    script, *words = shlex.split(case.command)
    for name, path in {"FILE": world.file, "MODEL": world.model, "RUNS": world.runs, "HERE": world.here}.items():
        words = [word.replace(name, str(path)) for word in words]
    if script == "evaluate":
        return script, [*words, "--runs-dir", str(world.runs), "--device", "cpu"]
    if script == "main":
        takes_runs = words[1] in ("gpt", "reward")
        return script, [*words, *(["--runs-dir", str(world.runs), "--device", "cpu"] if takes_runs else [])]
    # Before the case's own words: the last of two values counts, and a flag without one stands last.
    given = ["-n", "wrong", "--device", "cpu", "--runs-dir", str(world.runs)]
    return script, [*SHORT[script].split(), *given, *words]


def run_case(case: Case, world: World) -> Result:
    """The script's main in this process; a run on input that is accepted ends before its first step."""
    script, words = command_line(case, world)
    AcceleratorState._reset_state(reset_partial_state=True)
    others = {"main": "experiments.main", "evaluate": "utils.evaluate"}
    module = importlib.import_module(others.get(script, f"training.train_{script}"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [script, *words]))
        stack.enter_context(mock.patch.object(sys, "path", [*sys.path]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO()))
        stack.enter_context(mock.patch.dict(os.environ, case.environment))
        stack.enter_context(mock.patch.object(reward_function, "TELL_EVERY", 0.05))
        if case.code == 0 and "--reward-fn" not in words:
            for trainer in (SFTTrainer, RewardModelTrainer, PPOTrainer):
                stack.enter_context(mock.patch.object(trainer, "fit", lambda self: 0))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(contextlib.chdir(world.here))
        if case.forbidden:
            stack.enter_context(permissions_count())
        try:
            run_main(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def lines_of(result: Result) -> list[str]:
    """stderr, without the progress bars, which draw over one line again and again."""
    left = [line.rpartition("\r")[2] for line in result.err.split("\n")]
    return [line for line in left if line.strip() and not re.search(r"\d%\|", line)]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by a hash; lock files aside."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def matches(told: str, text: str) -> bool:
    """Whether a text is what the document says; "..." in the document stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, told.split("..."))), text) is not None


def test_the_table_has_every_case_and_no_other() -> None:
    made = {(title, case.given): (case.command, case.code) for title, case in CASES}
    assert len(made) == len(CASES)
    escaped = {
        key: (command.replace("\n", "\\n").encode("ascii", "backslashreplace").decode(), code)
        for key, (command, code) in made.items()
    }
    assert {key: (command, code) for key, (command, _, code) in TABLE.items()} == escaped


@pytest.mark.parametrize("title,case", CASES, ids=[f"{title}: {case.given}" for title, case in CASES])
def test_every_row_of_the_table(title: str, case: Case, world: World) -> None:
    case.prepare(world)
    before, made = contents(world.runs), None if case.forbidden else contents(world.here)
    result = run_case(case, world)
    told, stdout = [world.shown(line) for line in lines_of(result)], world.shown(result.out)
    after = contents(world.runs)
    assert {name: after.get(name) for name in before} == before
    assert case.forbidden or {k: v for k, v in contents(world.here).items() if "__pycache__" not in k} == made
    assert result.code == case.code, result.err
    _, expected, _ = TABLE[title, case.given]
    if case.code == 2:
        assert len(told) == 1 and matches(f"error: {expected}", told[0]), told
    else:
        assert any(matches(expected, line) for line in [*told, *stdout.splitlines()]), (told, stdout)


@pytest.mark.parametrize("given", ["one bit of the weights changed", "it raises"])
def test_some_rows_as_processes(given: str, world: World) -> None:
    """What a person sees who runs the script: the same, from a process with its own stderr and exit code."""
    title, case = next((title, case) for title, case in CASES if case.given == given)
    case.prepare(world)
    script, words = command_line(case, world)
    child = subprocess.run(
        [sys.executable, str(REPO / "src" / "training" / f"train_{script}.py"), *words], cwd=world.here,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    told = [world.shown(line) for line in lines_of(Result(child.returncode, "", child.stderr.decode()))]
    assert child.returncode == 2 and len(told) == 1 and matches(f"error: {TABLE[title, given][1]}", told[0]), told


def test_numbers_that_go_wrong_end_a_run_with_exit_code_1_and_one_line(runs) -> None:
    """A learning rate beyond all reason: the next step's loss is not finite, and the report says where to look."""
    result = call("sft", "-n hot -p sft_tiny --lr 1e25 --warmup-steps 0 --eval-every 100 --save-every 1", runs)
    run = max(p for p in runs.iterdir() if p.name.startswith("sft_hot"))
    told = lines_of(result)
    assert result.code == 1 and len(told) == 1, result.err
    assert told[0].startswith("error: step 2: the loss is not finite in rows ")
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step_00000001'}" in told[0]
    assert json.loads((run / "nonfinite_step_00000002.json").read_text())["rows"]
