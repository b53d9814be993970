"""Where figures and texts of a run go: TensorBoard, metrics.jsonl and samples.jsonl, under the same tags.

All three are files that only grow. A checkpoint notes how long they are; a resume cuts them back to that, so that no
step is missing and none appears twice, whenever the process was killed.

Events are packed by TensorBoard's own writer of records, but appended here. SummaryWriter's thread writes minutes late,
so that a kill leaves a gap behind a checkpoint, and it waits for ever once the disk is full.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from tqdm import tqdm

from utils.runs.durable import write_file

_EARLIER_TAGS = {
    **{f"val/ratio_{moment}": f"policy/ratio_{moment}" for moment in ("mean", "var", "max")},
    "time/sampler_vs_train_logp_max": "policy/sampler_vs_train_logp_max",
    "actor_lr": "lr/actor",
    "critic_lr": "lr/critic",
    "time/tokens_s": "time/tokens_per_s",
    **{f"time/{p}_tokens_s": f"time/{p}_tokens_per_s" for p in ("rollout", "score", "reference", "update")},
}


def current_tag(tag: str) -> str:
    """Today's name of a tag, for readers of metrics.jsonl: runs from before a renaming have the earlier one, and a run
    that was gone on with since has both, one after the other."""
    return _EARLIER_TAGS.get(tag, tag)


class GrowingFile:
    """A file that is appended to. What a full disk refuses is kept in memory and written once there is room.

    Args:
        path: the file; made at the first write.
        length: its bytes so far; what is behind them is cut off.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self.written = length
        self.pending = b""

    @property
    def length(self) -> int:
        """Bytes given so far, written or pending."""
        return self.written + len(self.pending)

    def append(self, data: bytes) -> None:
        """Add bytes; never fails, see `flush`."""
        fresh_trouble = not self.pending
        self.pending += data
        error = self.flush()
        if error is not None and fresh_trouble:
            _warn(f"{self.path}: {error.strerror or error}; what belongs there is kept in memory until it fits")

    def flush(self, sync: bool = False) -> OSError | None:
        """Write what is pending, with `sync` through to the medium; the error when that cannot be done now."""
        if not self.pending and not (sync and self.written):
            return None
        try:
            self.path.parent.mkdir(exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                self._write(handle)
                if sync:
                    os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            return error
        return None

    def _write(self, handle: int) -> None:
        done = 0
        os.lseek(handle, self.written, os.SEEK_SET)
        try:
            while done < len(self.pending):
                done += os.write(handle, self.pending[done:])
        except OSError:
            os.ftruncate(handle, self.written)  # no half lines for readers
            raise
        self.written += done
        self.pending = b""


class MetricsLog:
    """Appends to metrics.jsonl and samples.jsonl and writes TensorBoard events; a context that closes them.

    Args:
        folder: the run's folder.
        position: of a run that is gone on with, what `position()` gave when its checkpoint was saved. `time` goes on
            from the last line that stays.
    """

    def __init__(self, folder: Path, position: dict[str, int] | None = None) -> None:
        kept = position or {"metrics": 0, "samples": 0, "events": 0}
        self.metrics = _cut(folder / "metrics.jsonl", kept["metrics"])
        self.texts = _cut(folder / "samples.jsonl", kept["samples"])
        self.events = _open_events(folder / "logs", kept["events"])
        self._files = (self.metrics, self.texts, self.events)
        self.start = time.monotonic() - _last_time(self.metrics.path)

    def log(self, step: int, metrics: dict[str, float | Tensor]) -> dict[str, float]:
        """Write one line of figures and one TensorBoard scalar each; returns them as floats."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": step, "time": round(time.monotonic() - self.start, 3)}
        # JSON has no NaN: an undefined figure (a correlation of constants, say) is null.
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.metrics.append((json.dumps(record) + "\n").encode())
        points = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self.events.append(_record(step=step, summary=Summary(value=points)))
        return values

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write sampled texts; each row is a dict with at least prompt and response."""
        from torch.utils.tensorboard import summary

        lines = (json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        # A lone surrogate has no UTF-8; its escape is good JSON.
        self.texts.append("".join(lines).encode("utf-8", "backslashreplace"))
        text = "\n\n---\n\n".join("  \n".join(f"**{key}**: {value}" for key, value in row.items()) for row in rows)
        self.events.append(_record(step=step, summary=summary.text("samples", text)))

    def position(self) -> dict[str, int]:
        """How much there is now, for a checkpoint."""
        lengths = {"metrics": self.metrics.length, "samples": self.texts.length}
        return lengths | {"events": self.events.length - len(_event_header())}

    def sync(self) -> None:
        """Bring everything through to the medium, or raise the OSError that hinders it now."""
        for file in self._files:
            error = file.flush(sync=True)
            if error is not None:
                raise error

    def close(self) -> None:
        """Try once more to write what is pending, and tell what is lost."""
        for file in self._files:
            if file.flush() is not None:
                _warn(f"{file.path}: the last {len(file.pending)} bytes could not be written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _cut(path: Path, length: int) -> GrowingFile:
    """A file of lines, cut back to `length` bytes. Half a line at the end goes, too."""
    data = path.read_bytes() if path.exists() else b""
    kept = data[: data.rfind(b"\n", 0, length) + 1]
    if len(kept) < length and path.exists():
        _warn(f"{path}: is shorter than the checkpoint says; lines are missing")
    if kept != data:
        write_file(path, kept)
    return GrowingFile(path, len(kept))


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _last_time(path: Path) -> float:
    try:
        return float(json.loads(path.read_bytes().splitlines()[-1])["time"])
    except (FileNotFoundError, IndexError, ValueError, KeyError, TypeError):
        return 0.0


def _record(**event: Any) -> bytes:
    """One event as it stands in an event file: length, checksum, protobuf, checksum."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
    return record.getvalue()


def _event_header() -> bytes:
    """Start of every event file, always of one length; the session start at step 0 makes a TensorBoard that has read an
    earlier file of the run forget its points."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    return _record(file_version="brain.Event:2") + _record(session_log=SessionLog(status=SessionLog.START))


def _open_events(folder: Path, kept: int) -> GrowingFile:
    """The event file to go on with: a new one that starts with the first `kept` bytes of the last one's events.

    A new file and not the old one cut short, because a TensorBoard that is looking on cannot go back in a file.
    """
    earlier = sorted(folder.glob("events.out.tfevents.*"))
    moment = int(time.time())
    start = _event_header()
    if earlier:
        moment = max(moment, int(earlier[-1].name.split(".")[3]) + 1)  # TensorBoard reads them in the order of names
        body = earlier[-1].read_bytes()[len(start) : len(start) + kept]
        if len(body) < kept:
            _warn(f"{earlier[-1]}: is shorter than the checkpoint says; points are missing")
        start += body
    file = GrowingFile(folder / f"events.out.tfevents.{moment:010d}.{socket.gethostname()}.{os.getpid()}.0")
    if not earlier:
        file.append(start)
        return file
    write_file(file.path, start)
    file.written = len(start)
    for old in earlier[:-1]:
        old.unlink()
    os.truncate(earlier[-1], 0)  # and not removed: a TensorBoard that is at its end would never find the next one
    return file
