"""--resume alone does: a run knows its flags. What is given beside it must agree with them, or be allowed to differ."""

import json
import shutil
from pathlib import Path

import pytest
from killing import assert_same_run, copy_of_runs, edit_record, interrupt_at
from scripts import call, call_bare, newest, save_start

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig, resolved, stage_defaults
from config.user_error import UserError
from training.storage.recorded import recorded_settings
from training.storage.resuming import Resumption, find_resumption
from utils.runs.finding import step_checkpoints

pytestmark = pytest.mark.slow

STAGES = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}
# None of these is a default, and the last checkpoint is ahead of the one to go on from.
SETTINGS = "--seed 3 --lr 1e-3 --adam-eps 1e-6 --save-every 1 --keep 9 --eval-examples 4"
OF_STAGE = {
    "sft": "-p sft_start --max-steps 3 --warmup-steps 1 --beta2 0.9",
    "rm": "-p sft_start --max-steps 3 --warmup-steps 1 --temperature 0.9",
    "ppo": "-a sft_start -c rm_whole_s0 --iterations 3 --max-steps 0 --kl-target 0.1 --gamma 0.99 "
    "--eval-reward-fn src/utils/demo/gold.py:gold_reward",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """STAGE_whole_s0, and STAGE_stopped_s0: the same, stopped in its second step."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    save_start(runs)
    for stage, words in OF_STAGE.items():
        assert call(stage, f"-n whole_s0 {words} {SETTINGS}", runs).code == 0
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(stage, 2, patch)
            assert call(stage, f"-n stopped_s0 {words} {SETTINGS}", runs).code == 130
    return runs


@pytest.fixture
def runs(made, tmp_path, monkeypatch) -> Path:
    """A copy of these, looked at from another folder than they were started in."""
    monkeypatch.chdir(tmp_path)
    return copy_of_runs(made, tmp_path / "runs")


def ways(stage: str, run: Path) -> dict[str, list[str]]:
    """Every way to say which run goes on."""
    return {
        "path": ["--resume", str(run)],
        "relative path": ["--resume", f"runs/{run.name}"],
        "checkpoint": ["--resume", f"{run}/checkpoints/step_00000002"],
        "folder's name": ["--resume", run.name],
        "name": ["--resume", f"{stage}_stopped_s0"],
        "beginning of the name": [f"--resume={stage}_stopped"],
        "auto": ["--resume", "auto", "-n", "stopped_s0"],
        "auto, -nNAME": ["-nstopped_s0", "--resume=auto"],
    }


WAYS = list(ways("sft", Path("run")))


def found(stage: str, runs: Path, *words: str) -> Resumption | None:
    """What a script would go on with."""
    return find_resumption(stage, parse(stage, runs, *words))


def parse(stage: str, runs: Path, *words: str):
    return parse_cli(STAGES[stage], [*words, "--runs-dir", str(runs)], recorded_settings)


@pytest.mark.parametrize("way", ["path", "beginning of the name", "auto"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_ends_as_it_would_have(runs, stage: str, way: str) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    result = call_bare(stage, *ways(stage, run)[way], "--runs-dir", str(runs))
    assert result.code == 0, result.err
    assert f"going on with {run / 'checkpoints' / 'step_00000002'}\n" in result.out
    assert (f"--resume {stage}_stopped: taking {run.name}\n" in result.err) == (way == "beginning of the name")
    assert_same_run(newest(runs, f"{stage}_whole_s0"), run)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_way_finds_the_run_and_its_settings(runs, stage: str, way: str) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    config = parse(stage, runs, *ways(stage, run)[way])
    then = json.loads((run / "hyperparams.json").read_text())["config"]
    now = resolved(config) | {field: then[field] for field in ("resume", "runs_dir")}
    if stage == "ppo":
        assert now["eval_reward_fn"].endswith("/src/utils/demo/gold.py:gold_reward")  # from wherever it is started
        now["eval_reward_fn"] = then["eval_reward_fn"]
    assert now == then != resolved(stage_defaults(STAGES[stage], then["config"]))
    resumption = find_resumption(stage, config)
    assert resumption.checkpoint.resolve() == run / "checkpoints" / "step_00000002" and resumption.overridden == {}


# Words beside --resume, and what the one line has to say; "": they are fine. {}: what gives way.
BESIDE = [
    ("--lr 0.001 --seed=3 -n stopped_s0 --config gpt2-nano --save-every 1", ""),
    ("-b 1 --keep 3 --save-every 7 --device cpu --activation-checkpointing --on-save-error continue", ""),
    ("--tokens-per-micro-batch 64", ""),
    ("--lr 0.5", "lr: 0.001 -> 0.5"),
    ("--seed 4 --lr 0.5", "lr: 0.001 -> 0.5; seed: 3 -> 4"),
    ("--config gpt2-nano/lora", "config: 'gpt2-nano' -> 'gpt2-nano/lora'"),
    ("--config gpt5", "--config gpt5: no such preset"),
    ("--lr 0.5 --resume-override lr", {"lr": [0.001, 0.5]}),
    ("--resume-override lr,max_steps", {}),
    ("--lr 0.5 --seed 4 --resume-override lr", "seed: 3 -> 4"),
    ("--resume-override seed --seed 4", "--resume-override seed: may not change"),
    ("--eval-every 9 --resume-override eval-every", {"eval_every": None}),
    ("--dataset other.jsonl", "dataset: 'demo' -> 'other.jsonl'"),
    ("--lr", "--lr"),
    ("--lrr 1", "did you mean --lr?"),
]


@pytest.mark.parametrize(("words", "expected"), BESIDE, ids=[words for words, _ in BESIDE])
@pytest.mark.parametrize("way", ["path", "name", "auto"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_given_beside_must_agree(runs, stage: str, way: str, words: str, expected) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    words = [*ways(stage, run)[way], *words.split()]
    if expected and isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            found(stage, runs, *words)
        assert expected in str(caught.value)
        return
    overridden = found(stage, runs, *words).overridden
    assert list(overridden) == list(expected or {})
    assert all(overridden[field] == pair for field, pair in (expected or {}).items() if pair is not None)


@pytest.mark.parametrize("stage", STAGES)
def test_another_name_is_another_run(runs, stage: str) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    with pytest.raises(UserError, match="name: 'stopped_s0' -> 'other'"):
        found(stage, runs, "--resume", str(run), "-n", "other")
    assert found(stage, runs, "--resume", "auto", "-n", "stopped") is None  # auto takes names as they are
    other = "rm" if stage == "ppo" else "ppo"
    with pytest.raises(UserError, match=f"is a run of stage {stage}, not {other}; use its own script"):
        found(other, runs, "--resume", str(run), "--lr", "0.5")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_from_anywhere(runs, stage: str, tmp_path) -> None:
    """Moved to where nothing else of it is: what it was started from is found by --runs-dir."""
    (tmp_path / "elsewhere").mkdir()
    run = Path(shutil.move(newest(runs, f"{stage}_stopped_s0"), tmp_path / "elsewhere"))
    assert found(stage, runs, "--resume", str(run)).run == run
    if stage != "sft":
        gone = f"/gone/{newest(runs, 'sft_start').name}/final"
        edit_record(run / "hyperparams.json", lambda record: record.update(sft=gone))
        assert found(stage, runs, "--resume", str(run)).origins["sft"] == newest(runs, "sft_start") / "final"
        shutil.rmtree(newest(runs, "sft_start"))
        with pytest.raises(UserError, match="put that run back"):
            found(stage, runs, "--resume", str(run))


@pytest.mark.parametrize("way", ["path", "auto", "final"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_goes_on_with_a_longer_schedule_alone(runs, stage: str, way: str) -> None:
    run = newest(runs, f"{stage}_whole_s0")
    words = {"path": [f"{run}"], "auto": ["auto", "-n", "whole_s0"], "final": [f"{run}/final"]}[way]
    words = ["--resume", *words, "--runs-dir", str(runs)]
    field, unit = ("iterations", "iterations") if stage == "ppo" else ("max_steps", "steps")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    if way != "final":
        result = call_bare(stage, *words)
        assert (result.code, result.out) == (0, f"finished: {run} has all of its 3 {unit}\n"), result.err
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
        shutil.rmtree(run / "checkpoints")  # --save-every was never reached
    longer = [*words, f"--{field.replace('_', '-')}", "4"]
    assert f"{field}: 3 -> 4" in call_bare(stage, *longer).error
    result = call_bare(stage, *longer, "--resume-override", field)
    assert result.code == 0 and f"going on with {run / 'final'}; {field}: 3 -> 4" in result.out, result.err
    assert json.loads((run / "final" / "model.json").read_text())["step"] == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_and_the_help_are_of_the_run(runs, stage: str) -> None:
    run = newest(runs, f"{stage}_whole_s0")
    result = call_bare(stage, "--resume", str(run), "--plan", "--runs-dir", str(runs))
    assert result.code == 0 and ", -b 2, " in result.out and f"going on with {run}" in result.out, result.err
    result = call_bare(stage, "--resume", str(run), "--help")
    shown = " ".join(result.out.replace("│", " ").split())
    assert result.code == 0 and "Seed of initialisation, data order, dropout and sampling. (default: 3)" in shown


def test_a_best_checkpoint_cannot_be_gone_on_from(runs) -> None:
    error = call_bare("sft", "--resume", str(newest(runs, "sft_whole_s0") / "best")).error
    assert "no trainer_state.pt in it; give a folder under checkpoints/" in error


@pytest.mark.parametrize("stage", STAGES)
def test_auto_starts_a_run_that_saved_nothing_again(runs, stage: str, capsys) -> None:
    """The new run has the settings of the old one, unless they are given."""
    run = newest(runs, f"{stage}_stopped_s0")
    shutil.rmtree(run / "checkpoints")
    words = ("--resume", "auto", "-n", "stopped_s0", "--seed", "9")
    config = parse(stage, runs, *words)
    assert (config.seed, config.lr, config.adam_eps) == (9, 1e-3, 1e-6)
    assert find_resumption(stage, config) is None
    assert "starting a new run, with its settings where none are given" in capsys.readouterr().out
    (run / "hyperparams.json").unlink()
    assert parse(stage, runs, *words).lr == stage_defaults(STAGES[stage], "gpt2-nano").lr
    assert parse(stage, runs, "--resume", "auto", "-n", "nothing").lr == stage_defaults(STAGES[stage], "gpt2-nano").lr


# ---------------------------------------------------------------------------------------------------------------------
# Records that do not hold all, or hold more
# ---------------------------------------------------------------------------------------------------------------------


def edit(run: Path, **settings) -> None:
    edit_record(run / "hyperparams.json", lambda record: record["config"].update(settings))


# What the record says, what the one line asks for, and the words that satisfy it.
ASKED = [
    ("ppo", {"reward_fn": "my reward.py:f"}, "--reward-fn 'my reward.py:f' (code is run only as you name it)",
     ["--reward-fn", "my reward.py:f"]),
    ("ppo", {"eval_reward_fn": "/there/r.py:f"}, "--eval-reward-fn /there/r.py:f (", ["--eval-reward-fn", "r.py:f"]),
    ("ppo", {"reward_fn": "r.py:f", "reward_fn_weight": 0.5}, "--reward-fn r.py:f (", ["--reward_fn", "r.py:f"]),
    ("ppo", {"eval_reward_fn": "gold.py:gold_reward"}, "--eval-reward-fn gold.py:gold_reward (",
     ["--eval-reward-fn", "gold.py:gold_reward"]),
    ("rm", {"dataset": "rows.jsonl"}, "--dataset PATH (rows.jsonl is not there)", ["--dataset", "there/rows.jsonl"]),
    ("sft", {"tokenizer": "/a/hf_[secret]"}, "--tokenizer (recorded without its secret)",
     ["--tokenizer", "/a/hf_abcdefghijklmnopqrstu1"]),
    ("sft", {"dataset": "hf_[secret].jsonl", "pretrain": "hf_[secret]"},
     "--dataset (recorded without its secret), --pretrain (recorded without its secret), --dataset PATH (",
     ["--dataset", "hf_abcdefghijklmnopqrstu1.jsonl", "-p", "hf_abcdefghijklmnopqrstu1"]),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "settings", "asked", "words"), ASKED, ids=str)
def test_what_cannot_be_taken_from_a_run_is_asked_for(runs, stage: str, settings, asked: str, words) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    edit(run, **settings)
    for way in ("path", "auto"):
        resume = ways(stage, run)[way]
        with pytest.raises(UserError) as caught:
            found(stage, runs, *resume)
        assert f"add what cannot be taken from the run: {asked}" in str(caught.value)
        assert found(stage, runs, *resume, *words).overridden == {}
    last = Path(words[-1])
    other = [*words[:-1], str(last.with_name(f"other_{last.name}"))]
    with pytest.raises(UserError, match=f"settings differ from the run's .*other_{last.name[:2]}"):
        found(stage, runs, "--resume", str(run), *other)


@pytest.mark.parametrize("spec", [
    "src/utils/demo/gold.py:gold_reward", "utils/demo/gold.py:gold_reward", "src/utils/demo_gold.py:gold_reward",
    "/home/user/rlhf/src/utils/demo/gold.py:gold_reward", "/home/user/rlhf/src/utils/demo_gold.py:gold_reward",
])  # fmt: skip
def test_the_demos_reward_is_this_repositorys(runs, spec: str) -> None:
    edit(newest(runs, "ppo_stopped_s0"), eval_reward_fn=spec)
    assert found("ppo", runs, "--resume", "ppo_stopped_s0").overridden == {}


def test_data_beside_the_user_are_found(runs, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    edit(newest(runs, "rm_stopped_s0"), dataset="rows.jsonl")
    assert parse("rm", runs, "--resume", "rm_stopped_s0").dataset == "rows.jsonl"


@pytest.mark.parametrize("stage", STAGES)
def test_records_of_other_days(runs, stage: str, capsys) -> None:
    """A setting that the record lacks has today's default; one that there is no longer is told."""
    run = newest(runs, f"{stage}_stopped_s0")

    def older(record) -> None:
        for field in ("on_nonfinite", "adam_eps", "plan", "plan_gb"):
            del record["config"][field]
        record["config"] |= {"fused": True, "word": "\x1b[2J"}

    edit_record(run / "hyperparams.json", older)
    assert found(stage, runs, "--resume", str(run)).overridden == {}
    assert "recorded settings that there are no longer: fused True, word '\\x1b[2J'\n" in capsys.readouterr().out
    assert parse(stage, runs, "--resume", str(run)).adam_eps == STAGES[stage]().adam_eps
    with pytest.raises(UserError, match="adam_eps: .* -> 0.5"):
        found(stage, runs, "--resume", str(run), "--adam-eps", "0.5")


@pytest.mark.parametrize("stage", STAGES)
def test_the_runs_own_schedule_and_not_the_presets_of_today(runs, stage: str, monkeypatch) -> None:
    run = newest(runs, f"{stage}_stopped_s0")
    default = STAGES[stage]
    monkeypatch.setattr("config.configs._RECIPES", {"gpt2-nano": {default: {"lr": 0.9, "weight_decay": 0.5}}})
    monkeypatch.setattr("config.configs.PPOConfig", PPOConfig)
    if stage != "rm":  # whose defaults need PPO's
        assert stage_defaults(default, "gpt2-nano").weight_decay == 0.5
        assert found(stage, runs, "--resume", str(run)).overridden == {}


BROKEN = [
    ({"lr": "fast"}, "--lr"), ({"lr": None}, "--lr"), ({"lr": -1}, "--lr -1.0: must be a positive number"),
    ({"seed": 1.5}, "--seed"), ({"seed": True}, "--seed"), ({"config": "gpt9"}, "--config gpt9: no such preset"),
    ({"config": []}, "--config []: no such preset"), ({"device": "tpu"}, "tpu"), ({"name": {"a": 1}}, "--name"),
    ({"skip_bad_rows": "yes"}, "yes"), ({"lr": float("nan")}, "--lr nan"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "told"), BROKEN, ids=str)
def test_a_record_with_impossible_settings_is_told_in_one_line(runs, settings, told: str) -> None:
    run = newest(runs, "sft_stopped_s0")
    edit(run, **settings)
    error = call_bare("sft", "--resume", str(run), "--runs-dir", str(runs)).error
    assert error.startswith(f"error: --resume {run}: ") and told in error
    assert step_checkpoints(run)
