"""A run that goes on from an earlier checkpoint has left its later course: nothing of that is taken for the run's own.
And a run that is finished, or was stopped too early to go on with, is told from one that goes on."""

import json
import math
import shutil
from pathlib import Path

import pytest
from killing import copy_of_runs, curves, edit_record, rewrite
from scripts import call, command, newest
from setups import read_metrics

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig
from models.weights.checkpoint import describe
from training.storage import resuming
from training.storage.resuming import Resumption, find_resumption
from training.storage.saving import Saver, load_state
from utils.runs.durable import Disk
from utils.runs.finding import step_checkpoints

pytestmark = pytest.mark.slow

STAGES = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}
SOURCES = {"sft": "", "rm": "-p sft_base", "ppo": "-a sft_base -c rm_base"}
STEPS = {"sft": 6, "rm": 6, "ppo": 4}
FIGURE = {"sft": ("eval/loss", 1), "rm": ("eval/nll", 1), "ppo": ("eval/rlhf_reward", -1)}  # and the sign of "better"


def words(stage: str) -> str:
    return f"-n base {SOURCES[stage]} --eval-every 1 --save-every 2 --keep 9 --max-steps {STEPS[stage]}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of each stage."""
    folder = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        result = call(stage, words(stage), folder)
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    return copy_of_runs(finished, tmp_path / "runs")


def edit(run: Path, change) -> None:
    edit_record(run / "hyperparams.json", change)


# ---------------------------------------------------------------------------------------------------------------------
# What a course that was left has left behind
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_best_is_of_the_course_that_the_run_took(runs, stage: str) -> None:
    run = newest(runs, f"{stage}_base")
    first, best_of_then = step_checkpoints(run)[0], describe(run / "best")["step"]
    result = call(stage, f"{words(stage)} --lr 1e-7 --resume {first} --resume-override lr", runs)
    assert result.code == 0, result.err
    tag, sign = FIGURE[stage]
    figures = {row["step"]: row[tag] for row in read_metrics(run) if tag in row}
    assert sorted(figures) == list(range(STEPS[stage] + 1))
    best = describe(run / "best")
    assert best[tag] == figures[best["step"]]
    assert load_state(run / "final")["best"] == sign * best[tag]
    since = 2 if best_of_then > 2 else 0  # the best of before is lost when a later one had its place
    assert (run / "best.superseded1").exists() == (since == 2)
    assert best["step"] == min((sign * figure, step) for step, figure in figures.items() if step > since)[1]


STAYS = "stays"
LEFT_BEHIND = {
    "best": "superseded",
    "final": "superseded",
    "checkpoints/step_00000002": STAYS,
    "checkpoints/step_00000004": "superseded",
    "checkpoints/step_00000006": "superseded",
    "checkpoints/step_00000006.torn1": STAYS,  # nobody takes it for a checkpoint
    "doctor": "superseded",
    "overoptimisation.json": "superseded",
    "overoptimisation.png": "superseded",
    "nonfinite_step_00000001.json": STAYS,
    "nonfinite_step_00000002.json": STAYS,
    "nonfinite_step_00000003.json": "superseded",
    "nonfinite_step_00000005.json": "superseded",
    "nonfinite_step_00000005.safetensors": "superseded",
    "kl_step_00000006.json": "superseded",
    "notes.txt": STAYS,
}


def leave_behind(run: Path) -> None:
    """What a run and the commands that look at it may have written; files where there is nothing yet."""
    for name in LEFT_BEHIND:
        path = run / name
        if not path.exists():
            path.mkdir() if name == "doctor" or "torn" in name else path.write_text("of then")


def test_all_that_a_course_leaves_behind(runs, monkeypatch) -> None:
    """Each file of the table, at the first and at a second return to the same checkpoint."""
    run = newest(runs, "sft_base")
    checkpoint = run / "checkpoints" / "step_00000002"
    for number, lr in ((1, "1e-4"), (2, "2e-4")):
        leave_behind(run)
        result = call("sft", f"{words('sft')} --lr {lr} --resume {checkpoint} --resume-override lr", runs)
        assert result.code == 0, result.err
        for name, fate in LEFT_BEHIND.items():
            aside = run / f"{name}.superseded{number}"
            assert aside.exists() == (fate == "superseded"), name
            assert (f"{run / name} " in result.out and f"is kept as {aside.name}" in result.out) == aside.exists(), name
            made_anew = name in ("best", "final") or name.startswith("checkpoints/")
            assert (run / name).exists() == (fate == STAYS or made_anew), name
        # The files that grow are cut back, and hold each step once, of this course alone.
        rates = {row["step"]: row["train/lr"] for row in read_metrics(run) if "train/lr" in row}
        assert list(rates) == [1, 2, 3, 4, 5, 6] and all(rates[step] <= float(lr) for step in range(3, 7))
        assert [step for step, _ in curves(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]
        samples = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
        assert samples == sorted(samples) and set(samples) == set(range(7)) and samples.count(6) == samples.count(0)
    aside = run / "checkpoints" / "step_00000004.superseded1"
    error = call("sft", f"{words('sft')} --resume {aside}", runs).error
    assert f"--resume {aside}: is of a course that the run has left" in error


def test_a_run_that_goes_on_from_its_end_has_left_nothing(runs) -> None:
    run = newest(runs, "sft_base")
    names = [name for name in LEFT_BEHIND if not name.startswith(("nonfinite", "kl"))]
    leave_behind(run)
    state = load_state(run / "final")
    found = Resumption(run, run / "final", state, {}, {}, {})
    before = state["best"]
    resuming._take_up(SFTConfig(), found)
    assert all((run / name).exists() for name in names) and not list(run.rglob("*superseded*"))
    assert state["best"] == before < math.inf


@pytest.mark.parametrize("metric,sign", FIGURE.values())
@pytest.mark.parametrize(
    ("step", "figure", "at", "best", "stays"),
    [
        (2, 0.5, 2, 0.5, True),
        (2, 0.5, 4, 0.5, True),
        (2, -0.25, 4, -0.25, True),
        (4, 0.5, 2, 0.75, False),  # saved behind the checkpoint
        (3, 0.5, 2, math.inf, False),
        (2, 0.25, 4, 0.5, False),  # of a course that was left before, by code that let it stand
        (2, 0.25, 4, math.inf, False),
        (None, None, 4, 0.5, True),  # nobody knows where it is
    ],
)
def test_best_and_the_best_figure_agree(
    make_model, tokenizer, tmp_path, metric: str, sign: int, step, figure, at: int, best: float, stays: bool
) -> None:
    if step is not None:
        saver = Saver(tmp_path, {"": make_model()}, tokenizer, {}, 1)
        saver.save_best(step, metric, sign * figure)
    state = {"step": at, "best": best}
    resuming._agree_on_best(tmp_path, state, Disk())
    assert (tmp_path / "best.superseded1").exists() == (not stays)
    assert (tmp_path / "best").exists() == (stays and step is not None)
    assert state["best"] == (best if (tmp_path / "best").exists() else math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Finished, stopped, or stopped too early
# ---------------------------------------------------------------------------------------------------------------------


def goes_on(stage: str, runs: Path, more: str = "") -> Resumption | None:
    """What --resume auto goes on with; None for a new run, and "finished"."""
    config = parse_cli(STAGES[stage], command(stage, f"{words(stage)} --resume auto {more}", runs)[1:])
    try:
        return find_resumption(stage, config)
    except SystemExit as stop:
        assert stop.code == 0
        return "finished"


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_finished(runs, stage: str, monkeypatch) -> None:
    """A job that is queued again costs nothing: neither data nor models are looked at, and nothing is written."""
    run = newest(runs, f"{stage}_base")
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
    for name in ("preflight", "Runtime", "load_dataset"):
        monkeypatch.setattr(f"training.train_{stage}.{name}", None)
    result = call(stage, f"{words(stage)} --resume auto", runs)
    unit = "iterations" if stage == "ppo" else "steps"
    assert result.code == 0 and result.out == f"finished: {run} has all of its {STEPS[stage]} {unit}\n", result.err
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before
    error = call(stage, f"{words(stage)} --resume auto --lr 0.5", runs).error  # that is not the run that was finished
    assert "settings differ from the run's (lr: " in error
    result = call(stage, f"{words(stage)} --resume auto --lr 0.5 --resume-override lr", runs)
    assert result.code == 0 and "finished: " in result.out and "-> 0.5 changes nothing" in result.out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["final.writing", "final.deleting", "no final", "torn final", "later checkpoint"])
def test_a_run_that_was_stopped_at_its_end_goes_on(runs, stage: str, how: str) -> None:
    run = newest(runs, f"{stage}_base")
    final, last = run / "final", step_checkpoints(run)[-1]
    if how.startswith("final"):
        (final / "manifest.json").unlink()
        final.rename(run / how)
    elif how == "no final":
        shutil.rmtree(final)
    elif how == "torn final":
        rewrite(final / "model.safetensors", b"")
    else:  # gone on with behind its end
        last = last.rename(last.with_name("step_00000009"))
    assert goes_on(stage, runs).checkpoint == last


@pytest.mark.parametrize("stage", STAGES)
def test_a_final_between_two_renames_is_final(runs, stage: str) -> None:
    run = newest(runs, f"{stage}_base")
    (run / "final").rename(run / "final.old")
    assert goes_on(stage, runs) == "finished"


LONGER = [
    ("sft", "max_steps", "--max-steps 9", True),
    ("sft", "max_steps", "--max-steps 0", True),
    ("sft", "max_steps", "--max-steps 3", False),
    ("sft", "epochs", "--epochs 9", False),  # --max-steps ends it all the same
    ("sft", "epochs,max_steps", "--epochs 9 --max-steps 9", True),
    ("rm", "max_steps", "--max-steps 7", True),
    ("ppo", "max_steps", "--max-steps 0", True),
    ("ppo", "max_steps", "--max-steps 3", False),
    ("ppo", "iterations", "--iterations 300", False),
    ("ppo", "iterations,max_steps", "--iterations 5 --max-steps 0", True),
    ("ppo", "iterations,max_steps", "--iterations 4 --max-steps 0", False),
]


@pytest.mark.parametrize(("stage", "fields", "given", "longer"), LONGER)
def test_a_finished_run_goes_on_with_a_longer_schedule_only(runs, stage: str, fields: str, given: str, longer) -> None:
    run = newest(runs, f"{stage}_base")
    last = step_checkpoints(run)[-1]
    found = goes_on(stage, runs, f"{given} --resume-override {fields}")
    if not longer:
        assert found == "finished"
        return
    assert found.checkpoint == last and set(found.overridden) <= set(fields.split(","))
    for folder in step_checkpoints(run):
        shutil.rmtree(folder)
    assert goes_on(stage, runs, f"{given} --resume-override {fields}").checkpoint == run / "final"  # all there is
    # Killed before the first checkpoint of its longer life, when hyperparams.json has the new settings already.
    overridden = [{"step": STEPS[stage], "settings": found.overridden}]
    new = {field: now for field, (_, now) in found.overridden.items()}
    edit(run, lambda record: record.update(config=record["config"] | new, overridden=overridden))
    assert goes_on(stage, runs, f"{given} --resume-override {fields}").checkpoint == run / "final"


def test_a_run_that_its_epochs_ended_goes_on_with_more_epochs_only(runs) -> None:
    run = newest(runs, "sft_base")
    edit(run, lambda record: record["config"].update(max_steps=0, epochs=2))
    assert goes_on("sft", runs, "--max-steps 0 --epochs 2") == "finished"
    assert goes_on("sft", runs, "--max-steps 50 --epochs 2 --resume-override max_steps") == "finished"
    assert goes_on("sft", runs, "--max-steps 0 --epochs 3 --resume-override epochs").state["step"] == 6


@pytest.mark.parametrize("stage", STAGES)
def test_auto_is_the_newest_run_of_the_name_whatever_it_is(runs, stage: str, capsys) -> None:
    run = newest(runs, f"{stage}_base")
    copy_of_runs(run, run.with_name(f"{stage}_base2_29990101000000"))  # of another name
    shutil.rmtree(run / "final")
    newer = copy_of_runs(run, run.with_name(f"{stage}_base_29980101000000"))
    assert goes_on(stage, runs).run == newer
    for left in ("checkpoints", "best"):
        shutil.rmtree(newer / left)
    capsys.readouterr()
    assert goes_on(stage, runs) is None
    assert capsys.readouterr().out == (
        f"--resume auto: {newer} was stopped before its first checkpoint; starting a new run, with its settings "
        "where none are given\n"
    )
    (newer / "hyperparams.json").unlink()  # killed as it was being made
    assert goes_on(stage, runs) is None
