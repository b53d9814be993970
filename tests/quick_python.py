"""A `python` that has imported everything already: each script runs in a fork of one process, within a second.

    with quick_python(...) as bin:    # bin/python is that interpreter, for the shell and for scripts that start others

A script sees what it would see otherwise: its arguments, working folder, environment, standard streams, `__main__`.
What is shortened or stands in for a network is in `prepare`, a function of the test that runs once in the parent.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# Starts in some milliseconds, as it imports next to nothing, and hands its own streams over.
_CLIENT = """#!{python} -SE
import array, json, os, socket, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
order = json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ))).encode()
streams = array.array("i", [0, 1, 2])
line.sendmsg([len(order).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
line.sendall(order)
os._exit(int(line.recv(8) or b"139"))
"""


@contextlib.contextmanager
def quick_python(folder: Path, script: Path, prepare: str, environment: dict[str, str]) -> Iterator[Path]:
    """The folder with `python`, while it works.

    Args:
        folder: an empty one; its path is short, as it holds a socket.
        script: this file in the clone whose scripts are run, so that its src/ is imported.
        prepare: MODULE of tests/, whose `prepare()` imports what scripts need and puts the stand-ins in place.
        environment: of the parent, before it imports anything.
    """
    address, ready = folder / "socket", folder / "ready"
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    client = bin_folder / "python"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    command = [sys.executable, str(script), str(address), str(ready), str(client), prepare]
    parent = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        while not ready.exists():
            assert parent.poll() is None, "the parent of all scripts has ended"
            time.sleep(0.05)
        yield bin_folder
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def _serve(address: str, ready: str, client: str, prepare: str) -> None:
    tests = Path(__file__).parent
    sys.path[0:0] = [str(tests), str(tests.parent / "src")]
    __import__(prepare).prepare()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    Path(ready).touch()
    while True:
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _run(line, client)
        line.close()


def _run(line: socket.socket, client: str) -> None:
    """In the fork: take the client's place, and tell it the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = line.recvmsg(8, socket.CMSG_SPACE(12))
    for target, source in enumerate(array.array("i", streams[0][2])):
        os.dup2(source, target)
        os.close(source)
    order = json.loads(line.makefile("rb").read(int.from_bytes(length, "little")))
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    script = order["argv"][0]
    sys.argv, sys.executable = order["argv"], client
    for number, (stream, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, stream, os.fdopen(number, mode, encoding="utf-8", buffering=1, closefd=False))
    code = 0
    try:
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    line.sendall(b"%d" % code)
    os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
