"""Reading a run's folder: figures, flags, what is torn or missing, and what RUN may mean."""

import gzip
import json

import numpy as np
import pytest

from config.user_error import UserError
from experiments.doctor.record import find_run, read_run

LINES = [
    {"step": 0, "time": 0.5, "eval/loss": 3.0},
    {"step": 10, "time": 1.0, "train/loss": 2.0, "train/epoch": 0.1},
    {"step": 20, "time": 2.0, "train/loss": None, "train/epoch": 0.2},
    {"step": 20, "time": 2.5, "eval/loss": 1.0},
]


@pytest.fixture
def run(tmp_path):
    """`run(lines, **hyperparams)`: a run folder with these lines of metrics, dicts or raw text."""

    def make(lines=LINES, name="sft_x_20260101000000", stage="sft", **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {"config": "gpt2-nano", "lr": 0.003, "epochs": 3, "max_steps": 0, **config}
        hyperparams = {"stage": stage, "config": config, "runs_on": "cpu (1 threads), fp32"}
        (folder / "hyperparams.json").write_text(json.dumps(hyperparams))
        text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
        (folder / "metrics.jsonl").write_text("".join(text))
        return folder

    return make


def test_figures_flags_and_plan(run):
    record = read_run(run())
    assert record.stage == "sft" and record.precision == "fp32" and not record.finished
    assert record["eval/loss"].steps.tolist() == [0, 20] and record["eval/loss"].values.tolist() == [3, 1]
    assert record["train/loss"].steps.tolist() == [10] and np.isnan(record.series["train/loss"].values[1])
    assert len(record["never/logged"]) == 0 and "time" not in record.series
    assert record.last_step == 20 and record.planned_steps == 300
    assert record.times_default("lr") == 1 and record.default("lr") == 0.003


def test_the_plan(run):
    assert read_run(run(max_steps=150)).planned_steps == 150
    assert read_run(run(max_steps=900)).planned_steps == 300
    assert read_run(run(LINES[:1])).planned_steps == 0
    ppo = [{"step": 1, "objective/kl": 0.0}]
    assert read_run(run(ppo, stage="ppo", iterations=30)).planned_steps == 30
    assert read_run(run(ppo, stage="ppo", iterations=30, max_steps=4)).planned_steps == 4


def test_a_setting_without_a_default_to_compare_with(run):
    record = read_run(run(config="of-my-own"))
    assert record.default("lr") is None and record.times_default("lr") == 1
    assert read_run(run(lr=0.09)).times_default("lr") == pytest.approx(30)


def test_up_to_is_the_run_as_it_was(run):
    folder = run()
    (folder / "final").mkdir()
    record = read_run(folder)
    early = record.up_to(10)
    assert record.finished and not early.finished and record.up_to(20).finished
    assert early.last_step == 10 and early["eval/loss"].steps.tolist() == [0]


def test_a_figure_that_was_renamed_while_the_run_went_on_is_one_curve(run):
    then = {"step": 1, "val/ratio_max": 2.0, "actor_lr": 0.1, "time/sampler_vs_train_logp_max": 1e-6, "val/mean": 0.0}
    now = {"step": 2, "policy/ratio_max": 3.0, "lr/actor": 0.2, "policy/sampler_vs_train_logp_max": 2e-6, "val/mean": 1}
    series = read_run(run([then, now])).series
    assert set(series) == set(now) - {"step"}
    for tag, curve in series.items():
        assert curve.steps.tolist() == [1, 2] and curve.values[1] == now[tag], tag
    assert series["lr/actor"].values.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("end", ['{"step": 30, "train/l', '{"step": 30, "train/l\n', "\n\n", '{"step": 30'])
def test_a_torn_last_line_is_left_out(run, end):
    assert read_run(run([*LINES, end])).last_step == 20


def test_nan_and_infinity_are_undefined_points(run):
    record = read_run(run([*LINES, '{"step": 30, "train/loss": NaN, "train/epoch": 0.3}\n']))
    assert record["train/loss"].steps.tolist() == [10] and record.series["train/loss"].steps.tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "metrics.jsonl: holds no figures yet"),
        (['{"step": 1, "tr'], "metrics.jsonl: holds no figures yet"),
        (["what\n", *LINES], "metrics.jsonl:1: is not JSON"),
        (["[1]\n", *LINES], "metrics.jsonl:1: is no JSON object"),
        ([LINES[0], {"train/loss": 1.0}], "metrics.jsonl:2: has no whole number as step"),
        ([LINES[0], {"step": 2, "train/loss": "low"}], "metrics.jsonl:2: train/loss is no number"),
    ],
)
def test_broken_metrics_are_one_line(run, lines, message):
    with pytest.raises(UserError, match=message):
        read_run(run(lines))


def test_missing_and_broken_files_are_one_line(run, tmp_path):
    folder = run()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: is missing"):
        read_run(folder)
    for text, message in (("{", "cannot be read"), ("[]", "no JSON object"), ('{"stage": "dpo"}', "names no stage")):
        (folder / "hyperparams.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_run(folder)
    with pytest.raises(UserError, match="hyperparams.json: is missing"):
        read_run(tmp_path)
    (folder / "hyperparams.json").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="cannot be read"):
        read_run(folder)


def test_the_reward_models_run_is_found_where_it_was_or_beside(run, tmp_path):
    rm = run([{"step": 0, "eval/accuracy": 0.5}], name="rm_y_20260101000000", stage="rm")
    ppo = run([{"step": 1, "objective/kl": 0.0}], name="ppo_x_20260101000000", stage="ppo", iterations=2)
    assert read_run(ppo).reward is None
    for recorded in (rm / "final", rm, "/elsewhere/rm_y_20260101000000/best", rm / "checkpoints/step_00000001"):
        hyperparams = json.loads((ppo / "hyperparams.json").read_text()) | {"rm": str(recorded)}
        (ppo / "hyperparams.json").write_text(json.dumps(hyperparams))
        assert read_run(ppo).reward.folder.name == rm.name
    (rm / "metrics.jsonl").write_text("")
    assert read_run(ppo).reward is None


def test_what_run_may_mean(run, tmp_path, monkeypatch):
    old, new = run(), run(name="sft_x_20260102000000")
    (new / "final").mkdir()
    assert find_run(str(old), "runs") == old
    assert find_run("sft_x", str(tmp_path)) == new  # the newest of that stem
    assert find_run(old.name, str(tmp_path)) == old
    assert find_run(str(new / "final"), "runs") == new
    monkeypatch.chdir(tmp_path)
    assert find_run(old.name, "runs").resolve() == old
    with pytest.raises(UserError, match=r"RUN sft_z: no such run or folder; runs in .*: sft_x; "):
        find_run("sft_z", str(tmp_path))
