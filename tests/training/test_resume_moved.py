"""Runs that were moved go on with the models that they were started from, or one line says what is missing."""

import json
import shutil
from pathlib import Path

import pytest
from killing import copy_of_runs, edit_record, rewrite
from scripts import call, command, newest

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig
from config.user_error import UserError
from experiments.doctor.record import read_run
from experiments.overoptimisation.run import PPORun
from inference.systems import System, find_reward_model
from training.storage.resuming import Resumption, find_resumption
from utils.runs import folder as run_folder

pytestmark = pytest.mark.slow

STAGES = {"rm": RMConfig, "ppo": PPOConfig}
FLAGS = {"rm": {"sft": ("-p", "pretrain")}, "ppo": {"sft": ("-a", "actor"), "rm": ("-c", "critic")}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """SFT, reward model and PPO of one name, each finished, in a folder that was renamed after."""
    old = tmp_path_factory.mktemp("runs") / "old"
    for stage, words in (("sft", ""), ("rm", "-p sft_base"), ("ppo", "-a sft_base -c rm_base")):
        result = call(stage, f"-n base {words} --save-every 1 --keep 9", old)
        assert result.code == 0, result.err
    return old.rename(old.with_name("kept"))


@pytest.fixture
def moved(kept, tmp_path) -> Path:
    """A copy of these runs, as if the reward model's and PPO's had been stopped before their ends."""
    new = copy_of_runs(kept, tmp_path / "new")
    for stage in STAGES:
        shutil.rmtree(newest(new, f"{stage}_base") / "best")
    shutil.rmtree(newest(new, "ppo_base") / "final")
    return new


def edit(run: Path, change) -> None:
    edit_record(run / "hyperparams.json", change)


def resumption(stage: str, runs: str | Path, words: str = "", resume: str = "auto") -> Resumption:
    """What a script would go on with: `words` are flags beside the run's own."""
    given = "-p sft_base" if stage == "rm" else "-a sft_base -c rm_base"
    words = f"-n base {given} --save-every 1 --keep 9 --resume {resume} {words}"
    return find_resumption(stage, parse_cli(STAGES[stage], command(stage, words, Path(runs))[1:]))


def test_runs_moved_as_a_whole_end_as_they_would_have(kept, moved) -> None:
    """The scripts themselves, with nothing given but the new --runs-dir."""
    run = newest(moved, "ppo_base")
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    words = "-n base -a sft_base -c rm_base --save-every 1 --keep 9 --resume auto"
    result = call("ppo", words, moved)
    assert result.code == 0, result.err
    for model in ("sft", "rm"):
        there = newest(moved, f"{model}_base") / "final"
        then = kept.with_name("old") / there.parent.name / "final"
        assert f"{then} is now {there}, with the same weights" in result.out
    for file in ("model.safetensors", "critic/model.safetensors"):
        assert (run / "final" / file).read_bytes() == (newest(kept, "ppo_base") / "final" / file).read_bytes()
    run = newest(moved, "rm_base")
    shutil.rmtree(run / "final")
    result = call("rm", "-n base -p sft_base --save-every 1 --keep 9 --resume auto", moved)
    assert result.code == 0, result.err
    before = newest(kept, "rm_base") / "final" / "model.safetensors"
    assert (run / "final" / "model.safetensors").read_bytes() == before.read_bytes()


WITHIN = ("final", "best", "checkpoints/step_00000002")
FORMS = [("{stem}", "final"), ("{old}/{run}", "final")]
FORMS += [(f"{start}/{{run}}/{inside}", inside) for start in ("old", "{old}") for inside in WITHIN]


@pytest.mark.parametrize(("form", "inside"), FORMS)
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_whatever_the_flags_were(kept, stage: str, form: str, inside: str, tmp_path) -> None:
    """The run was started with -a, -c, -p as a stem, a relative or an absolute path, of a checkpoint inside a run; the
    same words, which lead nowhere now, go on with it, and so do the paths of now."""
    moved, old = copy_of_runs(kept, tmp_path / "new"), kept.with_name("old")
    run = newest(moved, f"{stage}_base")
    then, now, expected = [], [], {}
    for model, (flag, field) in FLAGS[stage].items():
        name = newest(kept, f"{model}_base").name
        given = form.format(stem=f"{model}_base", old=old, run=name)
        shutil.rmtree(run / "final", ignore_errors=True)
        expected[model] = moved / name / inside

        def started(record, given=given, field=field, model=model, name=name) -> None:
            record["config"][field] = given
            record[model] = str(old / name / inside)
            manifest = json.loads((kept / name / inside / "manifest.json").read_text())
            record["weights"][model] = manifest["files"]["model.safetensors"]["sha256"]

        edit(run, started)
        then.append(f"{flag} {given}")
        now.append(f"{flag} {given.replace(str(old), str(moved))}")
    for words in (then, now):
        assert resumption(stage, moved, " ".join(words)).origins == expected
    elsewhere = copy_of_runs(run, tmp_path / "alone")
    shutil.rmtree(run)
    assert resumption(stage, moved, " ".join(then), resume=str(elsewhere)).origins == expected  # by --runs-dir


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_the_whole_repo_was_moved(moved, stage: str, tmp_path, monkeypatch) -> None:
    """With the default --runs-dir, from any working folder."""
    (tmp_path / "repo").mkdir()
    runs = moved.rename(tmp_path / "repo" / "runs")
    shutil.rmtree(newest(runs, "rm_base") / "checkpoints" / "step_00000003")
    monkeypatch.setattr(run_folder, "REPO", tmp_path / "repo")
    monkeypatch.chdir(tmp_path)
    words = "--resume-override max_steps --max-steps 9"
    assert resumption(stage, "runs", words).origins["sft"] == newest(runs, "sft_base") / "final"


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_a_newer_run_of_the_same_name_is_not_the_one(moved, stage: str) -> None:
    words = "--resume-override max_steps --max-steps 9"
    for model in FLAGS[stage]:
        run = newest(moved, f"{model}_base")
        newer = copy_of_runs(run, run.with_name(f"{model}_base_29990101000000"))
        rewrite(newer / "final/model.safetensors", (run / "checkpoints/step_00000001/model.safetensors").read_bytes())
    assert all("2999" not in str(folder) for folder in resumption("ppo", moved, words).origins.values())
    if stage == "rm":
        first = min(moved.glob("rm_base_*"))
        assert "2999" not in str(resumption(stage, moved, words, str(first)).origins["sft"])


@pytest.mark.parametrize("model", ["sft", "rm"])
def test_a_model_that_is_gone_or_another_now_is_named(kept, moved, model: str) -> None:
    run, source = newest(moved, "ppo_base"), newest(moved, f"{model}_base") / "final"
    recorded = kept.with_name("old") / source.parent.name / "final"
    words = "-n base -a sft_base -c rm_base --save-every 1 --keep 9 --resume auto"
    edit(run, lambda record: record["weights"].update({model: "0" * 64}))
    error = call("ppo", words, moved).error
    assert f"--resume {run}: was started from the " in error and f"{source} has other weights now" in error
    shutil.rmtree(source.parent)
    error = call("ppo", words, moved).error
    assert f"{recorded}, which is neither there nor beside the run" in error and "put that run back" in error


def test_runs_of_older_code_go_on_by_name_and_say_so(moved, capsys) -> None:
    """They have recorded no digest: name and tokenizer are all that can be compared."""
    run = newest(moved, "ppo_base")
    edit(run, lambda record: record.pop("weights"))
    found = resumption("ppo", moved)
    assert found.origins["rm"] == newest(moved, "rm_base") / "final"
    shown = capsys.readouterr().out
    assert f"{run} has recorded no digest of its sft weights; {found.origins['sft']} is taken by name and tok" in shown
    other = {"tokenizer": {"sha256": "another"}, "sealed": False}
    edit_record(found.origins["sft"] / "model.json", lambda description: description.update(other))
    (found.origins["sft"] / "manifest.json").unlink()
    with pytest.raises(UserError, match="has another tokenizer; put the right one back"):
        resumption("ppo", moved)


@pytest.mark.parametrize("beside", [True, False])
def test_what_reads_recorded_paths_survives_a_move(moved, beside: bool, tmp_path) -> None:
    """`-t doctor`, `-t overoptimisation` and evaluate.py: by the run's neighbours, or by --runs-dir."""
    run, runs_dir = newest(moved, "ppo_base"), "nowhere"
    if not beside:
        run, runs_dir = Path(shutil.move(run, tmp_path / run.name)), str(moved)
    rm, sft = newest(moved, "rm_base"), newest(moved, "sft_base")
    assert read_run(run, runs_dir).reward.folder == rm
    found = PPORun.read(run, runs_dir)
    assert (found.sft, found.rm) == (sft / "final", rm / "final")
    policy = System("ppo", "checkpoint", str(run / "checkpoints" / "step_00000002"), "-p ppo_base")
    assert find_reward_model("", policy, runs_dir)[0] == rm / "final"
    edit(run, lambda record: record["weights"].update(rm="0" * 64))
    folder, line = find_reward_model("", policy, runs_dir)
    assert folder is None and "has other weights now" in line
    with pytest.raises(UserError, match="has other weights now"):
        PPORun.read(run, runs_dir)


def test_data_that_were_moved_are_known_by_their_rows(kept, tmp_path, capsys) -> None:
    """A file of another folder is no other setting; its rows are compared. One of another name is."""
    moved = copy_of_runs(kept, tmp_path / "new")
    run = newest(moved, "rm_base")
    shutil.rmtree(run / "final")
    edit(run, lambda record: record["config"].update(dataset="/old/rows.jsonl"))
    assert resumption("rm", moved, "--dataset /new/rows.jsonl").overridden == {}
    with pytest.raises(UserError, match="dataset: '/old/rows.jsonl' -> '/new/other.jsonl'"):
        resumption("rm", moved, "--dataset /new/other.jsonl")
