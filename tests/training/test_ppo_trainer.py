"""PPO: how many steps, on what, what they change and what they must leave alone."""

import json
import math

import numpy as np
import pytest
import torch
from every_family import EVERY, GPT2_ALONE
from setups import EOS, assert_equal_weights, ppo_models, prompt_examples, read_metrics, weights

from models.families import load_checkpoint
from models.lora import freeze_weights, is_adapter, share_base
from models.weights.checkpoint import describe, weights_digest
from training import trainers
from training.engine.runtime import Runtime
from utils.loss import masked_mean, masked_var

FAMILIES = EVERY



# ---------------------------------------------------------------------------------------------------------------------
# Epochs, minibatches, micro-batches
# ---------------------------------------------------------------------------------------------------------------------


def count_steps(trainer, monkeypatch) -> list[int]:
    """Filled with one entry per optimizer step from now on."""
    steps, inner = [], trainer.optimizer.optimizer
    step = inner.step
    monkeypatch.setattr(inner, "step", lambda *args, **kwargs: (steps.append(1), step(*args, **kwargs))[1])
    return steps


@pytest.mark.parametrize("ppo_epochs,minibatches", [(1, 1), (4, 1), (2, 3), (1, 8)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_steps_are_epochs_times_minibatches(ppo_trainer, monkeypatch, ppo_epochs, minibatches, batch_size) -> None:
    trainer = ppo_trainer(ppo_epochs=ppo_epochs, minibatches=minibatches, batch_size=batch_size)
    steps = count_steps(trainer, monkeypatch)
    metrics = trainer.iteration(1)
    assert len(steps) == ppo_epochs * minibatches == metrics["train/optimizer_steps"]
    epochs = [key for key in metrics if key.startswith("policy/approxkl_epoch")]
    assert len(epochs) == ppo_epochs


@pytest.mark.parametrize("minibatches", [1, 2])
def test_parameters_do_not_depend_on_the_micro_batch(ppo_trainer, minibatches: int) -> None:
    results, ratios = {}, {}
    for batch_size in (8, 1, 2, 4):
        trainer = ppo_trainer(batch_size=batch_size, ppo_epochs=4, minibatches=minibatches)
        metrics = trainer.iteration(1)
        results[batch_size] = weights(trainer.policy)
        ratios[batch_size] = {
            key: float(metrics[key]) for key in metrics if key.startswith(("val/", "policy/", "loss/"))
        }
    assert any((results[8][k] != weights(ppo_trainer().policy)[k]).any() for k in results[8])
    for batch_size in (1, 2, 4):
        assert_equal_weights(results[batch_size], results[8], atol=1e-6)
        assert ratios[batch_size] == pytest.approx(ratios[8], rel=1e-3, abs=1e-5)


def test_each_pass_takes_every_row_once_and_shuffles_anew(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer(ppo_epochs=3, minibatches=2, batch_size=3)
    seen, step = [], trainer.optimizer_step

    def watch(experience, advantages, returns, minibatch, norms):
        seen.append(np.concatenate(minibatch))
        return step(experience, advantages, returns, minibatch, norms)

    monkeypatch.setattr(trainer, "optimizer_step", watch)
    trainer.iteration(1)
    passes = [np.concatenate(seen[i : i + 2]) for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert len({tuple(sorted(rows[:4])) for rows in passes}) > 1


def test_later_passes_are_off_policy_and_clip(ppo_trainer) -> None:
    """With one update per rollout the ratio is identically 1 and no clip ever acts."""
    metrics = ppo_trainer(ppo_epochs=6, lr=2e-2, critic_lr=2e-2, global_batch_size=16).iteration(1)
    assert metrics["policy/approxkl_epoch1"] == 0 < metrics["policy/approxkl_epoch6"]
    assert metrics["policy/clipfrac"] > 0 and metrics["val/clipfrac"] > 0
    assert metrics["policy/ratio_var"] > 0 and metrics["policy/ratio_max"] > 1.2


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages
# ---------------------------------------------------------------------------------------------------------------------


def watch_update(trainer, monkeypatch) -> dict:
    """What the update of an iteration is given."""
    seen, update = {}, trainer.update

    def watch(experience, advantages, returns, plans):
        seen.update(experience=experience, advantages=advantages, returns=returns)
        return update(experience, advantages, returns, plans)

    monkeypatch.setattr(trainer, "update", watch)
    return seen


def token_rewards(experience, beta: float, penalty: float) -> torch.Tensor:
    """Row by row: -beta * (log pi - log pi_ref), and the score on the last token."""
    rewards = torch.zeros_like(experience.logp)
    for b, n in enumerate(experience.n.tolist()):
        rewards[b, :n] = -beta * (experience.logp[b, :n] - experience.logp_ref[b, :n])
        rewards[b, n - 1] += experience.scores[b] - penalty * (not bool(experience.ended[b]))
    return rewards


def naive_gae(rewards, values, n, gamma: float, lam: float) -> torch.Tensor:
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        following = 0.0
        for t in reversed(range(int(n[b]))):
            nxt = float(values[b, t + 1]) if t + 1 < n[b] else 0.0
            following = float(rewards[b, t]) + gamma * nxt - float(values[b, t]) + gamma * lam * following
            advantages[b, t] = following
    return advantages


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_and_returns_of_an_iteration(ppo_trainer, make_model, monkeypatch, whiten_rewards: bool) -> None:
    trainer = ppo_trainer(
        actor=make_model("actor", seed=5), reference=make_model("lm", seed=2), kl_coef=0.2, missing_eos_penalty=2.5,
        gamma=0.97, lam=0.9, global_batch_size=16, whiten_rewards=whiten_rewards,
    )  # fmt: skip
    seen = watch_update(trainer, monkeypatch)
    metrics = trainer.iteration(2)
    experience, rmask = seen["experience"], seen["experience"].rmask
    assert 0 < int(experience.ended.sum()) < 16
    rewards = token_rewards(experience, 0.2, 2.5)
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx(float(rewards.sum(1).mean()), abs=1e-4)
    if whiten_rewards:  # to unit variance, the mean stays
        mean, sd = rewards[rmask].mean(), rewards[rmask].std(correction=0)
        rewards = torch.where(rmask, (rewards - mean) / sd + mean, 0.0)
    advantages = naive_gae(rewards, experience.values, experience.n, 0.97, 0.9)
    torch.testing.assert_close(
        seen["returns"], torch.where(rmask, advantages + experience.values, 0.0), atol=1e-4, rtol=0
    )
    white = (advantages - masked_mean(advantages, rmask)) / masked_var(advantages, rmask).sqrt()
    torch.testing.assert_close(seen["advantages"], torch.where(rmask, white, 0.0), atol=1e-3, rtol=0)
    assert abs(float(masked_mean(seen["advantages"], rmask))) < 1e-5
    assert float(masked_var(seen["advantages"], rmask)) == pytest.approx(1, abs=1e-4)


def test_a_missing_eos_is_penalised_and_the_score_is_reported_without(ppo_trainer) -> None:
    free, fined = (ppo_trainer(missing_eos_penalty=p, kl_coef=0.0).iteration(1) for p in (0.0, 3.0))
    share = 1 - float(free["resp/eos_rate"])
    assert share > 0 and float(free["objective/score"]) == float(fined["objective/score"])
    difference = float(free["objective/rlhf_reward"]) - float(fined["objective/rlhf_reward"])
    assert difference == pytest.approx(3.0 * share, abs=1e-5)


def test_a_zero_head_gives_zero_values_and_returns_are_advantages(ppo_trainer, make_model, monkeypatch) -> None:
    critic = make_model("critic", std=0.1)
    torch.nn.init.zeros_(critic.head.weight)
    torch.nn.init.zeros_(critic.head.bias)
    trainer = ppo_trainer(
        critic=critic,
        reward_model=None,
        reward_fn=lambda prompts, responses: [float(len(r)) for r in responses],
        lam=1.0,
    )
    seen = watch_update(trainer, monkeypatch)
    metrics = trainer.iteration(1)
    experience = seen["experience"]
    assert experience.values.eq(0).all() and metrics["val/mean"] == 0
    rewards = token_rewards(experience, 0.1, 1.0)
    torch.testing.assert_close(seen["returns"], rewards.flip(1).cumsum(1).flip(1) * experience.rmask, atol=1e-5, rtol=0)


def test_the_adaptive_coefficient_follows_the_kl_of_the_iteration(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer(kl_target=0.5, kl_horizon=100, kl_coef=0.2, lr=2e-2, iterations=5, ppo_epochs=4)
    calls, adapt = [], trainers.adaptive_kl_coef
    monkeypatch.setattr(trainers, "adaptive_kl_coef", lambda *args: (calls.append(args), adapt(*args))[1])
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "objective/kl" in line]
    assert len(calls) == 5  # once an iteration, not per optimizer step
    beta = 0.2
    for line, call in zip(lines, calls):
        assert line["objective/kl_coef"] == pytest.approx(beta)  # the rewards of an iteration used the old one
        assert call[1] == pytest.approx(line["objective/kl"], rel=1e-5)
        beta *= 1 + min(max(line["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 100
    assert trainer.kl_coef == pytest.approx(beta)
    assert lines[0]["objective/kl"] == 0 and lines[1]["objective/kl_coef"] < 0.2
    assert max(line["objective/kl"] for line in lines) > 0.6 and any(
        b["objective/kl_coef"] > a["objective/kl_coef"] for a, b in zip(lines, lines[1:])
    )
    assert trainer.state()["kl_coef"] == trainer.kl_coef


def test_rewards_take_the_coefficient_of_their_iteration(ppo_trainer, make_model, monkeypatch) -> None:
    """Not the one of the command line: the figure objective/kl_coef would follow the KL, and the training would not."""
    trainer = ppo_trainer(
        actor=make_model("actor", seed=5), reference=make_model("lm", seed=2), kl_target=0.5, kl_horizon=40, lam=1.0,
    )  # fmt: skip
    seen, betas = watch_update(trainer, monkeypatch), []
    for update in (2, 3, 4):
        betas.append(trainer.kl_coef)
        metrics = trainer.iteration(update)
        experience = seen["experience"]
        rewards = token_rewards(experience, betas[-1], 1.0)
        to_go = rewards.flip(1).cumsum(1).flip(1) * experience.rmask  # the returns, with gamma = lam = 1
        torch.testing.assert_close(seen["returns"], to_go, atol=1e-4, rtol=0)
        assert float(metrics["objective/rlhf_reward"]) == pytest.approx(float(rewards.sum(1).mean()), abs=1e-4)
    assert betas[0] == trainer.config.kl_coef and len(set(betas)) == 3


class OneOfTwo(Runtime):
    """One process of two whose other one has the same rows: sums over both are twice its own."""

    def __init__(self) -> None:
        super().__init__("cpu", "fp32", 0)
        self.world_size = 2

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    def max_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return value


def test_the_coefficient_counts_the_episodes_of_all_processes_and_their_mean_kl(ppo_trainer, make_model) -> None:
    models = dict(actor=make_model("actor", seed=5), reference=make_model("lm", seed=2))
    kl = float(ppo_trainer(**models).iteration(2)["objective/kl"])
    target = kl / 1.1  # within what is not cut off, where a KL of one process, or of their sum, would show
    for processes, runtime in ((1, Runtime("cpu", "fp32", 0)), (2, OneOfTwo())):
        models = dict(actor=make_model("actor", seed=5), reference=make_model("lm", seed=2))
        trainer = ppo_trainer(**models, kl_target=target, kl_horizon=100, kl_coef=0.2, on=runtime)
        assert float(trainer.iteration(2)["objective/kl"]) == pytest.approx(kl)
        assert trainer.kl_coef == pytest.approx(0.2 * (1 + 0.1 * 8 * processes / 100), rel=1e-5)


def test_the_coefficient_is_fixed_by_default(ppo_trainer) -> None:
    trainer = ppo_trainer(iterations=2)
    trainer.fit()
    assert trainer.kl_coef == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_every_rollout_draws_anew_and_every_evaluation_the_same(ppo_trainer, monkeypatch) -> None:
    """A policy that stands still says other things to the same prompts; held-out figures can be told apart by it."""
    trainer = ppo_trainer(train=prompt_examples(8), iterations=4, critic_warmup=4, eval_every=2)
    drawn, sample = [], trainer.rollouts.sample

    def watch(prompts, seeds):
        experience = sample(prompts, seeds)
        said = {tuple(p): tuple(r) for p, r in zip(experience.prompts(), experience.responses())}
        drawn.append((said, list(seeds)))
        return experience

    monkeypatch.setattr(trainer.rollouts, "sample", watch)
    trainer.fit()
    evaluations, rollouts = [drawn[0], drawn[3], drawn[6]], [drawn[i] for i in (1, 2, 4, 5)]
    assert len(drawn) == 7 and evaluations[0] == evaluations[1] == evaluations[2]
    assert len({prompt for said, _ in rollouts for prompt in said}) == 8  # all four on the same prompts
    seeds = [seed for _, row_seeds in [*rollouts, evaluations[0]] for seed in row_seeds]
    assert len(set(seeds)) == len(seeds) == 4 * 8 + 6
    for prompt in rollouts[0][0]:
        assert len({said[prompt] for said, _ in rollouts}) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def test_learning_rates_fall_linearly_to_zero(ppo_trainer) -> None:
    """3e-6 and U = 4 give 3e-6, 2.25e-6, 1.5e-6, 7.5e-7."""
    trainer = ppo_trainer(lr=3e-6, critic_lr=1e-5, iterations=4, minibatches=2)
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "lr/actor" in line]
    assert [line["lr/actor"] for line in lines] == pytest.approx([3e-6, 2.25e-6, 1.5e-6, 7.5e-7])
    assert [line["lr/critic"] for line in lines] == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6])


def test_both_rates_can_be_warmed_up(ppo_trainer) -> None:
    trainer = ppo_trainer(lr=1.0e-5, critic_lr=1e-5, iterations=4, warmup_iterations=2)
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "lr/actor" in line]
    assert [line["lr/actor"] for line in lines] == pytest.approx([0.5e-5, 0.75e-5, 0.5e-5, 0.25e-5])


def test_critic_warmup_leaves_every_bit_of_the_actor(ppo_trainer) -> None:
    trainer = ppo_trainer(critic_warmup=2, iterations=3, weight_decay=0.1)
    models = ppo_models(trainer)
    before, critic_before = weights_digest(models.actor), weights_digest(models.critic)
    hashes = []
    iteration = trainer.iteration
    trainer.iteration = lambda update: (iteration(update), hashes.append(weights_digest(models.actor)))[0]
    trainer.fit()
    assert hashes[0] == hashes[1] == before != hashes[2]
    assert weights_digest(models.critic) != critic_before
    lines = [line for line in read_metrics(trainer.run) if "lr/actor" in line]
    assert [line["update_ratio/actor"] > 0 for line in lines] == [False, False, True]
    assert [line["objective/kl"] for line in lines] == [0, 0, 0]


def test_kl_stop_ends_the_passes(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer(kl_stop=1e-4, lr=1e-2, ppo_epochs=6)
    steps = count_steps(trainer, monkeypatch)
    metrics = trainer.iteration(1)
    # The first pass is at ratio 1; the second sees what the first step did, and is the last.
    assert len(steps) == 2 == metrics["train/optimizer_steps"]
    assert metrics["policy/approxkl_epoch2"] > 1.5e-4 and "policy/approxkl_epoch3" not in metrics
    assert metrics["policy/kl_stopped"] == 1

    within = ppo_trainer(kl_stop=1e-4, lr=1e-2, ppo_epochs=6, minibatches=4)
    steps = count_steps(within, monkeypatch)
    metrics = within.iteration(1)
    assert 2 <= len(steps) < 6 and metrics["policy/kl_stopped"] == 1  # in the middle of a pass, too

    calm = ppo_trainer(kl_stop=1e3, lr=1e-2, ppo_epochs=6).iteration(1)
    assert calm["train/optimizer_steps"] == 6 and calm["policy/kl_stopped"] == 0


def test_actor_and_critic_are_clipped_apart(ppo_trainer, monkeypatch) -> None:
    trainer = ppo_trainer(max_grad_norm=0.05, vf_coef=1.0, ppo_epochs=1)
    models, seen, inner = ppo_models(trainer), {}, trainer.optimizer.optimizer

    def keep(*args, **kwargs):
        for name, model in (("actor", models.actor), ("critic", models.critic)):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen[name] = float(torch.stack([g.norm() for g in grads]).norm())

    monkeypatch.setattr(inner, "step", keep)
    metrics = trainer.iteration(1)
    for name in ("actor", "critic"):
        assert float(metrics[f"grad_norm/{name}"]) > 0.05 == pytest.approx(seen[name], rel=1e-3)


def test_the_value_coefficient_is_almost_nothing_to_separate_networks(ppo_trainer) -> None:
    """With Adam and eps -> 0 the critic's steps do not depend on vf_coef, and the actor's never do."""
    results = []
    for vf_coef in (0.1, 1.0):
        trainer = ppo_trainer(vf_coef=vf_coef, max_grad_norm=1e9, ppo_epochs=2)
        for group in trainer.optimizer.param_groups:
            group["eps"] = 1e-30
        trainer.iteration(1)
        results.append({n: t for n, t in weights(ppo_models(trainer).critic).items() if "c_attn.bias" not in n})
        results.append(weights(ppo_models(trainer).actor))
    assert_equal_weights(results[0], results[2], atol=2e-5)
    assert_equal_weights(results[1], results[3])


# ---------------------------------------------------------------------------------------------------------------------
# Frozen models, LoRA
# ---------------------------------------------------------------------------------------------------------------------


def test_frozen_models_have_no_gradient_and_do_not_change(ppo_trainer) -> None:
    trainer = ppo_trainer(iterations=2)
    models = ppo_models(trainer)
    before = {name: weights_digest(getattr(models, name)) for name in ("reference", "reward_model")}
    trainer.fit()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, value in before.items():
        model = getattr(models, name)
        assert weights_digest(model) == value and not model.training
        assert all(not p.requires_grad and p.grad is None and id(p) not in held for p in model.parameters())


@pytest.mark.parametrize("lora_reward", [True, False])
def test_lora_roles_share_a_base_that_no_step_changes(ppo_trainer, make_model, lora_reward: bool) -> None:
    reference = make_model("lm", std=0.1)
    base = weights(reference)

    def role(name: str, rank: int, seed: int):
        """The base with adapters: fresh ones for the actor, trained ones for reward model and critic."""
        model = make_model(name, seed=seed, lora_rank=rank, std=0.1)
        model.load_state_dict(base, strict=False)
        if name == "actor":
            [torch.nn.init.zeros_(p) for name, p in model.named_parameters() if name.endswith("lora_B")]
        return model

    actor, critic = role("actor", 2, 1), role("critic", 2, 3)
    reward_model = role("reward", 2, 3) if lora_reward else make_model("reward", seed=3, std=0.1)
    if lora_reward:
        critic.load_state_dict(reward_model.state_dict())  # starts as a copy of the reward adapter and head
    for model in (actor, critic):
        freeze_weights(model, "lora")
    for model in (reference, reward_model):
        model.requires_grad_(False)
    assert share_base([reference, actor, critic, reward_model]) > 0
    trainer = ppo_trainer(actor, critic, reference, reward_model, iterations=3, lr=1e-2, critic_lr=1e-2)
    models = ppo_models(trainer)
    shared = models.reference.token_table
    assert models.actor.token_table is shared is models.critic.token_table
    assert models.actor.output_table is models.reference.output_table
    assert (models.reward_model.token_table is shared) == lora_reward

    ids, att = torch.tensor([[3, 4, 5, 6, EOS]]), torch.ones(1, 5, dtype=torch.bool)
    probe = torch.no_grad()(lambda: (models.reference(ids, att), models.reward_model(ids, att)))
    before, adapters = probe(), weights(models.actor)
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, probe()))
    for name, tensor in weights(models.reference).items():
        assert torch.equal(tensor, base[name]), name
    for model in (models.actor, models.critic):
        for name, tensor in model.state_dict().items():
            if name in base:
                assert torch.equal(tensor, base[name]), name
    moved = {name for name, tensor in weights(models.actor).items() if not torch.equal(tensor, adapters[name])}
    assert moved and all(is_adapter(name) for name in moved)
    with torch.no_grad():  # and the adapters do something
        assert not torch.equal(models.actor(ids, att), models.reference(ids, att))
    lines = [line for line in read_metrics(trainer.run) if "objective/kl" in line]
    assert lines[0]["objective/kl"] == 0 and lines[-1]["objective/kl_k3"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, the whole
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluations_repeat_themselves_and_disturb_nothing(ppo_trainer) -> None:
    finals = []
    for eval_every in (1, 100):
        trainer = ppo_trainer(iterations=3, eval_every=eval_every)
        trainer.fit()
        finals.append(weights(trainer.policy))
    assert_equal_weights(*finals)
    trainer.evaluate()
    lines = [line for line in read_metrics(trainer.run) if "eval/kl" in line]
    assert [line["step"] for line in lines] == [0, 3, 3]
    for key in ("eval/score", "eval/kl", "eval/rlhf_reward", "eval/len_mean"):
        assert lines[1][key] == lines[2][key]


@GPT2_ALONE  # whose policy ends some of these answers
def test_samples_show_where_the_policy_moved(ppo_trainer, make_model, tokenizer) -> None:
    trainer = ppo_trainer(actor=make_model("actor", seed=5), reference=make_model("lm", seed=2), eval_examples=10)
    trainer.evaluate()
    rows = [json.loads(row) for row in (trainer.run / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    prompts = [tokenizer.decode(p) for p in prompt_examples(10, seed=9)]
    (line,) = read_metrics(trainer.run)
    for row, prompt in zip(rows, prompts):
        assert set(row) == {"step", "prompt", "response", "score", "kl", "tokens", "top_kl_tokens"}
        assert row["prompt"] == prompt and 1 <= row["tokens"] <= 8
        nats = [float(entry.rsplit(" ", 1)[1]) for entry in row["top_kl_tokens"]]
        assert nats == sorted(nats, reverse=True) and len(nats) == min(3, row["tokens"])
        if row["tokens"] <= 3:
            assert sum(nats) == pytest.approx(row["kl"], abs=0.02)
    assert any("EOS" in entry for row in rows for entry in row["top_kl_tokens"])
    assert math.isfinite(line["eval/kl"])


def test_the_best_policy_by_penalised_reward_is_kept(ppo_trainer) -> None:
    trainer = ppo_trainer(iterations=5, eval_every=1, lr=5e-3, eval_examples=10)
    trainer.fit()
    rewards = {line["step"]: line["eval/rlhf_reward"] for line in read_metrics(trainer.run) if "eval/kl" in line}
    best = max((step for step in rewards if step), key=rewards.get)
    kept = describe(trainer.run / "best")
    assert (kept["step"], kept["eval/rlhf_reward"]) == (best, rewards[best])
    assert_equal_weights(weights(load_checkpoint(trainer.run / "final", "actor")), weights(ppo_models(trainer).actor))
    assert_equal_weights(
        weights(load_checkpoint(trainer.run / "final" / "critic", "critic")), weights(ppo_models(trainer).critic)
    )


def test_fewer_prompts_than_a_rollout(ppo_trainer) -> None:
    trainer = ppo_trainer(train=prompt_examples(3), iterations=2)
    assert trainer.fit() == 0 and all(
        line["train/optimizer_steps"] == 2 for line in read_metrics(trainer.run) if "objective/kl" in line
    )


@GPT2_ALONE
@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_toy_learns_to_say_a_letter(ppo_trainer, make_model, lora_rank: int) -> None:
    """Reward: how often "A" (id 17) is said. The score must rise clearly while the KL stays finite."""
    reference = make_model("lm", std=0.1, n_embd=32)
    actor = make_model("actor", std=0.02, n_embd=32, lora_rank=lora_rank)
    actor.load_state_dict(reference.state_dict(), strict=False)
    critic = make_model("critic", std=0.1, n_embd=32)
    torch.nn.init.zeros_(critic.head.weight)
    torch.nn.init.zeros_(critic.head.bias)
    if lora_rank:
        freeze_weights(actor, "lora")
        [torch.nn.init.zeros_(p) for name, p in actor.named_parameters() if name.endswith("lora_B")]
    trainer = ppo_trainer(
        actor, critic, reference, None, lambda prompts, responses: [float(r.count("A")) for r in responses],
        iterations=14, global_batch_size=64, batch_size=64, lr=1e-2 if lora_rank else 5e-3, critic_lr=5e-3,
        temperature=1.0, kl_coef=0.02, response_length=6, ppo_epochs=4, eval_examples=10, eval_every=100,
        missing_eos_penalty=0.0,
    )  # fmt: skip
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "objective/kl" in line]
    scores = [line["objective/score"] for line in lines]
    assert scores[0] < 0.3 and np.mean(scores[-3:]) > 1.2, scores
    kl = [line["objective/kl"] for line in lines]
    assert kl[0] == 0 and all(math.isfinite(x) for x in kl) and 0.5 < kl[-1] < 30
    assert lines[-1]["val/explained_var"] > lines[0]["val/explained_var"]
