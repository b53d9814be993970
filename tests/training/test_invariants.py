"""What must hold while PPO runs: that it does, and that each check stops a run in which it does not."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from every_family import EVERY, GPT2_ALONE

from training import trainers
from training.engine.runtime import Runtime
from training.invariants import InvariantError, check_first_minibatch, check_frozen, digests

FAMILIES = EVERY


def watched_iteration(trainer, monkeypatch, update: int = 1) -> tuple[dict, dict, dict]:
    """One PPO iteration; its metrics and what the first-minibatch check was shown (policy, value)."""
    seen = []

    def watch(policy, value, dtype):
        seen.append((policy, value))
        check_first_minibatch(policy, value, dtype)

    monkeypatch.setattr(trainers, "check_first_minibatch", watch)
    metrics = trainer.iteration(update)
    assert len(seen) == 1  # once an iteration, before its first step
    return metrics, *seen[0]


@pytest.mark.parametrize("minibatches,batch_size", [(1, 8), (1, 3), (3, 2)])
def test_the_first_minibatch_has_ratio_one_exactly(ppo_trainer, monkeypatch, minibatches, batch_size) -> None:
    trainer = ppo_trainer(minibatches=minibatches, batch_size=batch_size)
    for update in (1, 2, 3):  # after steps, too
        _, policy, value = watched_iteration(trainer, monkeypatch, update)
        assert trainer.runtime.unwrap(trainer.policy).actor.training
        for key in ("ratio_drift", "approx_kl", "clipfrac", "ratio_var"):
            assert policy[key] == 0.0, key
        assert policy["ratio_mean"] == 1.0 == policy["ratio_max"]
        assert value["value_drift"] == 0.0 and value["clipfrac"] == 0.0
        if minibatches == 1:  # -mean of advantages that were whitened over these very tokens
            assert abs(policy["loss"]) < 1e-6


def test_the_first_minibatch_in_bf16(ppo_trainer, monkeypatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = ppo_trainer(on=Runtime("cpu", "bf16", 0))
    for update in (1, 2):
        _, policy, value = watched_iteration(trainer, monkeypatch, update)
        assert policy["ratio_drift"] < 2e-2 and abs(policy["ratio_mean"] - 1) < 1e-3 and policy["clipfrac"] == 0
        assert value["value_drift"] < 2e-2


def test_only_forward_passes_run_in_bf16(ppo_trainer, monkeypatch) -> None:
    """No losses and backward passes inside autocast; the head and the log-probabilities in bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = ppo_trainer(on=Runtime("cpu", "bf16", 0), ppo_epochs=1)
    seen = {"forward": set(), "backward": set(), "projection": set()}
    policy, backward = trainer.runtime.unwrap(trainer.policy), trainer.runtime.backward
    policy.actor.trunk.register_forward_pre_hook(lambda *_: seen["forward"].add(torch.is_autocast_enabled("cpu")))
    projection = next(m for m in policy.actor.blocks[0].modules() if isinstance(m, torch.nn.Linear))
    projection.register_forward_hook(lambda module, args, out: seen["projection"].add(out.dtype))

    def watch(loss):
        seen["backward"].add((torch.is_autocast_enabled("cpu"), loss.dtype))
        backward(loss)

    monkeypatch.setattr(trainer.runtime, "backward", watch)
    trainer.iteration(1)
    assert seen == {"forward": {True}, "backward": {(False, torch.float32)}, "projection": {torch.bfloat16}}
    states = trainer.optimizer.state.values()
    assert {p.dtype for p in policy.parameters()} == {torch.float32} == {s["exp_avg"].dtype for s in states}


def test_kl_is_exactly_zero_at_the_first_iteration(ppo_trainer, make_model) -> None:
    for lora_rank in (0, 2):
        reference = make_model("lm", std=0.1)
        actor = make_model("actor", lora_rank=lora_rank, std=0.1)
        actor.load_state_dict(reference.state_dict(), strict=False)
        with torch.no_grad():
            [p.zero_() for name, p in actor.named_parameters() if name.endswith("lora_B")]
        metrics = ppo_trainer(actor=actor, reference=reference).iteration(1)
        assert {float(metrics[f"objective/{key}"]) for key in ("kl", "kl_k3", "kl_per_token")} == {0.0}
        assert float(metrics["policy/approxkl_epoch1"]) == 0.0


@GPT2_ALONE
def test_dropout_stops_the_run(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(actor=make_model("actor", std=0.1, dropout=0.2))
    with pytest.raises(InvariantError, match="dropout"):
        trainer.iteration(2)
    with pytest.raises(InvariantError, match="policy and reference must agree.*dropout"):
        trainer.iteration(1)


def test_another_temperature_stops_the_run(ppo_trainer) -> None:
    trainer = ppo_trainer(temperature=0.7)
    trainer.config = replace(trainer.config, temperature=1.0)  # rollouts keep 0.7
    with pytest.raises(InvariantError, match=r"importance ratio must be 1 .*temperature"):
        trainer.iteration(2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sampler_with_other_weights_stops_the_run(ppo_trainer, monkeypatch, dtype) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = ppo_trainer(on=Runtime("cpu", dtype, 0))
    sample = trainer.rollouts.sample

    def sample_then_change(*args):
        experience = sample(*args)
        with torch.no_grad():
            trainer.rollouts.actor.output_table.mul_(1.2)
        return experience

    monkeypatch.setattr(trainer.rollouts, "sample", sample_then_change)
    with pytest.raises(InvariantError, match="not sampled from the policy that is trained.*before an optimizer step"):
        trainer.iteration(2)


def test_weights_changed_behind_the_rollout_stop_the_run(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer()
    evaluate_roles = trainer.rollouts.evaluate_roles

    def evaluate_then_change(*args):
        evaluate_roles(*args)
        with torch.no_grad():
            trainer.rollouts.actor.output_table.mul_(1.01)

    monkeypatch.setattr(trainer.rollouts, "evaluate_roles", evaluate_then_change)
    with pytest.raises(InvariantError, match="weights changed between rollout and update"):
        trainer.iteration(2)


def test_another_reference_stops_the_run(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(reference=make_model("lm", seed=8, std=0.1))
    with pytest.raises(InvariantError, match="two different checkpoints"):
        trainer.iteration(1)
    assert trainer.iteration(2)["objective/kl_k3"] > 0  # and only there: later they do differ


@pytest.mark.parametrize("name", ["ratio_drift", "ratio_mean", "clipfrac", "value_drift"])
def test_a_nan_is_not_let_through(name: str) -> None:
    policy = {"ratio_drift": 0.0, "ratio_mean": 1.0, "clipfrac": 0.0}
    value = {"value_drift": 0.0}
    policy, value = ({k: torch.tensor(v) for k, v in d.items()} for d in (policy, value))
    check_first_minibatch(policy, value, "fp32")
    (value if name == "value_drift" else policy)[name] = torch.tensor(float("nan"))
    with pytest.raises(InvariantError):
        check_first_minibatch(policy, value, "fp32")


def test_bf16_has_room_for_rounding_and_not_for_mistakes() -> None:
    value = {"value_drift": torch.tensor(0.0)}

    def policy(drift: float, mean_off: float) -> dict:
        return {
            "ratio_drift": torch.tensor(drift),
            "ratio_mean": torch.tensor(1 + mean_off),
            "clipfrac": torch.tensor(0.0),
        }

    check_first_minibatch(policy(1.9e-2, 9e-4), value, "bf16")
    for broken in (policy(2.1e-2, 0.0), policy(1e-2, 2e-3)):
        with pytest.raises(InvariantError):
            check_first_minibatch(broken, value, "bf16")
    with pytest.raises(InvariantError):
        check_first_minibatch(policy(1e-5, 0.0), value, "fp32")


def test_a_frozen_model_that_changes_stops_the_run(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer(max_steps=1, ppo_epochs=1)
    update = trainer.update

    def change_reward_model(*args):
        with torch.no_grad():
            trainer.rollouts.reward_model.head.weight[0, 0] += 1e-7
        return update(*args)

    monkeypatch.setattr(trainer, "update", change_reward_model)
    with pytest.raises(InvariantError, match="frozen weights changed during training: reward model;"):
        trainer.fit()
    assert not (trainer.run / "final").exists()


def test_the_hash_sees_every_bit_of_parameters_and_buffers(make_model) -> None:
    model = make_model()
    before = digests({"model": model})
    check_frozen(before, digests({"model": make_model()}))
    weight = model.final_norm.weight
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    with pytest.raises(InvariantError, match="model"):
        check_frozen(before, digests({"model": model}))
