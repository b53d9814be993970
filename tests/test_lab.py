"""docs/lab.md says what there is: its patches apply and can be taken back, and its findings are those of its runs.

The runs of the page are packed in tests/lab_runs, by

    python tests/experiments/doctor/broken_runs.py --pack-lab tests/lab_runs
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from broken_runs import unpack

from experiments.doctor.record import read_run
from experiments.doctor.run import examine, report
from experiments.doctor.table import RULES
from training.invariants import InvariantError, check_reference

ROOT = Path(__file__).resolve().parents[1]
PACKED = ROOT / "tests" / "lab_runs"
PAGE = (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")
# The text under "## 1. ..." by its number, without what follows the last experiment.
EXPERIMENTS = {
    int(number): text
    for number, text in re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}  # fmt: skip
PATCHES = dict(re.findall(r"^cat > (\w+\.diff) <<'END'\n(.*?)^END$", PAGE, re.M | re.S))
FIRST = re.compile(r"^    1\. ([a-z-]+): ", re.M)


def answer(experiment: int) -> list[str]:
    """The doctor's lines on the page about an experiment."""
    text = EXPERIMENTS[experiment]
    block = text[FIRST.search(text).start() :].partition("\n\n")[0]
    return [line.removeprefix("    ") for line in block.splitlines()]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The packed run of each experiment."""
    folders = unpack(PACKED, tmp_path_factory.mktemp("runs"))
    return {int(re.match(r"ppo_lab_(\d)_", folder.name)[1]): read_run(folder) for folder in folders}


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources, outside of any repository as far as git is concerned."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def sources(folder):
    """Every file of src/ in a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "src").rglob("*.py"))}


def shell(folder, commands):
    """Run commands as a reader's shell would; git is kept from looking for a repository above."""
    subprocess.run(["bash", "-e", "-c", commands], cwd=folder, check=True, env={
        "PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_CEILING_DIRECTORIES": str(folder.parent)})  # fmt: skip


def test_there_are_six_experiments_with_a_picture_or_a_table_each():
    assert sorted(EXPERIMENTS) == [1, 2, 3, 4, 5, 6]
    for number, text in EXPERIMENTS.items():
        pictures = re.findall(r"\]\(\.\./(assets/lab/.*?)\)", text)
        assert pictures == [f"assets/lab/{number}.png"] or (not pictures and "| iteration |" in text)
        assert all((ROOT / picture).stat().st_size < 60_000 for picture in pictures)
        assert f"-n lab_{number} " in text and f"-t doctor ppo_lab_{number} || true" in text
        assert "**Think.**" in text and "**Why.**" in text and "**Try.**" in text


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_applies_to_the_code_of_today_and_comes_off_again(copy, name):
    before = sources(copy)
    (copy / name).write_text(PATCHES[name], encoding="utf-8")
    shell(copy, f"git apply {name}")
    changed = {path: text for path, text in sources(copy).items() if text != before[path]}
    assert changed
    for path, text in changed.items():
        compile(text, path, "exec")
    shell(copy, f"git apply -R {name}")
    assert sources(copy) == before


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_an_experiment_leaves_the_sources_as_they_were(copy, number):
    """What its blocks do with patches, in their order; the trainings left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", EXPERIMENTS[number], re.M | re.S)
    commands = [
        part for block in blocks
        for part in re.findall(r"^cat > \S+ <<'END'\n.*?^END\n|^git [^\n]*\n", block, re.M | re.S)
    ]  # fmt: skip
    before = sources(copy)
    shell(copy, "".join(commands) or "true")
    assert sources(copy) == before


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_the_doctor_says_of_the_run_what_the_page_says(records, number):
    """The first finding is the one that is told, and every line of the answer is the doctor's."""
    code = FIRST.search(EXPERIMENTS[number])[1]
    assert code in {rule.code for rule in RULES["ppo"]}
    assert re.search(rf"^\| {number} \|.*`{code}` \|$", PAGE, re.M), "the table at the top"
    findings, unclear = examine(records[number])
    assert findings[0].code == code
    said = report(records[number], findings, unclear, [Path()] * len(findings)).splitlines()
    assert [line for line in answer(number) if line != "..." and line not in said] == []


@pytest.mark.parametrize("number", EXPERIMENTS)
def test_figures_are_those_of_the_run(records, number):
    """Tables whose first column is the iteration, and whose other heads are tags."""
    for table in re.findall(r"^\| iteration \|.*\n(?:^\|.*\n)+", EXPERIMENTS[number], re.M):
        head, _, *rows = [[cell.strip(" `") for cell in row.strip("|\n").split("|")] for row in table.splitlines()]
        for row in rows:
            for tag, cell in zip(head[1:], row[1:]):
                series = records[number][tag]
                value = series.values[list(series.steps).index(int(row[0]))]
                places = len(cell.partition(".")[2])
                assert round(float(value), places) == float(cell), (tag, row[0])


def test_the_line_with_which_a_run_stops():
    class Differs:
        logp, logp_ref = torch.zeros(1, 2), torch.ones(1, 2)

    with pytest.raises(InvariantError) as raised:
        check_reference(Differs, "fp32")
    told = re.search(r"^    training\.invariants\.(InvariantError: .*?)\n\n", EXPERIMENTS[5], re.M | re.S)[1]
    told = " ".join(told.split()).partition(" by up to ")[0]
    assert f"InvariantError: {raised.value}".startswith(told) and len(told) > 60
