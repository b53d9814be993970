"""README and docs say what the code does: commands parse, links lead somewhere, tables are those of the code."""

import argparse
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from flag_table import DOCUMENT, tables, with_tables
from reading_order import CORE, LAYOUT, README, SRC, core_total, lines_of, with_core, with_modules

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig
from experiments import main as tasks
from utils.evaluation.flags import parse_flags

ROOT = README.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")),
        ROOT / "assets" / "demo" / "README.md", ROOT / "runs" / "README.md",
    ]
}  # fmt: skip
TEXT = PAGES["README.md"]
# In a block of code, indented or fenced; `$ python` is a program's output. What follows `||` is the shell's.
COMMANDS = [
    (page, re.split("  #| \\|\\| ", line)[0].strip())
    for page, text in PAGES.items()
    for line in text.replace("\\\n", " ").splitlines()
    if re.match(r"(?: {4})?python (?:src|tests)/\S+\.py", line)
]
LINKS = {
    page: [
        (words.strip("`"), target)
        for words, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", text)
        if not target.startswith("https://")
    ]
    for page, text in PAGES.items()
}
STAGES = {"train_sft.py": SFTConfig, "train_rm.py": RMConfig, "train_ppo.py": PPOConfig}


def commands_of(script: str) -> list[list[str]]:
    """Words after the script, of every command in README and docs that starts it."""
    return [words[2:] for words in (shlex.split(c) for _, c in COMMANDS) if words[1].endswith(script)]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len(TEXT.splitlines()) <= 250


def test_tables_of_flags_are_up_to_date():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python tests/flag_table.py`"


def test_every_flag_has_a_text():
    assert all(
        row.count("|") >= 4 and not row.endswith("|  |") for row in tables().splitlines() if row.startswith("| `")
    )


def test_maps_of_the_sources_are_up_to_date():
    assert with_core(TEXT) == TEXT, "run `python tests/reading_order.py`"
    layout = LAYOUT.read_text(encoding="utf-8")
    assert with_modules(layout) == layout, "run `python tests/reading_order.py`"


def test_lines_of_the_core_are_those_of_the_files():
    rows = re.findall(r"^\| \d+ \| \[([\w/]+\.py)\]\(src/\1\) \| (\d+) \|", TEXT, re.M)
    assert [(name, int(lines)) for name, lines in rows] == [(name, lines_of(SRC / name)) for name, _ in CORE]
    assert f"**{core_total():,} lines, the core**" in TEXT and f"| {core_total():,} | |" in TEXT


def test_the_core_is_what_an_iteration_of_ppo_goes_through():
    names = {name for name, _ in CORE}
    assert len(names) == len(CORE) and {"models/gpt.py", "utils/loss.py", "training/experience.py"} <= names
    assert core_total() < 5_000


def test_commands_start_scripts_that_there_are():
    assert len(COMMANDS) >= 40
    for page, command in COMMANDS:
        assert (ROOT / shlex.split(command)[1]).is_file(), (page, command)


def test_one_way_to_call_python():
    """Commands are for the active environment, which the README says once."""
    assert ". .venv/bin/activate" in TEXT
    for page, text in PAGES.items():
        assert not re.search(r"\.venv/bin/(?!activate)", text), page


@pytest.mark.parametrize("script", STAGES)
def test_commands_of_the_three_stages_parse(script):
    commands = commands_of(script)
    assert len(commands) >= 3
    for flags in commands:
        parse_cli(STAGES[script], flags)


def test_commands_of_the_evaluation_parse():
    commands = commands_of("utils/evaluate.py")
    assert len(commands) >= 3
    for flags in commands:
        assert parse_flags(flags, "").sft


class Parsed(Exception):
    """The flags were taken; nothing is to be run."""


class OnlyParses(tasks.Parser):
    def parse_args(self, *args, **kwargs):
        assert isinstance(super().parse_args(*args, **kwargs), argparse.Namespace)
        raise Parsed

    def parse_known_args(self, *args, **kwargs):
        namespace, rest = super().parse_known_args(*args, **kwargs)
        if self.prog.startswith(("main.py -t soak", "main.py -t smollm2")):
            assert not rest
            raise Parsed
        return namespace, rest


def test_commands_of_main_parse(monkeypatch):
    monkeypatch.setattr(tasks, "Parser", OnlyParses)
    seen = set()
    for flags in commands_of("experiments/main.py"):
        monkeypatch.setattr("sys.argv", ["main.py", *flags])
        with pytest.raises(Parsed):
            tasks.main()
        seen.add(flags[flags.index("-t") + 1])
    assert {"gpt", "reward", "dataset", "results", "doctor", "memory", "bench", "soak"} <= seen <= set(tasks.TASKS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_to_what_they_name(page):
    """A link with a name of code leads to the file that defines it, one with a file's name to that file."""
    for text, target in LINKS[page]:
        name, _, anchor = target.partition("#")
        path = Path(os.path.normpath(ROOT / page / ".." / name)) if name else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), (text, target)
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), (text, target)
        if text.endswith(".py"):
            assert path.as_posix().endswith("/" + text), (text, target)
        elif path.suffix == ".py":
            assert re.search(rf"(def|class) {re.escape(text)}\b", path.read_text(encoding="utf-8")), (text, target)


def test_there_are_links_to_code():
    assert sum(target.endswith(".py") for links in LINKS.values() for _, target in links) >= 150


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_the_cells_of_its_head(page):
    """GitHub leaves out what is too much."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGES[page] + "\n", re.M):
        head, rule, *rows = (len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines())
        assert rule == head and set(rows) <= {head}, (page, table[:200])


def test_every_page_is_in_the_index():
    index = {target.partition("#")[0] for _, target in LINKS["docs/README.md"]}
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"} <= index


def test_the_layout_names_every_module_and_no_other():
    named = re.findall(r"^\| \[(\w+\.py)\]", PAGES["docs/layout.md"], re.M)
    there = [path.name for path in SRC.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)


def test_the_readme_names_every_folder_of_src():
    rooms = re.findall(r"^\| `(\w+)/` \|", TEXT, re.M)
    there = {path.name for path in SRC.iterdir() if any(path.glob("*.py"))}
    assert len(rooms) == len(set(rooms)) and set(rooms) == there


def test_details_are_numbered_in_order():
    details = PAGES["docs/details.md"].split("## References")[0]
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", details, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 20


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_are_there(page):
    text = re.sub(r"^\| .*was \| is \|$.*?^$", "", PAGES[page], flags=re.M | re.S)  # moves tell of what is gone
    for path in re.findall(r"`((?:src|tests|docs|assets)/[a-z0-9_/.-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_are_there(page):
    for file, name in re.findall(r"`((?:\w+/)*test_\w+\.py)::(\w+)\*?`", PAGES[page]):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"def {name}", source), (page, file, name)


def test_the_citation_names_the_holder_of_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    holder = re.search(r"Copyright \(c\) \d+ (.*)", (ROOT / "LICENSE").read_text(encoding="utf-8"))[1]
    assert citation["authors"] == [{"name": holder}] and citation["license"] == "MIT"
    assert f"# {citation['title']}" == TEXT.splitlines()[0] and citation["cff-version"] == "1.2.0"
