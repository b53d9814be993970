"""What a terminal gets to see, and what becomes of a script whose output cannot be written."""

import io
import logging
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config.scrub import printable
from config.terminal import Terminal, guard_terminal
from utils.runs.folder import REPO

SECRET = "hunter2-x9"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "a\rb", "\x08", "\u202egnp", "\x7f", "\x00"])
def test_control_characters_are_shown(text):
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)
    stream = io.StringIO()
    Terminal(stream).write(f"say: {text}\n")
    assert stream.getvalue().rstrip("\n").isprintable()


def test_texts_colours_and_progress_bars_pass():
    stream = io.StringIO()
    terminal = Terminal(stream)
    texts = ["Zoë\t日本\n", "\x1b[32mgreen\x1b[0m", "\r 50%|█████     |", "\r     \r", "\n\x1b[A", ""]
    terminal.writelines(texts)
    assert stream.getvalue() == "".join(texts)
    assert terminal.write("abc") == 3 and terminal.isatty() is False and terminal.encoding == stream.encoding


def test_the_guard_takes_streams_and_loggers_once(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(err)])
    guard_terminal()
    guard_terminal()
    print(f"http://me:{SECRET}@host/")
    logging.warning("http://me:%s@host/", SECRET)
    assert out.getvalue() == "http://host/\n" and err.getvalue() == "http://host/\n"
    assert sys.stdout._stream is out


# In the subprocesses: what stands between a script and its terminal, without torch, so that each takes no time.
HEAD = "import sys\nsys.path.insert(0, 'src')\nfrom config.user_error import *\nfrom config.terminal import *\n"
TALKS = "def main():\n    for i in range(20000): print('line', i)\n"
OUTLIVES = (
    "def main():\n    outlive_terminal()\n    for i in range(20000): print('line', i)\n"
    "    print('end', file=sys.stderr)\n"
)
FINDS = "def main():\n    print('found')\n    return 3\n"
FAILS = "def main():\n    print('before')\n    raise UserError('--lr: caf\\u00e9')\n"
HELP = "import argparse\ndef main():\n    argparse.ArgumentParser().parse_args(['--help'])\n"
ALIVE = "import os\ndef main():\n    assert all(os.fstat(n) for n in range(3))\n    sys.stdin.isatty(), print('x')\n"


def shell(body: str, redirection: str, **environment: str) -> subprocess.CompletedProcess:
    """A script with this `main`, started by a shell with a redirection behind it; the exit code is the script's."""
    line = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    code = f"{HEAD}{body}run_main(main)"
    return subprocess.run(
        ["bash", "-c", line, sys.executable, code], cwd=REPO, capture_output=True, timeout=60, check=False,
        env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip


FULL = b"error: stdout: cannot be written to (No space left on device)\n"
GOES_ON = b"warning: stdout cannot be written to (%s); the work goes on, its files tell\nend\n"
STREAMS = [
    (TALKS, "| head -1", 141, b""), (TALKS, "| true", 141, b""), (HELP, "| true", 141, b""), (FINDS, "| true", 3, b""),
    (FAILS, "2>&1 | true", 2, b""), (FAILS, "2>/dev/full", 2, b""), (FAILS, "2>&-", 2, b""),
    (FAILS, "| true", 2, b"error: --lr: caf\xc3\xa9\n"),
    (TALKS, ">/dev/full", 1, FULL), (FINDS, ">/dev/full", 3, FULL), (HELP, ">/dev/full", 1, FULL),
    (TALKS, ">/dev/full 2>&1", 1, b""), (TALKS, ">&-", 0, b""), (TALKS, ">&- 2>&-", 0, b""),
    (ALIVE, "<&-", 0, b""), (ALIVE, "<&- >&- 2>&-", 0, b""), (ALIVE, "<&- >&-", 0, b""), (ALIVE, "2>&-", 0, b""),
    (OUTLIVES, "| head -1", 0, GOES_ON % b"Broken pipe"),
    (OUTLIVES, ">/dev/full", 0, GOES_ON % b"No space left on device"),
    (OUTLIVES, "2>&1 | head -1", 0, b""), (OUTLIVES, ">&-", 0, b"end\n"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "redirection", "code", "told"), STREAMS)
def test_an_output_that_cannot_be_written(body: str, redirection: str, code: int, told: bytes) -> None:
    done = shell(body, redirection)
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize(("words", "code"), [("--help", 141), ("-t nothing 2>&1", 2)])
def test_a_script_whose_reader_left_at_once(words: str, code: int) -> None:
    line = f'"$0" src/experiments/main.py {words} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=REPO, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize(("encoding", "shown"), [
    ("ascii", rb"Zo\xeb \u65e5 \u2588 \udcff"), ("cp1252", b"Zo\xeb \\u65e5 \\u2588 \\udcff"),
    ("latin-1:strict", b"Zo\xeb \\u65e5 \\u2588 \\udcff"), ("utf-8", "Zo\u00eb \u65e5 \u2588 \\udcff".encode()),
    ("utf-16-le", "Zo\u00eb \u65e5 \u2588 \\udcff".encode("utf-16-le")),
])  # fmt: skip
def test_a_character_that_the_encoding_lacks_is_escaped(encoding: str, shown: bytes) -> None:
    body = "def main():\n    for s in (sys.stdout, sys.stderr): s.write('Zo\\u00eb \\u65e5 \\u2588 \\udcff')\n"
    done = shell(body, "", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, shown)


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_any_locale_will_do(locale: dict[str, str]) -> None:
    done = shell("def main(): print('Zo\\u00eb \\udcff')\n", "", **locale)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.startswith(b"Zo")


@pytest.mark.parametrize("where", ["time.sleep(60)", "sys.stdin.read()", "import this_one", "print('x' * 9**9)"])
def test_ctrl_c_is_one_line_and_exit_code_130(where: str, tmp_path: Path) -> None:
    """Wherever it comes: in work, in waiting, in an import, in a write."""
    (tmp_path / "this_one.py").write_text("import time\ntime.sleep(60)\n")
    code = f"{HEAD}import time\ndef main():\n    print('ready', flush=True)\n    {where}\nrun_main(main)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert child.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, b"interrupted\n")


def test_one_more_ctrl_c_waits_for_no_thread() -> None:
    """The first has been told; Python then waits for what its threads are at, a request that takes minutes, say."""
    code = (
        f"{HEAD}import threading, time\ndef main():\n    threading.Thread(target=time.sleep, args=[60]).start()\n"
        "    print('ready', flush=True)\n    time.sleep(60)\nrun_main(main)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert child.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == b"interrupted\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, b"")


def test_ctrl_c_counts_where_python_would_pass_over_it() -> None:
    body = (
        "import signal, time\nclass Dies:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "def main():\n    Dies()\n    time.sleep(60)\n"
    )
    done = shell(body, "")
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_have_them(variables: dict[str, str], coloured: bool, monkeypatch) -> None:
    from experiments.quick_looks import _paint

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    with open(slave, "w") as terminal, open(master, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdout", Terminal(terminal))
        assert (_paint("text", "2") != "text") is coloured
