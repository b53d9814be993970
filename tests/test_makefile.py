"""`make` on machines that are not ready: a Python that will not do, half an environment, torch without CUDA."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
TORCH = next(line for line in PINS.splitlines() if line.startswith("torch=="))
FILES = ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements-bench.txt")

# A Python of a version of our choice: answers -c as that version would, makes environments that hold a copy of itself,
# and writes down everything else that it is asked to run.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exec {real} -c "import sys; sys.version_info = ({version}); sys.version = '.'.join(map(str, ({version})))
$2" ;;
  "-m venv") {venv} ;;
  *) echo "$@" >> {log} ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what `make` reads, and no `.venv`."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def python(place: Path, version: str, can_make_environments: bool = True) -> Path:
    """A Python that says it is of `version`."""
    path = place / f"python{version}"
    venv = 'for word; do :; done; mkdir -p "$word/bin" && cp "$0" "$word/bin/python" && touch "$word/bin/activate"'
    venv = venv if can_make_environments else 'mkdir "$3"; exit 1'
    numbers = version.replace(".", ", ")
    path.write_text(PYTHON.format(real=sys.executable, version=numbers, venv=venv, log=place / "asked"))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=place, env=env, capture_output=True, text=True)


def asked(place: Path) -> list[str]:
    """What the environment's Python was asked to run."""
    log = place / "asked"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("version", ["3.8.18", "3.10.13", "3.14.1"])
def test_a_python_that_will_not_do_is_told_and_leaves_nothing(place, version):
    done = make(place, "demo", f"PYTHON={python(place, version)}")
    assert done.returncode == 2 and not (place / ".venv").exists() and not asked(place)
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert line.startswith("error: PYTHON=") and f"is Python {version}; Python 3.11, 3.12 or 3.13 is needed" in line


def test_a_python_that_is_not_there_is_told(place):
    done = make(place, "demo", "PYTHON=/nowhere/python3.11")
    assert done.returncode == 2 and "error: PYTHON=/nowhere/python3.11 does not start; " in done.stderr


def test_a_python_without_venv_leaves_nothing(place):
    done = make(place, "demo", f"PYTHON={python(place, '3.11.7', can_make_environments=False)}")
    assert done.returncode == 2 and not (place / ".venv").exists()
    assert "apt install python3-venv" in done.stderr


@pytest.mark.parametrize("version", ["3.11.7", "3.12.1", "3.13.0"])
def test_an_environment_is_made_once(place, version):
    first = make(place, "demo", f"PYTHON={python(place, version)}")
    assert first.returncode == 0, first.stderr
    assert [words.split()[-1] for words in asked(place)] == ["requirements.txt", "demo"]
    assert "GB" in first.stdout  # what is about to be downloaded is said before
    assert make(place, "demo").returncode == 0
    assert [words.split()[-1] for words in asked(place)] == ["requirements.txt", "demo", "demo"]


def test_an_environment_of_another_python_is_made_anew(place):
    """As an earlier failure left it, or an upgrade of the system: everything is installed again."""
    make(place, "demo", f"PYTHON={python(place, '3.11.7')}")
    shutil.copy(python(place, "3.10.13"), place / ".venv" / "bin" / "python")
    done = make(place, "demo", f"PYTHON={python(place, '3.12.1')}")
    assert done.returncode == 0, done.stderr
    assert [words.split()[-1] for words in asked(place)] == ["requirements.txt", "demo"] * 2


@pytest.mark.parametrize("lost", ["activate", "pip"])
def test_half_an_environment_is_made_anew(place, lost):
    """Ctrl-C while it was made: its Python starts, and nothing can be installed with it."""
    make(place, "demo", f"PYTHON={python(place, '3.11.7')}")
    if lost == "activate":
        (place / ".venv/bin/activate").unlink()
    else:
        (place / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    assert make(place, "demo", f"PYTHON={python(place, '3.12.1')}").returncode == 0
    assert [words.split()[-1] for words in asked(place)] == ["requirements.txt", "demo"] * 2


def test_a_python_on_the_path_that_does_not_start_is_passed_over(place, monkeypatch):
    """As the shims of pyenv for versions that are not chosen."""
    (place / "bin").mkdir()
    shim = place / "bin" / "python3.11"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    python(place, "3.12.1").rename(place / "bin" / "python3.12")
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    done = make(place, "demo")
    assert done.returncode == 0, done.stderr
    assert (place / ".venv/bin/python").read_text() == (place / "bin/python3.12").read_text()


def test_torch_without_cuda_comes_first_and_from_its_own_index(place):
    make(place, "demo", "TORCH=cpu", f"PYTHON={python(place, '3.11.7')}")
    torch, rest, _ = asked(place)
    assert torch.endswith(f"--index-url https://download.pytorch.org/whl/cpu {TORCH}")
    assert rest.endswith("-r requirements.txt") and "index-url" not in rest


def test_bare_make_shows_what_there_is(place):
    done = make(place)
    assert done.returncode == 0 and done.stdout == make(place, "help").stdout
    named = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")}
    assert {"help", "demo", "test", "test-fast", "lint", "bench", "clean"} <= named
    assert not (place / ".venv").exists()


@pytest.mark.parametrize("script", ["experiments/main.py", "training/train_sft.py", "training/train_rm.py",
    "training/train_ppo.py", "utils/evaluate.py", "utils/prepare_sft_dataset.py", "utils/demo/make.py",
    "utils/demo/train_bpe.py"])  # fmt: skip
def test_a_script_outside_the_environment_says_what_to_activate(script):
    # -S leaves site-packages out.
    done = subprocess.run([sys.executable, "-S", ROOT / "src" / script], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("error: this Python (") and "activate the environment: `. .venv/bin/activate`" in line
