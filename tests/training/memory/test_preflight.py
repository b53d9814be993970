"""Before a run: what is printed, what is refused, which flags are named; and what an allocation that fails leads to."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import call, call_bare, newest, save_start

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, RunConfig, SFTConfig, stage_defaults
from config.model_configs import get_configs
from config.user_error import UserError
from training.memory import device as device_memory
from training.memory import preflight
from training.memory.plan import Sources
from training.memory.preflight import MARGIN, Planner, fit, is_out_of_memory, over_budget, ways_out
from utils.runs.finding import step_checkpoints

pytestmark = pytest.mark.slow

STAGES = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


def planner(gb: float, preset: str = "gpt2", device: str = "cuda", dtype: str = "bf16") -> Planner:
    sizes = get_configs(preset)
    return Planner(Sources(sizes, sizes), device, dtype, 0.5e9, gb * 1e9)


@pytest.mark.parametrize("top", [0, 63, 64, 65, 100, 128, 575, 576, 577, 999])
def test_the_largest_passes_that_fit(top, monkeypatch) -> None:
    monkeypatch.setattr(Planner, "token_budgets", lambda self, config: (64, 576))
    monkeypatch.setattr(Planner, "fits", lambda self, config: config.tokens_per_micro_batch <= top)
    assert planner(16).largest_passes(SFTConfig()) == (min(top // 64 * 64, 576) or None)


@pytest.mark.parametrize("stage", STAGES)
def test_plan_prints_the_table_and_leaves_nothing_behind(stage, tmp_path) -> None:
    result = call(stage, "--plan", tmp_path)
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    assert "sum, GB" in result.out and "optimizer (two moments)" in result.out
    assert re.search(r"^memory on cpu, fp32, .*: peak [\d.]+ GB of [\d.]+ GB \(\w+\): ", result.out, re.M)
    assert ("is not there yet" in result.out) == (stage != "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_plan_for_a_gpu_that_is_not_there(stage, tmp_path) -> None:
    fits = parse_cli(STAGES[stage], shlex.split("--config gpt2-xl/lora --plan-gb 16"))
    assert fits.plan and preflight.preflight(fits).plan
    with pytest.raises(UserError, match=r"the plan needs [\d.]+ GB \(\w+\), cuda has 16.0 GB; what would fit: "):
        preflight.preflight(parse_cli(STAGES[stage], shlex.split("--config gpt2-xl --plan-gb 16")))


@pytest.mark.parametrize(("stage", "flags"), [("rm", "-p"), ("ppo", "-c none --reward-fn a.py:f -a")])
def test_a_plan_of_another_preset_is_not_of_the_model_that_a_default_finds(stage, flags, tmp_path) -> None:
    """After `make demo` the default of -p and -a is the demo's model."""
    save_start(tmp_path)
    words = f"--config gpt2-xl/lora --plan-gb 16 --runs-dir {tmp_path} {flags} sft_start"
    result = call_bare(stage, *shlex.split(words))
    assert result.code == 0 and "holds a gpt2-nano: planned with the sizes of gpt2-xl/lora" in result.out
    assert float(re.search(r"peak ([\d.]+) GB", result.out)[1]) > 5


def test_weights_are_never_read(tmp_path, tiny_runs, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("models.weights.checkpoint.load_file", refuse)
    monkeypatch.setattr("models.weights.checkpoint.save_file", refuse)
    made = preflight.preflight(PPOConfig(actor="sft_t", critic="rm_t", runs_dir=str(tiny_runs), plan=True))
    assert made.plan


def test_a_start_tells_its_peak_and_stops_over_budget_before_anything_is_made(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("training.memory.preflight.available_bytes", lambda device: 0.3e9)
    result = call("sft", "-n over", tmp_path)
    assert "the plan needs" in result.error and "0.3 GB" in result.error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "gb", "first"),
    [
        (stage_defaults(SFTConfig, "gpt2"), 4.5, {"tokens_per_micro_batch"}),
        (replace(stage_defaults(PPOConfig, "gpt2"), tokens_per_micro_batch=99999), 16, {"tokens_per_micro_batch"}),
        (stage_defaults(PPOConfig, "gpt2-medium"), 16, {"config"}),
        (stage_defaults(RMConfig, "gpt2-large"), 16, {"config"}),
        (stage_defaults(SFTConfig, "gpt2-xl/lora"), 6.0, {"activation_checkpointing"}),
        (stage_defaults(SFTConfig, "smollm2-1.7b"), 16, {"config"}),
        (stage_defaults(RMConfig, "tinyllama-1.1b"), 16, {"config"}),
        (stage_defaults(PPOConfig, "llama-3.2-1b"), 16, {"config", "tokens_per_micro_batch"}),
    ],
)  # fmt: skip
def test_every_flag_that_is_named_really_fits_and_the_cheapest_comes_first(config: RunConfig, gb, first) -> None:
    plans = planner(gb, config.config)
    assert not plans.fits(config)
    ways = ways_out(config, plans)
    assert ways
    for i, (flags, peak) in enumerate(ways):
        words = shlex.split(flags)
        # as a person would type them behind their own settings
        changed = parse_cli(type(config), ["--config", config.config, *words])
        named = {w[2:].replace("-", "_") for w in words if w.startswith("--")}
        changed = replace(config, **{name: getattr(changed, name) for name in named})
        assert plans.plan(changed).peak == pytest.approx(peak) and peak <= (1 - MARGIN) * gb * 1e9
        if i == 0:
            assert named == first
    assert ways[0][0] in over_budget(config, plans.plan(config), plans)


def test_there_may_be_no_way_out() -> None:
    config = stage_defaults(SFTConfig, "gpt2")
    plans = planner(0.6)
    assert ways_out(config, plans) == [] and "take a smaller --config" in over_budget(config, plans.plan(config), plans)


@pytest.mark.parametrize("stage", STAGES.values())
def test_auto_is_the_largest_budget_that_leaves_a_tenth_free(stage) -> None:
    config = replace(stage_defaults(stage, "gpt2/lora"), tokens_per_micro_batch="auto", global_batch_size=1024)
    plans = planner(8, "gpt2/lora")
    tokens = preflight.with_auto(config, plans).tokens_per_micro_batch
    peaks = [plans.plan(replace(config, tokens_per_micro_batch=n)).peak for n in (tokens, tokens + 64)]
    assert peaks[0] <= (1 - MARGIN) * 8e9 < peaks[1]
    # More memory, larger passes; none at all: the longest row, whose plan is then refused.
    assert preflight.with_auto(config, planner(16, "gpt2/lora")).tokens_per_micro_batch > tokens
    least = preflight.with_auto(config, planner(0.6, "gpt2/lora")).tokens_per_micro_batch
    assert least == (2048 if stage is RMConfig else 1024)


def test_auto_is_resolved_before_a_run_and_recorded(tmp_path) -> None:
    result = call("sft", "-n auto --tokens-per-micro-batch auto --activation-checkpointing", tmp_path)
    assert result.code == 0, result.err
    record = json.loads((newest(tmp_path, "sft_auto") / "hyperparams.json").read_text())
    assert record["config"]["tokens_per_micro_batch"] == 4 * 192  # all rows of a step, as long as they may be
    saved = json.loads((newest(tmp_path, "sft_auto") / "final" / "model.json").read_text())
    assert record["config"]["activation_checkpointing"] and saved["model"]["activation_checkpointing"]


def test_whoever_gives_a_batch_size_counts_rows() -> None:
    assert parse_cli(SFTConfig, ["--config", "gpt2"]).tokens_per_micro_batch == 8192
    assert parse_cli(SFTConfig, ["--config", "gpt2", "-b", "2"]).tokens_per_micro_batch == 0
    both = ["--config", "gpt2", "--batch_size=2", "--tokens-per-micro-batch", "64"]
    assert parse_cli(SFTConfig, both).tokens_per_micro_batch == 64
    with pytest.raises(UserError, match="tokens-per-micro-batch"):
        parse_cli(SFTConfig, ["--tokens-per-micro-batch", "-1"])


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def test_control_groups(tmp_path) -> None:
    group = tmp_path
    assert device_memory.control_group_bytes(group) is None
    (group / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert device_memory.control_group_bytes(group) is None
    (group / "memory.max").write_text("5000\n")
    assert device_memory.control_group_bytes(group) == 5000 - 1000 + 300


def test_free_memory_is_read_from_meminfo(tmp_path) -> None:
    file = tmp_path / "meminfo"
    assert device_memory.free_bytes(file) is None
    file.write_text("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n")
    assert device_memory.free_bytes(file) == 2048 * 1024
    assert device_memory.available_bytes("cpu") > device_memory.resident_bytes() > 5e7


def test_a_gpus_share_counts(monkeypatch) -> None:
    """With a fraction set, the allocator stops there, whatever is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1e9)
    for fraction, expected in ((1.0, 11e9), (0.25, 4e9)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda f=fraction: f)
        assert device_memory.available_bytes("cuda") == expected + device_memory.CUDA_CONTEXT


# ---------------------------------------------------------------------------------------------------------------------
# When memory runs out
# ---------------------------------------------------------------------------------------------------------------------

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    MemoryError(),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_running_out_is_one_line_with_a_flag_and_a_checkpoint(failure, tmp_path, capsys) -> None:
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000030.writing").mkdir()

    def fail() -> int:
        raise failure

    trainer = SimpleNamespace(fit=fail, run=tmp_path)
    assert fit(trainer, SFTConfig(batch_size=4)) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "lower --batch-size from 4 to 2" in told
    assert f"--resume {tmp_path}" in told and "step_00000020 is whole" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (dict(tokens_per_micro_batch=4096), "lower --tokens-per-micro-batch from 4096 to 2048"),
        (dict(batch_size=1), "add --activation-checkpointing"),
        (dict(batch_size=1, activation_checkpointing=True), "--max-length"),
    ],
)
def test_the_flag_to_change(settings, change) -> None:
    told = preflight.out_of_memory(SFTConfig(**settings), Path("nowhere"))
    assert change in told and "no checkpoint had been written" in told


def test_other_errors_keep_their_traceback() -> None:
    def fail() -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(SimpleNamespace(fit=fail, run=Path()), SFTConfig())
    assert not is_out_of_memory(ValueError("out of memory"))
    assert fit(SimpleNamespace(fit=lambda: 130, run=Path()), SFTConfig()) == 130


def test_a_run_that_runs_out_keeps_a_checkpoint_to_go_on_from(tmp_path, monkeypatch) -> None:
    from training.trainers import SFTTrainer

    steps, train_step = [], SFTTrainer.train_step

    def third_fails(self, rows):
        steps.append(rows)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_step(self, rows)

    monkeypatch.setattr(SFTTrainer, "train_step", third_fails)
    result = call("sft", "-n oom", tmp_path)
    run = newest(tmp_path, "sft_oom")
    assert result.code == 1 and "out of memory: lower --batch-size from 2 to 1" in result.err
    assert "Traceback" not in result.err and [p.name for p in step_checkpoints(run)] == ["step_00000002"]
    monkeypatch.undo()
    again = call("sft", f"-n oom --resume {run} -b 1 --activation-checkpointing", tmp_path)
    assert again.code == 0, again.err
