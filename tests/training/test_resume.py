"""Stopping and going on: a run that was interrupted ends with the bits and the log of one that was not."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from killing import interrupt_at
from scripts import call, newest, process, run
from setups import read_metrics

from training import trainers
from training.storage.saving import load_state
from utils.runs.finding import step_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert call("sft", "-n base", folder).code == 0
    assert call("rm", "-n base -p sft_base", folder).code == 0
    return folder


STEPS = {"sft": 7, "rm": 6, "ppo": 4}
ARGUMENTS = {
    "sft": "--config gpt2-nano/dropout --max-steps 7 --warmup-steps 2",
    "rm": "-p sft_base --max-steps 6 --warmup-steps 2",
    "ppo": "-a sft_base -c rm_base --max-steps 4 --kl-target 0.1 --kl-horizon 20 --lr 1e-3",
}


def assert_same_run(one, other, steps: int) -> None:
    """Equal bits in all weights, and equal lines in the logs but for the clock."""
    files = sorted(p.relative_to(one / "final") for p in (one / "final").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (one / "final" / file).read_bytes() == (other / "final" / file).read_bytes(), file
    lines = [
        [{k: v for k, v in x.items() if not k.startswith("time")} for x in read_metrics(run)] for run in (one, other)
    ]
    assert lines[0] == lines[1]
    assert [x["step"] for x in lines[0] if "train/loss" in x or "objective/kl" in x] == list(range(1, steps + 1))
    texts = [(run / "samples.jsonl").read_text() if (run / "samples.jsonl").exists() else "" for run in (one, other)]
    assert texts[0] == texts[1]
    clock = [x["time"] for x in read_metrics(other)]
    assert clock == sorted(clock)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(runs, stage: str, monkeypatch) -> None:
    steps = STEPS[stage]
    assert call(stage, f"-n whole {ARGUMENTS[stage]}", runs).code == 0
    with monkeypatch.context() as patch:
        interrupt_at(stage, 3, patch)
        stopped = call(stage, f"-n broken {ARGUMENTS[stage]}", runs)
    broken = newest(runs, f"{stage}_broken")
    assert stopped.code == 130 and "stopping after this step" in stopped.err
    assert f"stopped at step 3; saved. Go on with --resume {broken}" in stopped.out
    assert step_checkpoints(broken)[-1].name == "step_00000003" and not (broken / "final").exists()
    # What a killed process may leave behind: figures of a step that was not saved, and half a line.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": 9.9}\n{"step": 5, "tra')
    resumed = call(stage, f"-n broken {ARGUMENTS[stage]} --resume auto", runs)
    assert resumed.code == 0, resumed.err
    assert f"going on with {broken / 'checkpoints' / 'step_00000003'}" in resumed.out
    assert_same_run(newest(runs, f"{stage}_whole"), broken, steps)
    assert len([p for p in runs.iterdir() if p.name.startswith(f"{stage}_broken")]) == 1


def test_ctrl_c_on_a_real_process_and_resume_in_another(runs) -> None:
    arguments = "-n ctrl --config gpt2-nano/dropout --max-steps 30 --save-every 1000 --eval-every 1000 -b 8"
    child = process("sft", arguments, runs)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:  # wait until it trains
            found = [p for p in runs.glob("sft_ctrl_*/metrics.jsonl") if "train/loss" in p.read_text()]
            if found or child.poll() is not None:
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    broken = newest(runs, "sft_ctrl")
    assert child.returncode == 130, (out, err)
    (checkpoint,) = step_checkpoints(broken)
    step = load_state(checkpoint)["step"]
    assert 0 < step < 30 and f"stopped at step {step}" in out
    arguments = f"{arguments} --resume {broken}"
    result = run("sft", arguments, runs)
    assert result.code == 0, result.err
    assert call("sft", arguments.replace("-n ctrl", "-n unbroken").split(" --resume")[0], runs).code == 0
    assert_same_run(newest(runs, "sft_unbroken"), broken, 30)


def test_a_second_ctrl_c_stops_at_once(runs, monkeypatch) -> None:
    def impatient(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(trainers.SFTTrainer, "train_step", impatient)
    stopped = call("sft", "-n impatient", runs)
    assert stopped.code == 130 and stopped.err.endswith("interrupted\n")
    assert not step_checkpoints(newest(runs, "sft_impatient"))


def test_a_termination_request_ends_a_run_in_order(runs, monkeypatch) -> None:
    interrupt_at("sft", 2, monkeypatch, signal.SIGTERM)
    stopped = call("sft", "-n preempted", runs)
    assert stopped.code == 143 and "stopped at step 2; saved" in stopped.out


def test_a_signal_in_the_last_step_changes_nothing(runs, monkeypatch) -> None:
    interrupt_at("sft", 3, monkeypatch)
    result = call("sft", "-n last", runs)
    assert result.code == 0 and (newest(runs, "sft_last") / "final").is_dir()


def test_a_resume_after_the_last_checkpoint_only_finishes(runs) -> None:
    """Killed between the last step checkpoint and final/: nothing is trained twice, and nothing is missing."""
    assert call("rm", "-n killed -p sft_base --max-steps 2", runs).code == 0
    folder = newest(runs, "rm_killed")
    before = json.loads((folder / "final" / "model.json").read_text())
    weights = (folder / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "final")
    assert call("rm", "-n killed -p sft_base --max-steps 2 --resume auto", runs).code == 0
    assert json.loads((folder / "final" / "model.json").read_text()) == before
    assert (folder / "final" / "model.safetensors").read_bytes() == weights


# ---------------------------------------------------------------------------------------------------------------------
# What --resume means
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_starts_anew_when_there_is_nothing_to_go_on_with(runs) -> None:
    result = call("sft", "-n fresh --resume auto --max-steps 1 --save-every 100", runs)
    assert result.code == 0 and "--resume auto: no run sft_fresh yet; starting one" in result.out
    shutil.rmtree(newest(runs, "sft_fresh") / "final")  # nothing saved
    again = call("sft", "-n fresh --resume auto --max-steps 1", runs)
    assert again.code == 0 and "was stopped before its first checkpoint; starting a new run" in again.out
    assert len([p for p in runs.iterdir() if p.name.startswith("sft_fresh")]) == 2


def test_settings_must_be_the_runs_own_unless_they_change_nothing(runs, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at("sft", 2, patch)
        assert call("sft", "-n set", runs).code == 130
    folder = newest(runs, "sft_set")
    error = call("sft", "-n set --resume auto --lr 0.5 --max-steps 9", runs).error
    assert "settings differ from the run's (" in error and "lr: 0.003 -> 0.5" in error and "max_steps: 3 -> 9" in error
    error = call("rm", f"-n set -p sft_base --resume {folder}", runs).error
    assert "is a run of stage sft, not rm" in error
    checkpoint = folder / "checkpoints" / "step_00000002"
    (folder / "checkpoints" / "step_00000002.writing").mkdir()  # a torn one beside it is passed over
    assert call("sft", f"-n set --resume {checkpoint} -b 4 --keep 3 --save-every 7", runs).code == 0
    error = call("sft", f"-n set --resume {folder / 'best'}", runs).error
    assert "no trainer_state.pt in it; give a folder under checkpoints/" in error


def stop_at(stage: str, step: int, arguments: str, runs, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(stage, step, patch)
        assert call(stage, arguments, runs).code == 130


def torn(checkpoint) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))


def test_a_torn_checkpoint_is_named_and_passed_over(runs, monkeypatch) -> None:
    assert call("sft", f"-n unharmed {ARGUMENTS['sft']}", runs).code == 0
    arguments = f"-n harmed {ARGUMENTS['sft']}"
    stop_at("sft", 5, arguments, runs, monkeypatch)
    run_folder = newest(runs, "sft_harmed")
    older, newer = step_checkpoints(run_folder)
    torn(newer)
    error = call("sft", f"{arguments} --resume {newer}", runs).error
    assert "model.safetensors is not what was saved" in error and "give an earlier checkpoint" in error
    resumed = call("sft", f"{arguments} --resume auto", runs)
    assert resumed.code == 0, resumed.err
    assert f"passed over: {newer} model.safetensors is not what was saved" in resumed.err
    assert f"going on with {older}" in resumed.out
    assert_same_run(newest(runs, "sft_unharmed"), run_folder, STEPS["sft"])
    assert newer.exists()  # and nobody deleted it


def test_a_run_without_a_whole_checkpoint_is_not_started_again_unasked(runs, monkeypatch) -> None:
    stop_at("sft", 1, "-n lost", runs, monkeypatch)
    (checkpoint,) = step_checkpoints(newest(runs, "sft_lost"))
    (checkpoint / "manifest.json").unlink()
    error = call("sft", "-n lost --resume auto", runs).error
    assert f"has no whole checkpoint to go on from ({checkpoint} has no manifest.json" in error


def test_what_may_change_and_what_may_not(runs, monkeypatch) -> None:
    stop_at("sft", 2, "-n longer", runs, monkeypatch)
    folder = newest(runs, "sft_longer")
    before = (folder / "hyperparams.json").read_bytes()
    longer = "-n longer --resume auto --max-steps 5 --lr 0.001 --seed 3"
    error = call("sft", longer, runs).error
    for difference in ("max_steps: 3 -> 5", "lr: 0.003 -> 0.001", "seed: 0 -> 3"):
        assert difference in error
    error = call("sft", f"{longer} --resume-override max_steps,lr", runs).error
    assert "seed: 0 -> 3" in error and "max_steps: 3" not in error
    error = call("sft", f"{longer} --resume-override seed,max-steps", runs).error
    assert "--resume-override seed: may not change; these may: max_steps" in error
    error = call("sft", "-n longer --resume-override lr", runs).error
    assert "needs --resume" in error
    assert (folder / "hyperparams.json").read_bytes() == before
    arguments = "-n longer --resume auto --max-steps 5 --lr 0.001"
    result = call("sft", f"{arguments} --resume-override max-steps,lr", runs)
    assert result.code == 0 and "; lr: 0.003 -> 0.001; max_steps: 3 -> 5\n" in result.out
    rates = {x["step"]: x["train/lr"] for x in read_metrics(folder) if "train/lr" in x}
    assert sorted(rates) == [1, 2, 3, 4, 5] and rates[3] <= 0.001  # the new peak holds
    record = json.loads((folder / "hyperparams.json").read_text())
    assert record["config"]["max_steps"] == 5  # what goes on from here repeats the new flags
    assert record["overridden"] == [{"step": 2, "settings": {"lr": [0.003, 0.001], "max_steps": [3, 5]}}]


def test_an_earlier_checkpoint_makes_the_later_ones_give_way(runs) -> None:
    assert call("sft", f"-n back {ARGUMENTS['sft']}", runs).code == 0
    folder = newest(runs, "sft_back")
    first, second = step_checkpoints(folder)
    result = call("sft", f"-n back {ARGUMENTS['sft']} --resume {first}", runs)
    assert result.code == 0, result.err
    for name in (second.name, "final"):
        assert f"{name} is ahead of step {int(first.name[5:])} and is kept as {name}.superseded1" in result.out
    assert_same_run(newest(runs, "sft_unharmed"), folder, STEPS["sft"])


def test_a_finished_run_can_be_made_longer(runs) -> None:
    arguments = "-n more --save-every 1"
    assert call("sft", f"{arguments} --max-steps 2", runs).code == 0
    folder = newest(runs, "sft_more")
    longer = f"{arguments} --max-steps 4"
    result = call("sft", f"{longer} --resume {folder}/final --resume-override max_steps", runs)
    assert result.code == 0 and json.loads((folder / "final" / "model.json").read_text())["step"] == 4
    assert [x["step"] for x in read_metrics(folder) if "train/loss" in x] == [1, 2, 3, 4]


def test_deterministic_runs_repeat_and_keep_to_their_machine(runs, monkeypatch) -> None:
    for name in ("one", "two"):
        result = call("ppo", f"-n {name} -a sft_base -c rm_base --deterministic", runs)
        assert result.code == 0, result.err
        assert "deterministic: the same bits with " in result.out and "costs" in result.out
        assert torch.are_deterministic_algorithms_enabled()
    assert_same_run(newest(runs, "ppo_one"), newest(runs, "ppo_two"), 2)
    stop_at("sft", 2, "-n fixed --deterministic", runs, monkeypatch)
    record = newest(runs, "sft_fixed") / "hyperparams.json"
    record.write_text(re.sub(r"\(\d+ threads\)", "(64 threads)", record.read_text()))
    error = call("sft", "-n fixed --deterministic --resume auto", runs).error
    assert "--deterministic: the run was started elsewhere (runs_on: cpu (64 threads)" in error
    result = call("sft", "-n fixed --no-deterministic --resume auto --resume-override deterministic", runs)
    assert result.code == 0 and "note: not as when the run was started (runs_on" in result.out
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_data_must_be_the_runs_own(runs, tmp_path, monkeypatch) -> None:
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"prompt": f"Question {i}?", "response": f"Answer {i}."}) for i in range(40)]
    data.write_text("\n".join(rows))
    with monkeypatch.context() as patch:
        interrupt_at("sft", 2, patch)
        assert call("sft", f"-n data --dataset {data}", runs).code == 130
    data.write_text("\n".join(rows[1:]))
    error = call("sft", f"-n data --dataset {data} --resume auto", runs).error
    assert f"--dataset {data} gives other rows than when it was started" in error
    data.write_text("\n".join(rows))
    assert call("sft", f"-n data --dataset {data} --resume auto", runs).code == 0


def test_a_run_without_a_checkpoint_cannot_be_resumed(runs) -> None:
    assert call("sft", "-n unsaved --save-every 100 --max-steps 1", runs).code == 0
    again = call("sft", f"-n unsaved --resume {newest(runs, 'sft_unsaved')} --save-every 100 --max-steps 1", runs)
    assert again.code == 0 and "has all of its 1 steps" in again.out
    (newest(runs, "sft_unsaved") / "final").rename(newest(runs, "sft_unsaved") / "kept")
    error = call("sft", f"-n unsaved --resume {newest(runs, 'sft_unsaved')} --max-steps 1", runs).error
    assert "has nothing under checkpoints/" in error
    (newest(runs, "sft_unsaved") / "kept").rename(newest(runs, "sft_unsaved") / "final")
    error = call("sft", f"-n unsaved --resume {runs}", runs).error
    assert "no run folder or checkpoint inside one" in error
    (newest(runs, "sft_unsaved") / "hyperparams.json").write_text("{torn")
    error = call("sft", f"-n unsaved --resume {newest(runs, 'sft_unsaved') / 'final'}", runs).error
    assert "hyperparams.json" in error and "is no record of a run" in error
