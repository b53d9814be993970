"""On a GPU: the same figures as on the CPU, all stages in every precision, the plan and running out of memory.

Skipped where there is none. `pytest -m gpu` runs these alone.
"""

import numpy as np
import pytest
import torch
from every_family import EVERY
from gpu_marks import NEEDS_CUDA
from scripts import call, newest
from setups import EOS, assert_equal_weights, read_metrics, runtime_on, weights

from models.generation import generate
from models.kernels import attention
from training.memory import preflight
from training.memory.device import available_bytes
from utils.runs.finding import step_checkpoints

FAMILIES = EVERY
DEVICE = "cuda"
pytestmark = NEEDS_CUDA
STAGES, PRECISIONS = ("sft", "rm", "ppo"), ("fp32", "bf16", "fp16")


@pytest.fixture
def trainer_on(make_model, sft_trainer, rm_trainer, ppo_trainer):
    """`trainer_on(stage, runtime, **settings)`: as the stage's script puts it together."""

    def make(stage, runtime, **settings):
        models = {
            "sft": {},
            "rm": {"sft": make_model(std=0.1)},
            "ppo": {"reference": make_model(std=0.1), "reward_model": make_model("reward", seed=1, std=0.1)},
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_that_share_keys_attend_as_with_copies(dtype, causal):
    """Flash attention takes them as they are; whoever takes which, results and gradients are those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, 70, 16), (3, 2, 70, 16), (3, 2, 70, 16)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = None if causal else torch.ones(3, 1, 70, 70, dtype=torch.bool).tril()
    found = []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        inputs = [x.to(device, kind).requires_grad_() for x in (q, k, v)]
        y = attention(*inputs, None if mask is None else mask.to(device), causal)
        found.append([x.float().cpu() for x in (y, *torch.autograd.grad(y.square().sum(), inputs))])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours - expected).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * expected.norm()


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
    for family in EVERY:
        start = f"-n {family} --config {family}-nano"
        assert call("sft", start, folder, DEVICE).code == 0
        assert call("rm", f"{start} -p sft_{family}", folder, DEVICE).code == 0
    return folder


def words_from(stage, family="gpt2"):
    return {"sft": "", "rm": f"-p sft_{family}", "ppo": f"-a sft_{family} -c rm_{family}"}[stage]


FLAGS = {
    "gpt2": ["--dtype fp16", "--config gpt2-nano/lora", "--tokens-per-micro-batch auto", "--activation-checkpointing"],
    "llama": ["--config llama-nano/lora", "--config llama-nano --dtype fp16 --activation-checkpointing"],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model, flags", [(model, flags) for model in FLAGS for flags in FLAGS[model]])
def test_the_scripts(runs, stage, model, flags):
    result = call(stage, f"-n flags {words_from(stage, model)} {flags}", runs, DEVICE)
    assert result.code == 0, result.err
    assert f"{DEVICE} (" in result.out


@pytest.mark.parametrize("model", EVERY)
def test_share_adapter(runs, model):
    words = f"-n shared {words_from('ppo', model)} --config {model}-nano/lora --share-adapter"
    shared = call("ppo", words, runs, DEVICE)
    assert shared.code == 0, shared.err


@pytest.mark.parametrize("model, stage", [*(("gpt2", stage) for stage in STAGES), ("llama", "sft")])
def test_compile(runs, model, stage):
    words = f"-n compiled {words_from(stage, model)} --config {model}-nano --compile"
    compiled = call(stage, words, runs, DEVICE)
    assert compiled.code == 0 and "torch.compile does not work here" not in compiled.err, compiled.err


@pytest.mark.parametrize("stage", STAGES)
def test_deterministic_runs_are_equal(runs, stage):
    found = []
    for name in ("one", "two"):
        result = call(stage, f"-n {name} {words_from(stage)} --deterministic", runs, DEVICE)
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
