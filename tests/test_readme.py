"""The README says what the code does: commands parse, links lead somewhere, tables are those of the code."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from flag_table import README, tables, with_tables

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig
from experiments import quick_looks
from experiments.main import TASKS, Parser

ROOT = Path(__file__).resolve().parents[1]
TEXT = README.read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip() for line in TEXT.splitlines() if re.match(r" {4}(\.venv/bin/)?python src/\S+\.py", line)
]
STAGES = {"train_sft.py": SFTConfig, "train_rm.py": RMConfig, "train_ppo.py": PPOConfig}


def test_tables_of_flags_are_up_to_date():
    assert with_tables(TEXT) == TEXT, "run `python tests/flag_table.py`"


def test_every_flag_has_a_text():
    assert all(
        row.count("|") >= 4 and not row.endswith("|  |") for row in tables().splitlines() if row.startswith("| `")
    )


def test_commands_of_the_three_stages_parse():
    seen = []
    for command in COMMANDS:
        _, script, *flags = shlex.split(command)
        if Path(script).name in STAGES:
            parse_cli(STAGES[Path(script).name], flags)
            seen.append(Path(script).name)
        assert (ROOT / script).is_file()
    assert set(seen) == set(STAGES) and len(seen) >= 7


def test_commands_of_quick_looks_parse():
    seen = []
    for command in COMMANDS:
        _, script, *flags = shlex.split(command)
        if script.endswith("experiments/main.py"):
            task = flags[flags.index("-t") + 1]
            assert task in TASKS
            if task in quick_looks._TASKS:
                parser = Parser()
                quick_looks._TASKS[task][0](parser)
                del flags[flags.index("-t") : flags.index("-t") + 2]
                assert isinstance(parser.parse_args(flags), argparse.Namespace)
            seen.append(task)
    assert {"gpt", "reward", "results"} <= set(seen)


@pytest.mark.parametrize(("text", "target"), re.findall(r"\[`?([^\]`]+)`?\]\(([^)]+)\)", TEXT))
def test_links_lead_to_files_and_to_what_they_name(text, target):
    if target.endswith(".png"):
        return  # drawn by the command beside it
    path = ROOT / target
    assert path.exists(), target
    if path.suffix == ".py":
        assert re.search(rf"(def|class) {re.escape(text)}\b", path.read_text(encoding="utf-8")), (text, target)


def test_the_tree_names_every_module_and_no_other():
    tree = TEXT.split("## What is where")[1].split("## The details")[0]
    named = re.findall(r"\b(\w+\.py)\b", tree)
    there = [path.name for path in (ROOT / "src").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)


def test_details_are_numbered_in_order():
    details = TEXT.split("## The details")[1].split("## What is promised")[0]
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", details, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 20
