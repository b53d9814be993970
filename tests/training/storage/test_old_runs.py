"""Runs that commit 61f479c wrote, before folders had rooms: their models load, and all stages go on with them.

runs_of_61f479c.tar.gz holds runs of a model of 4 channels that stand at step 2 of 4, with the figures of all four.
`train_sft.py -n old -p sft_start --dataset answers.jsonl ...` made the first, then came rm and ppo on pairs.jsonl; all
flags stand in each hyperparams.json.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import call, call_bare, newest
from setups import read_metrics

from experiments.doctor.record import read_series
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from training.storage import resuming
from utils.runs.metrics_log import current_tag

ARCHIVE = Path(__file__).with_name("runs_of_61f479c.tar.gz")
STAGES = {
    "sft": "-n old -p sft_start --dataset {data}/answers.jsonl --log-every 1 --sample-tokens 4",
    "rm": "-n old -p sft_old --dataset {data}/pairs.jsonl --log-every 1 --normalise-prompts 8 --response-length 4",
    # The presets' 50 iterations were fewer later, and a schedule is a run's own.
    "ppo": "-n old -a sft_old -c rm_old --dataset {data}/pairs.jsonl --ppo-epochs 2 --response-length 4 "
    "--iterations 50",
}
SCHEDULE = "--max-steps 4 --save-every 2 --eval-every 2 --eval-examples 4 -b 2 --global-batch-size 4 --keep 2"


def figures(run):
    """The lines of metrics.jsonl under today's names."""
    return [{current_tag(key): value for key, value in row.items()} for row in read_metrics(run)]


@pytest.fixture
def old(tmp_path):
    """A copy of the runs, at another place than where they were written."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_checkpoints_load(old):
    ids = torch.arange(6)[None]
    sft = GPT.from_checkpoint(newest(old / "runs", "sft_old") / "final")
    assert sft(ids).shape == (1, 6, 1024)
    rm = GPTRewardModel.from_checkpoint(newest(old / "runs", "rm_old") / "final")
    record = json.loads((newest(old / "runs", "rm_old") / "final" / "model.json").read_text())
    assert rm(ids, torch.ones_like(ids).bool()).shape == (1,) and record["normalised"]["step"] == 4
    assert rm.normalisation[0] != 1
    ppo = newest(old / "runs", "ppo_old") / "checkpoints" / "step_00000002"
    assert GPTActor.from_checkpoint(ppo)(ids).shape == (1, 6, 1024)
    assert GPTCritic.from_checkpoint(ppo / "critic")(ids, torch.ones_like(ids).bool()).shape == (1, 6)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_goes_on_to_the_end(old, stage):
    """PPO comes to the figures of the run that was not stopped; the order of SFT's and RM's rows is another now."""
    run = newest(old / "runs", f"{stage}_old")
    before = figures(run)
    shutil.rmtree(run / "final", ignore_errors=True)
    flags = f"{STAGES[stage].format(data=old)} {SCHEDULE} --resume auto"
    result = call(stage, flags, old / "runs")
    assert result.code == 0, result.err
    assert "step_00000002" in result.out
    after = figures(run)
    assert [row["step"] for row in after] == [row["step"] for row in before]
    curves = read_series(run / "metrics.jsonl")  # one of each figure, under whichever name a line has it
    for tag in {tag for row in before for tag in row} - {"step", "time"}:
        assert curves[tag].steps.tolist() == [row["step"] for row in before if tag in row], tag
    assert "note: the run was started before" in result.out
    for then, now in zip(before, after, strict=True):
        for key in then.keys() - {"time"}:
            if then["step"] <= 2 or key in ("train/lr", "train/epoch"):
                assert now[key] == then[key], (then["step"], key)
            elif stage == "ppo" and not key.startswith(("time/", "phase/")) and then[key] is not None:
                assert now[key] == pytest.approx(then[key], rel=1e-3, abs=1e-4), (then["step"], key)
    loss = "eval/score" if stage == "ppo" else "eval/loss" if stage == "sft" else "eval/nll"
    last_of = [[row[loss] for row in rows if loss in row][-1] for rows in (before, after)]
    assert last_of[1] == pytest.approx(last_of[0], rel=0.02)
    assert (run / "final" / "manifest.json").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_goes_on_alone(old, stage, monkeypatch):
    """Their data are at another place now; all else they know, what the presets are today aside."""
    run = newest(old / "runs", f"{stage}_old")
    shutil.rmtree(run / "final", ignore_errors=True)
    words = ["--resume", f"{stage}_old", "--runs-dir", str(old / "runs")]
    data = "answers.jsonl" if stage == "sft" else "pairs.jsonl"
    error = call_bare(stage, *words).error
    assert "add what cannot be taken from the run: --dataset PATH (" in error and f"{data} is not there)" in error
    result = call_bare(stage, *words, "--dataset", str(old / data))
    assert result.code == 0 and "step_00000002" in result.out, result.err
    assert json.loads((run / "final" / "model.json").read_text())["step"] == 4


def test_a_reward_that_moved_with_the_repository_is_no_other_reward():
    then = {"eval_reward_fn": "/home/user/rlhf/src/utils/demo_gold.py:gold_reward"}
    assert resuming._differences(then, {"eval_reward_fn": "src/utils/demo/gold.py:gold_reward"}) == {}
    assert resuming._differences(then, then) == {}
    assert resuming._differences(then, {"eval_reward_fn": "src/utils/demo/gold.py:gold_scores"}) != {}


def test_other_rows_are_still_refused(old):
    pairs = (old / "pairs.jsonl").read_text().splitlines()
    (old / "pairs.jsonl").write_text("\n".join(pairs[1:]) + "\n")
    result = call("ppo", f"{STAGES['ppo'].format(data=old)} {SCHEDULE} --resume auto", old / "runs")
    assert "gives other rows than when it was started" in result.error
