"""Figures and texts of a run: one line a step, also after a resume, and the same in TensorBoard."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.runs.metrics_log import MetricsLog


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "logs"))
    accumulator.Reload()
    return accumulator


def test_figures_stand_in_both_places_under_one_name(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        assert log.log(1, {"train/loss": torch.tensor(2.5), "train/lr": 0.1}) == {
            "train/loss": 2.5,
            "train/lr": pytest.approx(0.1),
        }
        log.log(2, {"train/loss": 1.5})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "time": first["time"], "train/loss": 2.5, "train/lr": 0.1}
    assert (second["step"], second["train/loss"]) == (2, 1.5) and second["time"] >= first["time"] >= 0
    curve = events(tmp_path).Scalars("train/loss")  # written although no one waited: closing flushes
    assert [(point.step, point.value) for point in curve] == [(1, 2.5), (2, 1.5)]


def test_what_is_not_finite_is_null(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        values = log.log(0, {"a": float("nan"), "b": torch.tensor(math.inf), "c": 1})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)
    assert math.isnan(values["a"]) and values["b"] == math.inf
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_samples_keep_every_character(tmp_path) -> None:
    texts = ["plain", "two\nlines", "é 中 🙂", "line\u2028separator\x85\x0b", 'quote " and \\']
    with MetricsLog(tmp_path) as log:
        log.samples(3, [{"prompt": text, "response": text[::-1], "score": 0.5} for text in texts])
    rows = lines(tmp_path / "samples.jsonl")
    assert [row["prompt"] for row in rows] == texts and {row["step"] for row in rows} == {3}
    assert "samples/text_summary" in events(tmp_path).Tags()["tensors"]


def test_a_resume_drops_what_will_be_run_again(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (0, 1, 2, 3):
            log.log(step, {"x": step})
            log.samples(step, [{"prompt": "a\u2028b", "response": "c"}])
            if step == 2:
                position = log.position()
                log.log(step, {"end": 1.0})  # behind the checkpoint, although of its step
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "cut sh')
    path = tmp_path / "metrics.jsonl"
    before = lines_of(path)[2]
    for _ in range(2):  # killed once more before another checkpoint was saved
        with MetricsLog(tmp_path, position) as log:
            assert lines_of(path)[-1] == before
            log.log(3, {"x": 30})
            log.samples(3, [{"prompt": "new", "response": "d"}])
    assert [(line["step"], line["x"]) for line in lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    times = [line["time"] for line in lines(path)]
    assert times == sorted(times)  # the clock goes on
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "metrics.jsonl", "samples.jsonl"]
    points = [(p.step, p.value) for p in events(tmp_path).Scalars("x")]
    assert points == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert len(events(tmp_path).Tensors("samples/text_summary")) == 4
    assert [p.stat().st_size > 0 for p in sorted((tmp_path / "logs").iterdir())] == [False, True]


def test_a_tensorboard_that_looks_on_sees_no_point_twice(tmp_path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.log(step, {"x": step})
        position = log.position()
        log.log(3, {"x": 3})
        looking = events(tmp_path)
        assert [p.step for p in looking.Scalars("x")] == [1, 2, 3]
    with MetricsLog(tmp_path, position) as log:
        log.log(3, {"x": 30})
        looking.Reload()
    assert [(p.step, p.value) for p in looking.Scalars("x")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_what_a_kill_leaves_is_all_that_was_logged(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.log(step, {"x": step})
    assert [p.step for p in events(tmp_path).Scalars("x")] == [1, 2]  # nobody has closed or flushed anything


def test_a_log_that_was_cut_by_hand_is_told(tmp_path, capfd) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"x": 1})
        log.log(2, {"x": 2})
        position = log.position()
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(path)[0] + "\n")
    with MetricsLog(tmp_path, position) as log:
        log.log(3, {"x": 3})
    assert f"{path}: is shorter than the checkpoint says; lines are missing" in capfd.readouterr().err
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_a_full_disk_keeps_lines_in_memory_until_they_fit(tmp_path, monkeypatch, capfd) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"x": 1})
    room, write = [5], os.write

    def full(handle: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(handle, data[: room[0]])
        room[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.log(2, {"x": 2})
        log.log(3, {"x": 3})
        assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]  # and no half line
        with pytest.raises(OSError):
            log.sync()
        log.close()
    warned = capfd.readouterr().err
    assert warned.count("kept in memory until it fits") == 2 and "could not be written" in warned
    log.log(4, {"x": 4})
    log.sync()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [p.step for p in events(tmp_path).Scalars("x")] == [1, 2, 3, 4]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_it_is_closed_when_a_run_fails(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), MetricsLog(tmp_path) as log:
        log.log(1, {"x": 1 / 1})
        log.log(2, {"x": 1 / 0})
    assert [p.step for p in events(tmp_path).Scalars("x")] == [1]
