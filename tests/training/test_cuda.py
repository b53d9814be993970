"""On a GPU: the same figures as on the CPU, all stages in every precision, the plan and running out of memory.

Skipped where there is none. `pytest -m gpu` runs these alone.
"""

import numpy as np
import pytest
import torch
from gpu_marks import NEEDS_CUDA
from scripts import call, newest
from setups import EOS, assert_equal_weights, read_metrics, runtime_on, weights

from models.generation import generate
from models.gpt import GPT, GPTRewardModel
from training.memory import preflight
from training.memory.device import available_bytes
from utils.runs.finding import step_checkpoints

DEVICE = "cuda"
pytestmark = NEEDS_CUDA
STAGES, PRECISIONS = ("sft", "rm", "ppo"), ("fp32", "bf16", "fp16")


@pytest.fixture
def trainer_on(make_model, sft_trainer, rm_trainer, ppo_trainer):
    """`trainer_on(stage, runtime, **settings)`: as the stage's script puts it together."""

    def make(stage, runtime, **settings):
        models = {
            "sft": {},
            "rm": {"sft": make_model(GPT, std=0.1)},
            "ppo": {"reference": make_model(GPT, std=0.1), "reward_model": make_model(GPTRewardModel, seed=1, std=0.1)},
        }[stage]
        placed = {name: runtime.place(model) for name, model in models.items()}
        return {"sft": sft_trainer, "rm": rm_trainer, "ppo": ppo_trainer}[stage](on=runtime, **placed, **settings)

    return make


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_is_that_of_the_cpu(make_model, padded, random_rows, rank, side):
    model, (ids, att) = make_model(lora_rank=rank), padded(random_rows([5, 11, 3]), extra=2, side=side)
    expected = model(ids, att)[att]
    found = model.to(DEVICE)(ids.to(DEVICE), att.to(DEVICE)).cpu()[att]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_is_that_of_the_cpu_and_of_each_row_alone(make_model, random_rows, temperature):
    prompts, options = random_rows([5, 11, 3, 8], vocab_size=EOS), {"max_new_tokens": 12, "eos_id": EOS}
    model, seeds = make_model(), [3, 1, 4, 1]
    expected = generate(model, prompts, temperature=temperature, seeds=seeds, **options)
    model.to(DEVICE)
    found = generate(model, prompts, temperature=temperature, seeds=seeds, **options)
    assert torch.equal(found.responses.cpu(), expected.responses)
    torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs, atol=1e-4, rtol=0)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], temperature=temperature, seeds=seeds[i : i + 1], **options)
        assert torch.equal(alone.row(0), found.row(i))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_stage_trains(trainer_on, stage, dtype):
    """PPO's invariants are checked inside; fp16 may leave out steps until its loss scale fits."""
    steps = {"iterations": 3} if stage == "ppo" else {"max_steps": 12}
    trainer = trainer_on(stage, runtime_on(DEVICE, dtype), lr=1e-3, **steps)
    before = weights(trainer.policy if stage == "ppo" else trainer.model)
    assert trainer.fit() == 0
    after = weights(trainer.policy if stage == "ppo" else trainer.model)
    assert any((after[name] != before[name]).any() for name in before)
    assert all(torch.isfinite(x).all() for x in after.values())
    lines = read_metrics(trainer.run)
    assert max(line["step"] for line in lines) == trainer.total_steps


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_that_of_the_cpu_whatever_the_micro_batch(trainer_on, stage):
    found = {}
    for device, size in (("cpu", 8), (DEVICE, 8), (DEVICE, 3)):
        # A large epsilon: Adam's first step is otherwise the sign of each gradient, of those that are rounding, too.
        trainer = trainer_on(stage, runtime_on(device), batch_size=size, adam_eps=1e-3)
        if stage == "ppo":
            trainer.iteration(1)
        else:
            trainer.train_step(np.arange(8))
        model = trainer.policy if stage == "ppo" else trainer.model
        found[device, size] = {name: x.cpu() for name, x in weights(model).items()}
    for key in ((DEVICE, 8), (DEVICE, 3)):
        assert_equal_weights(found[key], found["cpu", 8], atol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert call("sft", "-n base", folder, DEVICE).code == 0
    assert call("rm", "-n base -p sft_base", folder, DEVICE).code == 0
    return folder


FROM = {"sft": "", "rm": "-p sft_base", "ppo": "-a sft_base -c rm_base"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "flags",
    ["--dtype fp16", "--config gpt2-nano/lora", "--tokens-per-micro-batch auto", "--activation-checkpointing"],
)
def test_the_scripts(runs, stage, flags):
    result = call(stage, f"-n flags {FROM[stage]} {flags}", runs, DEVICE)
    assert result.code == 0, result.err
    assert f"{DEVICE} (" in result.out


def test_share_adapter_and_compile(runs):
    shared = call("ppo", "-n shared -a sft_base -c rm_base --config gpt2-nano/lora --share-adapter", runs, DEVICE)
    assert shared.code == 0, shared.err
    for stage in STAGES:
        compiled = call(stage, f"-n compiled {FROM[stage]} --compile", runs, DEVICE)
        assert compiled.code == 0 and "torch.compile does not work here" not in compiled.err, compiled.err


@pytest.mark.parametrize("stage", STAGES)
def test_deterministic_runs_are_equal(runs, stage):
    found = []
    for name in ("one", "two"):
        result = call(stage, f"-n {name} {FROM[stage]} --deterministic", runs, DEVICE)
        assert result.code == 0, result.err
        found.append(newest(runs, f"{stage}_{name}") / "final" / "model.safetensors")
    assert found[0].read_bytes() == found[1].read_bytes()


def test_a_plan_over_the_cap_stops_before_anything_is_loaded(runs):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        assert available_bytes(DEVICE) < 3e9
        result = call("sft", "-n large -p scratch --config gpt2-medium --dataset demo", runs, DEVICE)
        assert result.code == 2 and "GB" in result.err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_running_out_of_memory_names_the_flag(runs, monkeypatch):
    """A real one, in the third step: the checkpoint of the second is whole."""
    from training import trainers

    step = trainers.SFTTrainer.train_step

    def hungry(self, rows):
        if self.step == 2:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
        return step(self, rows)

    monkeypatch.setattr(trainers.SFTTrainer, "train_step", hungry)
    result = call("sft", "-n hungry --save-every 1", runs, DEVICE)
    assert result.code == 1 and "out of memory: lower --batch-size from 2 to 1" in result.err
    assert step_checkpoints(newest(runs, "sft_hungry"))[-1].name == "step_00000002"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    assert preflight.is_out_of_memory(caught.value)
