"""Where figures and texts of a run go: TensorBoard, metrics.jsonl and samples.jsonl, under the same tags."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Self

from torch import Tensor


class MetricsLog:
    """Appends to metrics.jsonl and samples.jsonl and writes TensorBoard events; a context that closes them.

    After a resume, lines of steps that will be run again are dropped, so that no step appears twice, and `time` goes on
    from the last line that stays.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        for path in (self.metrics_path, self.samples_path):
            _drop_lines_after(path, resume_step)
        self.writer = SummaryWriter(str(folder / "logs"), purge_step=resume_step + 1 if resume_step else None)
        self.start = time.monotonic() - _last_time(self.metrics_path)

    def log(self, step: int, metrics: dict[str, float | Tensor]) -> dict[str, float]:
        """Write one line of figures and one TensorBoard scalar each; returns them as floats."""
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": step, "time": round(time.monotonic() - self.start, 3)}
        # JSON has no NaN: an undefined figure (a correlation of constants, say) is null.
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        return values

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write sampled texts; each row is a dict with at least prompt and response."""
        with self.samples_path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        text = "\n\n---\n\n".join("  \n".join(f"**{key}**: {value}" for key, value in row.items()) for row in rows)
        self.writer.add_text("samples", text, step)

    def close(self) -> None:
        """Flush everything; without it TensorBoard misses the last minutes."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= step]
    fresh = path.with_name(path.name + ".writing")
    fresh.write_bytes(b"".join(kept))
    os.replace(fresh, path)


def _step(line: bytes) -> float:
    """The step of a line; infinite for one that was cut short when the process was killed."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _last_time(path: Path) -> float:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return json.loads(lines[-1])["time"] if lines else 0.0
