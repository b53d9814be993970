"""Runs that are broken in known ways, and what the doctor says about them.

    python src/experiments/main.py -t results --seeds 0 1 2 --variants kl0 lora    # healthy runs, and KL coefficient 0
    python tests/experiments/doctor/broken_runs.py --base demo_s0                          # trains the broken runs
    python tests/experiments/doctor/broken_runs.py --pack tests/experiments/doctor/runs    # what the tests read
    python tests/experiments/doctor/broken_runs.py --table tests/experiments/doctor/runs   # the table of docs/doctor.md

Every fault is put into the real scripts: by a flag or a file where that can do it, and by replacing a function of the
trainer where the code would refuse. Finished runs are used again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import json
import random
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3] / "src")

from torch import Tensor

from config.model_configs import GPTConfig
from config.user_error import UserError, run_main
from experiments.demo.run import GOLD
from experiments.doctor.record import read_run
from experiments.doctor.run import examine
from training import start, trainers
from utils.data.batching import Batch
from utils.runs.finding import newest_run
from utils.runs.folder import REPO, runs_root

_STAGES = ("sft", "rm", "ppo")
# The demo's own runs beside the cases below; one variant of them is broken on purpose.
_DEMO = re.compile(r"((?:sft_vanilla|sft|rm|ppo)_demo_s\d+(?:_lora|_kl0)?)_\d{14}")
_LAB = re.compile(r"(ppo_lab_\d)_\d{14}")  # the runs of docs/lab.md
_NO_FAULT = "none"


@contextmanager
def dropout_on() -> Iterator[None]:
    """All four roles have dropout 0.1, and nobody checks the first minibatch."""

    def with_dropout(config: GPTConfig) -> GPTConfig:
        return replace(config, dropout=0.1)

    with (
        mock.patch.object(start, "without_dropout", with_dropout),
        mock.patch.object(trainers, "check_first_minibatch", lambda *_: None),
        mock.patch.object(trainers, "check_reference", lambda *_: None),
        mock.patch.object(trainers, "check_sampler", lambda *_: None),
    ):
        yield


@contextmanager
def eos_masked() -> Iterator[None]:
    """SFT's loss leaves out the last token of every response, the EOS."""

    def without_eos(batch: Batch) -> Tensor:
        first = batch.prompt_len.clamp(min=1)
        return trainers.state_columns(first, batch.length - first - 1, batch.ids.shape[1])

    with mock.patch.object(trainers, "sft_targets", without_eos):
        yield


@dataclass(frozen=True)
class Case:
    """One run: its stage, what was done to it, its flags, and the finding it must lead to.

    Attributes:
        name: of the run, after `doctor_`.
        stage: sft, rm or ppo.
        fault: for the table.
        flags: of the stage's script; {base} is the stem of the demo's runs, {gold} its gold reward, {shuffled} the file
            of shuffled labels, {s} what a seed other than 0 appends to names.
        expected: the code of the finding that has to come first; empty for a healthy run.
        sabotage: a context in which the fault is in the code.
    """

    name: str
    stage: str
    fault: str
    flags: str
    expected: str = ""
    sabotage: Callable = nullcontext

    @property
    def stem(self) -> str:
        """The run's folder without its time, for seed 0; other seeds append _s and their number."""
        return f"{self.stage}_doctor_{self.name}"


_PPO = "-a sft_{base} --eval-reward-fn {gold}"
CASES = (
    Case("healthy", "sft", _NO_FAULT, "-p sft_vanilla_{base} --max-steps 150 --eval-every 50"),
    Case("no_eos", "sft", "EOS masked out of the targets", "-p scratch --max-steps 300 --eval-every 100",
         "never-ends", eos_masked),
    Case("lr30", "sft", "learning rate 30 times", "-p sft_vanilla_{base} --lr 0.09 --max-steps 150 --eval-every 50",
         "diverges"),
    Case("healthy", "rm", _NO_FAULT, "-p sft_{base} --max-steps 150 --eval-every 50"),
    Case("shuffled", "rm", "labels shuffled", "-p sft_{base} --dataset {shuffled} --max-steps 150 --eval-every 50",
         "reward-at-chance"),
    Case("lr30", "rm", "learning rate 30 times", "-p sft_{base} --lr 0.03 --max-steps 60 --eval-every 20",
         "forgets"),
    Case("healthy", "ppo", _NO_FAULT, _PPO + " -c rm_{base} --iterations 10 --eval-every 5"),
    Case("dropout", "ppo", "dropout on", _PPO + " -c rm_{base} --iterations 6 --eval-every 3", "ratio-not-one",
         dropout_on),
    Case("shuffled", "ppo", "reward model at chance", _PPO + " -c rm_doctor_shuffled{s} --iterations 12 --eval-every 4",
         "reward-at-chance"),
    Case("no_eos", "ppo", "EOS masked in SFT", "-a sft_doctor_no_eos{s} --reward-fn {gold} --eval-reward-fn {gold} "
         "--iterations 4 --eval-every 4 --eval-examples 64", "never-ends"),
    Case("lr30", "ppo", "learning rates 30 times",
         _PPO + " -c rm_{base} --lr 0.009 --critic-lr 0.015 --iterations 8 --eval-every 4", "steps-too-large"),
)  # fmt: skip


def shuffled_pairs(folder: Path) -> Path:
    """The demo's preferences with every label drawn anew by a coin; returns the file."""
    path = folder / "doctor_shuffled.jsonl"
    coin = random.Random(0)
    with gzip.open(REPO / "assets/demo/pairs-train.jsonl.gz", "rt") as source, path.open("w") as target:
        for line in source:
            row = json.loads(line)
            pair = [row["chosen"], row["rejected"]]
            coin.shuffle(pair)
            target.write(json.dumps({"chosen": pair[0], "rejected": pair[1]}) + "\n")
    return path


def train(case: Case, base: str, seed: int, runs_dir: str) -> Path:
    """Train one case, or find its newest run; returns the run's folder.

    Raises:
        UserError: a flag is wrong, or the demo's runs are missing.
    """
    suffix = f"_s{seed}" if seed else ""
    run = newest_run(case.stem + suffix, runs_dir)
    if run is not None and (run / "final").is_dir():
        return run
    root = runs_root(runs_dir)
    root.mkdir(parents=True, exist_ok=True)
    shuffled = shuffled_pairs(root) if "{shuffled}" in case.flags else ""
    fill = {"base": base, "gold": GOLD, "shuffled": shuffled, "s": suffix}
    flags = [word.format(**fill) for word in case.flags.split()]
    words = ["-n", f"doctor_{case.name}{suffix}", *flags, "--seed", str(seed), "--runs-dir", runs_dir]
    print(f"\n== {case.stage}: {case.fault}\n$ train_{case.stage}.py {' '.join(words)}", flush=True)
    # The scripts are written to be started: importing one moves src/ to the front of sys.path.
    with (
        mock.patch.object(sys, "argv", [f"train_{case.stage}.py", *words]),
        mock.patch.object(sys, "path", [*sys.path]),
    ):
        script = importlib.import_module(f"training.train_{case.stage}")
        with case.sabotage():
            code = script.main()
    if code:
        raise UserError(f"--only {case.stem}: training ended with exit code {code}")
    return newest_run(case.stem + suffix, runs_dir)


def fault_of(run: Path) -> tuple[str, str] | None:
    """What was done to a run and the code of the finding it must lead to ("" for none); None for any other run."""
    for case in CASES:
        if re.fullmatch(re.escape(case.stem) + r"(_s\d+)?_\d{14}", run.name):
            return case.fault, case.expected
    demo = _DEMO.fullmatch(run.name)
    if demo is None:
        return None
    return ("KL coefficient 0", "over-optimised") if demo[1].endswith("_kl0") else (_NO_FAULT, "")


def pack(run: Path, target: Path) -> None:
    """Write what the doctor reads of a run as a .tar.gz, without the paths of this machine and the same to the bit."""
    hyperparams = json.loads((run / "hyperparams.json").read_text())
    for key in ("machine", "commit", "versions"):
        hyperparams.pop(key, None)
    files = {"hyperparams.json": json.dumps(_without_paths(hyperparams), indent=1).encode()}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).is_file():
            files[name] = (run / name).read_bytes()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{run.name}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        if (run / "final").is_dir():
            entry = tarfile.TarInfo(f"{run.name}/final")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(content.getvalue(), mtime=0))


def _without_paths(value: Any) -> Any:
    """The same JSON value with absolute paths cut to what lies in the repo or the folder of runs."""
    if isinstance(value, dict):
        return {key: "runs" if key == "runs_dir" else _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        after = ["", *value[:-1]]
        return ["runs" if flag == "--runs-dir" else _without_paths(word) for flag, word in zip(after, value)]
    if isinstance(value, str) and value.startswith("/"):
        inside = re.search(r"src/.+|(?:sft|rm|ppo)_[^/]+_\d{14}(?:/.*)?$", value)
        found = inside[0] if inside else Path(value).name
        return found if found.startswith("src/") else f"runs/{found}"
    return value


def unpack(archives: Path, folder: Path) -> list[Path]:
    """Unpack the runs that `pack` wrote into `folder`; returns their folders."""
    for path in sorted(archives.glob("*.tar.gz")):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    return sorted(folder.iterdir())


def confusion_table(runs: list[Path]) -> str:
    """Fault by finding as markdown: the step at which a finding shows, bold for the one that is told first."""
    found: dict[tuple[str, str], list[list[tuple[str, int]]]] = {}
    for run in runs:
        fault = fault_of(run)
        if fault is not None:
            record = read_run(run)
            found.setdefault((record.stage, fault[0]), []).append([(f.code, f.step) for f in examine(record)[0]])
    rows = sorted(found, key=lambda row: (_STAGES.index(row[0]), row[1] != _NO_FAULT, row[1]))
    codes = list(dict.fromkeys(code for row in rows for findings in found[row] for code, _ in findings))
    lines = [_cells("stage", "fault", "runs", *codes), "|---" * (3 + len(codes)) + "|"]
    for stage, fault in rows:
        of = found[stage, fault]
        cells = [_seen(code, of) for code in codes]
        lines.append(_cells(stage, fault, len(of), *cells))
    return "\n".join(lines)


def _seen(code: str, runs: list[list[tuple[str, int]]]) -> str:
    """A cell: the steps at which a finding shows in the runs of a row."""
    told = []
    for findings in runs:
        for place, (name, step) in enumerate(findings):
            if name == code:
                told.append(f"**{step}**" if place == 0 else str(step))
    return ", ".join(told)


def _cells(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> int:
    """Train what is missing, or pack runs, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo_s0", help="the demo's runs to start from: sft_BASE and rm_BASE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs-dir", default="runs", help="where runs are made and looked for")
    parser.add_argument("--only", nargs="*", default=[case.stem for case in CASES], help="cases to train")
    parser.add_argument("--pack", default="", help="pack the runs there are into this folder; train nothing")
    parser.add_argument("--pack-lab", default="", help="the same with the runs of docs/lab.md")
    parser.add_argument("--table", default="", help="print fault by finding of the packed runs in this folder")
    flags = parser.parse_args()
    if flags.pack or flags.pack_lab:
        for run in sorted(runs_root(flags.runs_dir).iterdir()):
            if _LAB.fullmatch(run.name) if flags.pack_lab else fault_of(run) is not None:
                pack(run, Path(flags.pack_lab or flags.pack) / f"{run.name[:-15]}.tar.gz")
        return 0
    if flags.table:
        with tempfile.TemporaryDirectory() as folder:
            print(confusion_table(unpack(Path(flags.table), Path(folder))))
        return 0
    for case in CASES:
        if case.stem in flags.only:
            train(case, flags.base, flags.seed, flags.runs_dir)
    return 0


if __name__ == "__main__":
    run_main(main)
