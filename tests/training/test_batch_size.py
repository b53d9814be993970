"""The size of a pass decides how much memory a step takes, and by rounding alone what comes out."""

import re

import pytest
import torch
from every_family import EVERY, GPT2_ALONE
from safetensors.torch import load_file
from scripts import call, newest
from setups import assert_equal_weights, ranked_examples, weights

FAMILIES = EVERY
pytestmark = pytest.mark.slow

ROWS = 8  # of an optimizer step


@pytest.fixture
def trained(sft_trainer, rm_trainer, ppo_trainer):
    """`trained(stage, **settings)`: the weights after a few steps of a tiny model."""
    makers = {
        # The gradient of a key's bias is 0 but for rounding, of which an epsilon of 1e-8 would make whole steps.
        "sft": lambda **more: sft_trainer(max_steps=4, lr=1e-3, adam_eps=1e-5, **more),
        "rm": lambda **more: rm_trainer(ranked_examples(24, completions=(2, 4, 3)), max_steps=4, **more),
        "ppo": lambda **more: ppo_trainer(iterations=2, **more),
        "ppo of 3 minibatches": lambda **more: ppo_trainer(iterations=2, minibatches=3, **more),
    }

    def train(stage: str, **settings) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        trainer = makers[stage](global_batch_size=ROWS, eval_every=100, **settings)
        assert trainer.fit() == 0 and trainer.config.global_batch_size == ROWS
        return weights(trainer.policy if stage.startswith("ppo") else trainer.model)

    return train


PASSES = [{"batch_size": n} for n in (1, 3, 9, 64)]
PASSES += [{"batch_size": n, "tokens_per_micro_batch": tokens} for n, tokens in ((1, 40), (64, 10**6))]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "ppo of 3 minibatches"])
def test_weights_do_not_depend_on_the_size_of_a_pass(trained, stage: str) -> None:
    """Smaller and larger than the step, dividing it and not, counted in rows and in tokens."""
    whole = trained(stage, batch_size=ROWS)
    for passes in PASSES:
        assert_equal_weights(trained(stage, **passes), whole, atol=2e-5)


@pytest.mark.parametrize("stage,words", [("sft", ""), ("sft", "--tokens-per-micro-batch 300")])
def test_a_larger_pass_than_the_step_is_told_and_changes_nothing(tmp_path, stage: str, words: str) -> None:
    """As the command line has it: the step stays at 4 rows, whatever -b is."""
    states = []
    for rows in (4, 64):
        result = call(stage, f"-n b{rows} -b {rows} {words}", tmp_path)
        assert result.code == 0, result.err
        assert ("--batch-size 64: a step has --global-batch-size 4, so passes are of 4" in result.out) == (rows == 64)
        assert "dropout" not in result.out
        states.append(load_file(newest(tmp_path, f"{stage}_b{rows}") / "final" / "model.safetensors"))
    assert_equal_weights(*states, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


@GPT2_ALONE
def test_recomputed_blocks_have_the_same_dropout(trained, make_model) -> None:
    """--activation-checkpointing gives each block its masks again, and leaves those that follow as they are."""
    results = [
        trained("sft", batch_size=3, model=make_model("lm", std=0.1, dropout=0.2, activation_checkpointing=again))
        for again in (False, True)
    ]
    assert_equal_weights(*results, atol=0)


def test_with_dropout_other_passes_are_other_masks_and_the_run_says_so(tmp_path) -> None:
    """What `-b` cannot promise with dropout is told at the start, and again where a run goes on with another one."""
    words = "-n drop --config gpt2-nano/dropout --max-steps 4 --save-every 2"
    result = call("sft", f"{words} -b 2", tmp_path)
    told = "dropout 0.2 draws its masks pass by pass"
    assert result.code == 0 and f"{told}: results depend on -b 2 by more than rounding" in result.out
    run = newest(tmp_path, "sft_drop")
    for passes in ("-b 4", "--tokens-per-micro-batch 512"):
        result = call("sft", f"{words} -b 2 {passes} --resume {run}/checkpoints/step_00000002", tmp_path)
        assert result.code == 0, result.err
        assert f"note: {told}: with {passes} in place of -b 2 the run will not end as it would have" in result.out
    result = call("sft", f"{words} -b 2 --activation-checkpointing --resume {run}/checkpoints/step_00000002", tmp_path)
    assert result.code == 0 and re.search(f"^{told}: results depend on -b 2 by more", result.out, re.M)
    result = call("rm", "-n drop -p sft_drop --config gpt2-nano/dropout", tmp_path)  # it has none
    assert result.code == 0 and told not in result.out
