"""Training in half precision gets to where fp32 gets: it differs by rounding, step after step."""

import pytest
from every_family import EVERY
from gpu_marks import NEEDS_CUDA
from scripts import call, newest
from setups import ranked_examples, read_metrics, runtime_on, sft_examples

FAMILIES = EVERY
pytestmark = pytest.mark.slow

HALF = [("cpu", "bf16"), *(pytest.param(("cuda", dtype), marks=NEEDS_CUDA) for dtype in ("bf16", "fp16"))]


@pytest.fixture(params=HALF, ids=lambda on: "-".join(on))
def half(request) -> tuple[str, str]:
    runtime_on(*request.param)  # skips the test where the device cannot
    return request.param


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_loss_follows_that_of_fp32(sft_trainer, rm_trainer, make_model, half, stage) -> None:
    """A forward pass that used weights of an earlier step would learn something else, its own loss near 0 or not."""

    def losses(device: str, dtype: str) -> list[float]:
        on = runtime_on(device, dtype)
        models = {} if stage == "sft" else {"sft": on.place(make_model("lm", std=0.1))}
        make, examples = {"sft": (sft_trainer, sft_examples(24)), "rm": (rm_trainer, ranked_examples(24))}[stage]
        trainer = make(examples, examples, on=on, lr=3e-3, epochs=20, max_steps=60, eval_every=20, **models)
        assert trainer.fit() == 0
        key = {"sft": "eval/loss", "rm": "eval/nll"}[stage]
        return [line[key] for line in read_metrics(trainer.run) if key in line]

    expected, found = losses(half[0], "fp32"), losses(*half)
    assert len(expected) == len(found) >= 3 and abs(expected[-1] / expected[0] - 1) > 0.1  # it has learned something
    assert found == pytest.approx(expected, rel=0.05, abs=0.01 * expected[0])  # not of what is next to nothing


def test_sampler_and_training_see_the_same_policy_after_steps(ppo_trainer, make_model, half) -> None:
    """Both make copies of weights in half precision; one left over from before a step would be another policy."""
    on = runtime_on(*half)
    roles = {"reference": make_model("lm", std=0.1), "reward_model": make_model("reward", seed=1, std=0.1)}
    trainer = ppo_trainer(on=on, lr=1e-2, **{name: on.place(model) for name, model in roles.items()})
    table = trainer.runtime.unwrap(trainer.policy).actor.output_table
    for update in (1, 2, 3):
        before = table.detach().clone()
        metrics = trainer.iteration(update)
        assert metrics["policy/sampler_vs_train_logp_max"] < 0.05, update
    assert (table - before).norm() > 0.02 * before.norm()  # or the test would show little


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """An SFT and a reward model for PPO to start from."""
    folder = tmp_path_factory.mktemp("runs")
    for model in EVERY:
        assert call("sft", f"-n {model} --config {model}-nano", folder).code == 0
        assert call("rm", f"-n {model} -p sft_{model} --config {model}-nano", folder).code == 0
    return folder


WAYS = {
    "full": "",
    "last-block": "--freeze last_block",
    "recomputed": "--activation-checkpointing",
    "lora": "--config {}-nano/lora",
    "lora-shared": "--config {}-nano/lora --share-adapter",
    "lora-recomputed": "--config {}-nano/lora --activation-checkpointing",
}
OF_EACH = [("gpt2", way) for way in WAYS] + [("llama", way) for way in ("full", "lora-shared", "lora-recomputed")]


@pytest.mark.parametrize(("model", "way"), OF_EACH)
def test_every_way_to_train_keeps_the_invariants_of_ppo(started, model, way, half) -> None:
    """The loop checks them: responses come from the policy that trains, whose ratio is 1 before its first step."""
    device, dtype = half
    flags = WAYS[way].format(model) or f"--config {model}-nano"
    flags += f" -a sft_{model} -c rm_{model} --dtype {dtype} --lr 3e-2 --critic-lr 1e-2 --max-steps 4"
    result = call("ppo", f"-n {way} {flags}", started, device)
    assert result.code == 0, result.err
    lines = [line for line in read_metrics(newest(started, f"ppo_{way}")) if "objective/kl" in line]
    assert lines[0]["objective/kl"] == 0 and abs(lines[-1]["objective/kl"]) > 0.01  # it has moved, or this shows little
