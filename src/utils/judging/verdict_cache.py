"""Verdicts that were paid for, on disk: a killed evaluation goes on where it was and nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from config.user_error import UserError
from utils.judging.pairwise import Question, Verdict


class VerdictCache:
    """An append-only JSONL file, one line per clear verdict; safe with several threads and several processes.

    A line is written at once, whole and behind a lock, and is on its way to the disk when `add` returns: killing the
    process loses nothing that was added. A line that cannot be read (the process was killed while writing, or somebody
    edited it) is passed over, and its question asked again. Of two verdicts on one question the first counts, so that
    results do not change from one reading to the next.
    """

    def __init__(self, path: Path, judge: Sequence[str]) -> None:
        """Read what is there (UserError where that fails); path and folder are made at the first verdict.

        judge: everything beside the question that a verdict depends on: kind, server, model, prompt template.

        `variant` may be set later, to what was found unlike the usual way of asking (""): verdicts of one variant are
        not those of another. It begins as that of this judge's last verdict in the file.
        """
        self.path, self._judge, self.variant = path, list(judge), ""
        self._verdicts: dict[str, Verdict] = {}
        self._thread_lock = threading.Lock()
        self.variant = self.refresh()

    def key(self, question: Question) -> str:
        """SHA-256, hex, of the judge and of the question with its order."""
        identity = [*self._identity, question.prompt, question.first, question.second]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def get(self, question: Question) -> Verdict | None:
        """The verdict on this question in this order, None when there is none yet."""
        return self._verdicts.get(self.key(question))

    def add(self, question: Question, verdict: Verdict) -> None:
        """Keep a clear verdict (the others are asked again); UserError where the file cannot be written."""
        if not verdict.clear:
            return
        key = self.key(question)
        line = json.dumps({"key": key, "verdict": verdict.value, "judge": self._identity}) + "\n"
        with self._thread_lock:
            try:
                self._append(line.encode())
            except OSError as error:
                raise UserError(f"{self.path}: cannot keep verdicts there ({error.strerror})") from None
            self._verdicts.setdefault(key, verdict)

    def refresh(self) -> str:
        """Read what other processes have added since; UserError where the file cannot be read.

        Returns the variant of this judge's last verdict there.
        """
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return self.variant
        except OSError as error:
            raise UserError(f"{self.path}: cannot read the verdicts there ({error.strerror})") from None
        variant = self.variant
        for line in lines:
            if entry := _entry(line):
                key, verdict, judge = entry
                self._verdicts.setdefault(key, verdict)
                if judge[: len(self._judge)] == self._judge:
                    variant = "".join(judge[len(self._judge) :])
        return variant

    @property
    def _identity(self) -> list[str]:
        return [*self._judge, self.variant] if self.variant else self._judge

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    line = b"\n" + line  # a process was killed while writing the last line: it ends here
            file.write(line)


def _entry(line: bytes) -> tuple[str, Verdict, list[str]] | None:
    """Key, verdict and judge of a line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}  # without its end it is being written, or never will be
        key, verdict = row["key"], Verdict(row["verdict"])
    except (ValueError, KeyError, TypeError):
        return None
    judge = row.get("judge")
    judge = judge if isinstance(judge, list) and all(isinstance(part, str) for part in judge) else []
    return (key, verdict, judge) if isinstance(key, str) and verdict.clear else None
