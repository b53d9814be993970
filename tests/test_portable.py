"""Nothing of ours needs what Windows lacks: each module can be imported and a run be written without it.

It was not tried on Windows itself; what the libraries need there is theirs.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

SCRIPT = """
import importlib, os, sys
from pathlib import Path
src, folder = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(src))
import accelerate, datasets, filelock, matplotlib.pyplot, openai, tensorboard, tiktoken, torch, tqdm, transformers, tyro
import torch.utils.tensorboard

for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for name in (
    "chown", "fchmod", "fork", "getloadavg", "getuid", "killpg", "mkfifo", "nice", "pread", "pwrite",
    "sched_getaffinity", "statvfs", "sync", "sysconf", "uname", "wait4",
):
    delattr(os, name)
for path in sorted(src.rglob("*.py")):
    importlib.import_module(".".join(path.relative_to(src).with_suffix("").parts).removesuffix(".__init__"))

from experiments.bench import host, work
from training.engine.host_memory import resident_bytes
from utils.runs.durable import Disk, replace_folder, whole_file
from utils.runs.folder import create_run, write_hyperparams
from utils.runs.metrics_log import MetricsLog

run = create_run("sft", "x", folder)
write_hyperparams(run, "sft", {"seed": 0}, {}, {})
with MetricsLog(run) as log:
    log.log(1, {"train/loss": 0.5})
    log.sync()
replace_folder(run / "final", [("a", lambda path: path.write_text("x"))], Disk())
with whole_file(run / "b") as file:
    file.write(b"x")
host.describe_machine(1), work.peak_gb(), resident_bytes()

from config.user_error import run_main
from experiments.main import main
sys.argv = ["main.py", "-t", "tokenizer", "--text", "a b"]
run_main(main)
"""


def test_everything_goes_without_what_windows_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(REPO / "src"), str(tmp_path)], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "round trip: the same text" in done.stdout
    (run,) = tmp_path.iterdir()
    assert {"hyperparams.json", "metrics.jsonl", "final", "b"} <= {path.name for path in run.iterdir()}
