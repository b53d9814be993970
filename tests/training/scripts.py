"""Running the three scripts: as a person does (a process of its own), and inside this one (fast)."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from accelerate.state import AcceleratorState

from config.model_configs import GPTConfig
from config.user_error import run_main
from models.gpt import GPT
from training.start import describe_model
from training.storage.saving import Saver
from utils.runs.folder import REPO, create_run
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

# A few small steps: enough to pass every place, too few to learn anything.
SHORT = {
    "sft": "--max-steps 3 --eval-every 2 --save-every 2 --log-every 1 --eval-examples 8 -b 2 --global-batch-size 4 "
    "--sample-tokens 8",
    "rm": "--max-steps 3 --eval-every 2 --save-every 2 --log-every 1 --eval-examples 8 -b 2 --global-batch-size 4 "
    "--normalise-prompts 8 --response-length 8",
    "ppo": "--max-steps 2 --eval-every 1 --save-every 1 --eval-examples 4 -b 2 --global-batch-size 4 --ppo-epochs 2 "
    "--response-length 8",
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr of a run that the user got wrong."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1, (self.code, self.err)
        assert lines[0].startswith("error: ")
        return lines[0]


def command(stage: str, arguments: str, runs: Path, device: str = "cpu") -> list[str]:
    words = [w for text in (SHORT[stage], arguments) for w in text.split()]
    return [f"train_{stage}.py", *words, "--runs-dir", str(runs), "--device", device]


def process(stage: str, arguments: str, runs: Path, folder: str = "", **environment: str) -> subprocess.Popen:
    """A script as a process, started in the repo (or a folder of it)."""
    script, *words = command(stage, arguments, runs)
    where = REPO / folder
    path = os.path.relpath(REPO / "src" / "training" / script, where)
    return subprocess.Popen(
        [sys.executable, path, *words], cwd=where, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(stage: str, arguments: str, runs: Path, folder: str = "") -> Result:
    """A script as a process, to its end."""
    child = process(stage, arguments, runs, folder)
    out, err = child.communicate(timeout=120)
    return Result(child.returncode, out, err)


def call(stage: str, arguments: str, runs: Path, device: str = "cpu") -> Result:
    """A script's main in this process, with the exit code it would have."""
    return _call(stage, command(stage, arguments, runs, device))


def call_bare(stage: str, *words: str) -> Result:
    """`call` with these words and none beside them."""
    return _call(stage, [f"train_{stage}.py", *words])


def _call(stage: str, argv: list[str]) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    # Importing a script puts src/ in the place of the first entry of sys.path; that must not last.
    with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", [*sys.path]):
        script = importlib.import_module(f"training.train_{stage}")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_main(script.main)
            except SystemExit as stop:
                code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def newest(runs: Path, stem: str) -> Path:
    """The newest run folder of that stem."""
    return max(p for p in runs.iterdir() if p.name.rpartition("_")[0] == stem)


def save_start(runs: Path) -> Path:
    """An SFT run `start` of a tiny model without training; returns its checkpoint."""
    tokenizer = get_tokenizer("demo")
    size = dict(n_layer=1, n_head=1, n_embd=16, block_size=64, vocab_size=tokenizer.vocab_size)
    run = create_run("sft", "start", str(runs))
    described = describe_model("sft", tokenizer, PromptTemplate(), "scratch")
    Saver(run, {"": GPT(GPTConfig(name="gpt2-nano", **size))}, tokenizer, described, 1).save_final(0, {})
    return run / "final"


def train_tiny(runs: Path) -> None:
    """Finished runs sft_tiny, rm_tiny and ppo_tiny of a tiny model."""
    save_start(runs)
    for stage, words in (("sft", "-p sft_start"), ("rm", "-p sft_tiny"), ("ppo", "-a sft_tiny -c rm_tiny")):
        result = call(stage, f"-n tiny {words}", runs)
        assert result.code == 0, result.err
