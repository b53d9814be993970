"""What `-t gpu` found: verdicts as lines, a JSON file per part, and one page of markdown made from these files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.host import cpu_name
from experiments.markdown import table
from utils.runs.folder import REPO

TITLES = {
    1: "tests that need a GPU",
    2: "the demo in every precision",
    3: "speed and memory of every preset and stage",
    4: "transformers beside ours",
    5: "profiles",
}
PAGE = "table.md"
_FAILED = "FAILED"


@dataclass(frozen=True)
class Verdict:
    """One figure of a part and what was aimed at; met: None where there is no aim."""

    part: int
    what: str
    figure: str
    aim: str = ""
    met: bool | None = None
    word_given: str = ""

    @property
    def word(self) -> str:
        """ok, MISSED, FAILED or left out."""
        return self.word_given or ("MISSED" if self.met is False else "ok")

    def to_json(self) -> dict[str, Any]:
        """For the part's file."""
        return {"what": self.what, "figure": self.figure, "aim": self.aim, "word": self.word}

    def __str__(self) -> str:
        return f"part {self.part} | {self.what} | {self.figure} | aim: {self.aim or 'none'} | {self.word}"


class Report:
    """Collects verdicts, data and tables, and writes them as they come.

    Args:
        out: the folder for part1.json ... part5.json and table.md; made if it is not there.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.verdicts: list[Verdict] = []
        self.data: dict[int, dict[str, Any]] = {}
        self.tables: dict[int, dict[str, str]] = {}
        self.environment: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)

    def say(self, part: int, what: str, figure: str, aim: str = "", met: bool | None = None) -> None:
        """Print a verdict and keep it."""
        self._keep(Verdict(part, what, figure, aim, met))

    def fail(self, part: int, what: str, reason: str) -> None:
        """Print that something went wrong, which makes the exit code 1, and keep it."""
        self._keep(Verdict(part, what, reason, word_given=_FAILED))

    def skip(self, part: int, what: str, reason: str) -> None:
        """Say that something was left out."""
        self._keep(Verdict(part, what, reason, word_given="left out"))

    @property
    def failed(self) -> bool:
        """Whether a part went wrong."""
        return any(verdict.word == _FAILED for verdict in self.verdicts)

    def _keep(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print(verdict, flush=True)

    def save(self, part: int, data: dict[str, Any], tables: dict[str, str] | None = None) -> None:
        """Add to a part's data and tables, and write both as they are now."""
        self.data.setdefault(part, {}).update(data)
        self.tables.setdefault(part, {}).update(tables or {})
        report = {
            "part": part,
            "title": TITLES[part],
            "environment": self.environment,
            "verdicts": [v.to_json() for v in self.verdicts if v.part == part],
            "data": self.data[part],
            "tables": self.tables[part],
        }
        (self.out / f"part{part}.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        (self.out / PAGE).write_text(page(self.out) + "\n")


def page(folder: Path) -> str:
    """Markdown of all parts that lie in a folder, those of earlier commands too."""
    texts, before = [], ""
    for part, title in TITLES.items():
        file = folder / f"part{part}.json"
        if not file.is_file():
            continue
        report = json.loads(file.read_text())
        cells = [(v["what"], v["figure"], v["aim"], v["word"]) for v in report["verdicts"]]
        where = in_words(report["environment"])
        texts += [f"## {part}. {title}", *([where] if where != before else [])]
        texts += [table("what | figure | aim | verdict", cells)]
        before = where
        texts += [f"### {name}\n\n{text}" for name, text in report["tables"].items()]
    return "\n\n".join(texts)


def in_words(environment: dict[str, Any]) -> str:
    """The environment as one line."""
    return ", ".join(f"{key} {value}" for key, value in environment.items() if value not in (None, ""))


def describe_environment(device: str) -> dict[str, Any]:
    """Card, driver, versions, commit. Imports torch."""
    import torch

    gpu = device == "cuda"
    driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if gpu else ""
    commit = output(["git", "-C", str(REPO), "describe", "--always", "--dirty"])  # a copy of the tree has none
    return {
        "card": torch.cuda.get_device_name() if gpu else None,
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if gpu else None,
        "driver": driver.partition("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["main.py", *sys.argv[1:]]),
    }


def output(command: Sequence[str]) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
