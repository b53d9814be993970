"""Numbers that are not finite, injected in every stage: the run stops with a report, or goes on without the batch."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from setups import (
    assert_equal_weights,
    ppo_models,
    prompt_examples,
    ranked_examples,
    read_metrics,
    sft_examples,
    weights,
)

from config.user_error import RunStopped, UserError, run_main
from training import loop, trainers
from training.engine import nonfinite
from training.engine.runtime import Overflow
from utils.reward_function import load_reward_function

pytestmark = pytest.mark.slow

STEADY = dict(min_lr_ratio=1.0, eval_every=100, save_every=100, log_every=1)


class PoisonGradient(torch.autograd.Function):
    """The identity, with NaN as its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def poison(x: torch.Tensor, where: str) -> torch.Tensor:
    return PoisonGradient.apply(x) if where == "gradient" else x * math.nan


def make(stage: str, sft_trainer, rm_trainer, row: int, where: str, **settings):
    """A trainer of SFT or the reward model in which the loss or the gradient of one row is NaN."""
    if stage == "sft":
        trainer = sft_trainer(train=sft_examples(24), **STEADY, **settings)
        clean, marked = trainer.token_loss_sum, trainer.train[row].response_ids.tolist()

        def loss_sum(batch):
            loss = clean(batch)
            there = any(ids[p:n].tolist() == marked for ids, p, n in zip(batch.ids, batch.prompt_len, batch.length))
            return poison(loss, where) if there else loss

        trainer.token_loss_sum = loss_sum
    else:
        trainer = rm_trainer(train=ranked_examples(24), **STEADY, **settings)
        clean_scores, marked = trainer.scores, trainer.train[row].response_ids[0].tolist()

        def scores(batch):
            found, mask = clean_scores(batch)
            rows = batch.rows
            there = any(i[p:n].tolist() == marked for i, p, n in zip(rows.ids, rows.prompt_len, rows.length))
            return (poison(found, where) if there else found), mask

        trainer.scores = scores
    return trainer


def step_of(trainer, row: int) -> int:
    """The step of the first epoch that trains on a row, counted from 1."""
    order = loop.data_order(trainer.train.lengths, trainer.config, 0, trainer.total_steps)
    return next(step for step, rows in enumerate(order, 1) if row in rows)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_broken_row_stops_the_run_and_is_named(sft_trainer, rm_trainer, stage: str, where: str) -> None:
    trainer = make(stage, sft_trainer, rm_trainer, row=7, where=where)
    step = step_of(trainer, 7)
    seen = {}
    original = trainer.runtime.discard

    def discard(optimizer):
        seen.update(weights(trainer.model))
        original(optimizer)

    trainer.runtime.discard = discard
    with pytest.raises(RunStopped) as error:
        trainer.fit()
    message, file = str(error.value), trainer.run / f"nonfinite_step_{step:08d}.json"
    tensor = "the loss" if where == "loss" else "the gradient of "
    assert message.startswith(f"step {step}: {tensor}") and " is not finite in row 7; no step was taken" in message
    assert str(file) in message and "no checkpoint has been saved yet" in message and "--on-nonfinite skip" in message
    assert_equal_weights(weights(trainer.model), seen)
    assert trainer.step == step - 1

    record = json.loads(file.read_text())
    row = record["rows"][0]
    assert (record["stage"], record["step"], [r["row"] for r in record["rows"]]) == (stage, step, [7])
    example = trainer.train[7]
    pair = (
        (example.prompt_ids, example.response_ids)
        if stage == "sft"
        else (example.prompt_ids[0], example.response_ids[0])
    )
    assert row["sequences"][0]["ids"] == [*pair[0].tolist(), *pair[1].tolist()]
    assert row["sequences"][0]["prompt"] == trainer.tokenizer.decode(pair[0].tolist())
    assert row["sequences"][0]["response"] == trainer.tokenizer.decode(pair[1].tolist())
    assert (row["values"]["loss"] == "nan") == (where == "loss")
    tensors = load_file(file.with_suffix(".safetensors"))
    assert tensors["row"].tolist() == [7] and tensors["prompt_tokens"][0] == len(pair[0])
    assert tensors["ids"][0][: len(pair[0])].tolist() == pair[0].tolist()
    assert bool(tensors["values.loss"].isnan().all()) == (where == "loss")


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_skipped_batch_might_as_well_not_be_there(sft_trainer, rm_trainer, stage, where, monkeypatch) -> None:
    """With a constant learning rate the run has the bits of one on the data without that batch."""
    skipping = make(stage, sft_trainer, rm_trainer, row=12, where=where, on_nonfinite="skip", epochs=1)
    step = step_of(skipping, 12)  # not the last one
    assert skipping.fit() == 0
    lines = [line for line in read_metrics(skipping.run) if "train/loss" in line]
    assert [line["train/skipped"] for line in lines] == [int(line["step"] >= step) for line in lines]
    assert lines[step - 1]["train/grad_norm"] is None and (lines[step - 1]["train/loss"] is None) == (where == "loss")
    assert (skipping.run / f"nonfinite_step_{step:08d}.json").is_file()
    assert skipping.state()["nonfinite"] == {"skipped": 1, "in_a_row": 0}

    whole = loop.data_order

    def without(lengths, config, start, stop):
        return (rows for rows in whole(lengths, config, start, stop) if 12 not in rows)

    monkeypatch.setattr(loop, "data_order", without)
    other = make(stage, sft_trainer, rm_trainer, row=12, where=where, epochs=1)
    assert other.fit() == 0
    assert_equal_weights(weights(skipping.model), weights(other.model))
    for key, value in skipping.optimizer.state_dict()["state"].items():
        for name in value:
            assert torch.equal(value[name], other.optimizer.state_dict()["state"][key][name])


def test_counts_go_on_after_a_resume(sft_trainer) -> None:
    trainer = sft_trainer(**STEADY)
    state = trainer.state() | {"nonfinite": {"skipped": 4, "in_a_row": 2}}
    assert sft_trainer(state=state, on_nonfinite="skip").guard.metrics() == {"train/skipped": 4}


def test_a_run_that_skips_everything_is_stopped(sft_trainer, monkeypatch) -> None:
    monkeypatch.setattr(nonfinite, "_MOST_IN_A_ROW", 3)
    trainer = sft_trainer(on_nonfinite="skip", **STEADY, epochs=3)
    clean = trainer.token_loss_sum
    trainer.token_loss_sum = lambda batch: clean(batch) * (math.nan if trainer.model.training else 1.0)
    with pytest.raises(RunStopped, match="step 3: .* 3 batches in a row were skipped"):
        trainer.fit()


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_held_out_loss_that_is_not_finite(sft_trainer, rm_trainer, stage, capsys) -> None:
    for choice in ("stop", "skip"):
        settings = STEADY | dict(eval_every=1, on_nonfinite=choice, max_steps=2)
        trainer = (sft_trainer if stage == "sft" else rm_trainer)(**settings)
        # From the first step on the model answers NaN where it is evaluated.
        trainer.runtime.unwrap(trainer.model).register_forward_hook(
            lambda module, args, out, t=trainer: out * math.nan if t.step and not module.training else out
        )
        if choice == "stop":
            with pytest.raises(
                RunStopped,
                match="step 1: the held-out loss is not finite in rows 0, 1, .* and 2 more of the held-out data. ",
            ):
                trainer.evaluate() if trainer.fit() else None
        elif stage == "sft":
            trainer.sample = dict
            assert trainer.fit() == 0 and not (trainer.run / "best").exists()
            assert [x["eval/loss"] for x in read_metrics(trainer.run) if "eval/loss" in x][1:] == [None, None]


# ---------------------------------------------------------------------------------------------------------------------
# PPO
# ---------------------------------------------------------------------------------------------------------------------


def break_reference(trainer, iteration: int) -> None:
    """NaN states of the reference for one prompt, in the rollout of one iteration."""
    marked = trainer.train[loop.prompt_order(20, 8, 0, iteration)[5]].tolist()

    def hook(module, args, out):
        ids = args[0]
        there = any(row[: len(marked)].tolist() == marked for row in ids)
        return out * math.nan if there and trainer.step == iteration - 1 and trainer.policy.training else out

    trainer.rollouts.reference.trunk.register_forward_hook(hook)


def break_loss(trainer, iteration: int, monkeypatch) -> None:
    clean = trainers.value_loss

    def broken(*args):
        found = clean(*args)
        if trainer.step == iteration - 1:
            found = type(found)(found.loss * math.nan, found.stats)
        return found

    monkeypatch.setattr(trainers, "value_loss", broken)


def break_gradient(trainer, iteration: int) -> None:
    parameter = trainer.parameters["critic"][0]
    parameter.register_hook(lambda g: g * math.nan if trainer.step == iteration - 1 else g)


def break_sampler(trainer, iteration: int) -> None:
    sample = trainer.rollouts.sample

    def broken(prompts, seeds):
        experience = sample(prompts, seeds)
        if trainer.step == iteration - 1:
            experience.sampler_logp[5] = math.nan
        return experience

    trainer.rollouts.sample = broken


def inject(trainer, what: str, iteration: int, monkeypatch) -> None:
    if what == "logp_ref":
        break_reference(trainer, iteration)
    elif what == "sampler_logp":
        break_sampler(trainer, iteration)
    elif what == "loss":
        break_loss(trainer, iteration, monkeypatch)
    else:
        break_gradient(trainer, iteration)


@pytest.mark.parametrize(
    "what,tensor",
    [
        ("sampler_logp", "the sampler's log-probability"),
        ("logp_ref", "the reference's log-probability"),
        ("loss", "the loss"),
        ("gradient", "the gradient of critic."),
    ],
)
def test_ppo_stops_before_the_step(ppo_trainer, what, tensor, monkeypatch) -> None:
    trainer = ppo_trainer(save_every=1, batch_size=1)
    inject(trainer, what, 2, monkeypatch)
    with pytest.raises(RunStopped) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith(f"step 2: {tensor}") and "not finite in row" in message
    assert f"the last good checkpoint is {trainer.run / 'checkpoints' / 'step_00000001'}" in message
    saved = load_file(trainer.run / "checkpoints" / "step_00000001" / "model.safetensors")
    assert_equal_weights(weights(ppo_models(trainer).actor), saved)
    rows = loop.prompt_order(20, 8, 0, 2)
    record = json.loads((trainer.run / "nonfinite_step_00000002.json").read_text())
    named = [r["row"] for r in record["rows"]]
    assert set(named) <= set(rows.tolist())
    if what in ("sampler_logp", "logp_ref"):
        assert named == [rows[5]] and "nan" in record["rows"][0]["values"][what]
        assert all(math.isfinite(x) for x in record["rows"][0]["values"]["logp"])
    for row in record["rows"]:
        (sequence,) = row["sequences"]
        assert sequence["ids"][: sequence["prompt_tokens"]] == trainer.train[row["row"]].tolist()


@pytest.mark.parametrize("what", ["logp_ref", "loss", "gradient"])
def test_ppo_skips_the_rollout(ppo_trainer, what, monkeypatch) -> None:
    """The run has the bits of one that never made that iteration's update."""
    skipping = ppo_trainer(on_nonfinite="skip", kl_target=0.5, batch_size=4)
    with monkeypatch.context() as patch:
        inject(skipping, what, 2, patch)
        assert skipping.fit() == 0
    lines = [line for line in read_metrics(skipping.run) if "train/skipped" in line]
    assert [line["train/skipped"] for line in lines] == [0, 1, 1, 1]
    assert ("objective/kl" in lines[1]) == (what != "logp_ref") and "loss/policy" not in lines[1]

    other = ppo_trainer(kl_target=0.5, batch_size=4)
    if what == "logp_ref":
        iteration = other.iteration
        other.iteration = lambda update: {} if update == 2 else iteration(update)
    else:
        update = other.update
        other.update = lambda *args: {} if other.step == 1 else update(*args)
    assert other.fit() == 0
    assert_equal_weights(weights(skipping.policy), weights(other.policy))
    assert skipping.kl_coef == other.kl_coef


def test_a_reward_function_that_gives_nan_is_the_users(ppo_trainer, tmp_path, capsys) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def f(p, r):\n    f.n += 1\n    return [1.0] * (len(r) - 1) + [float('nan') if f.n == 3 else 2.0]\nf.n = 0\n"
    )
    for choice in ("stop", "skip"):
        function = load_reward_function(f"{file}:f", "--reward-fn")
        trainer = ppo_trainer(reward_model=None, reward_fn=function, on_nonfinite=choice, eval_every=100, save_every=1)
        row = loop.prompt_order(20, 8, 0, 2)[-1]
        if choice == "stop":  # the evaluation before the first step calls it once
            with pytest.raises(UserError) as error:
                trainer.fit()
            assert f"{file}:f: gave nan for " in str(error.value) and f"(step 2, row {row})" in str(error.value)
            assert "step_00000001" in str(error.value) and "nonfinite_step_00000002.json" in str(error.value)
            assert json.loads((trainer.run / "nonfinite_step_00000002.json").read_text())["tensor"] == "the reward"
        else:
            assert trainer.fit() == 0
            assert trainer.guard.skipped == 1


def test_a_reward_that_is_not_finite_at_an_evaluation(ppo_trainer) -> None:
    def reward(prompts, responses):
        return [math.inf if len(prompts) == 6 else 1.0] * len(prompts)

    with pytest.raises(RunStopped, match="step 0: the reward is not finite in rows 0, 1, 2, 3, 4, 5 of the held"):
        ppo_trainer(reward_model=None, reward_fn=reward).fit()
    trainer = ppo_trainer(reward_model=None, reward_fn=reward, on_nonfinite="skip", eval_every=2)
    assert trainer.fit() == 0 and trainer.guard.skipped == 0
    assert not (trainer.run / "best").exists()


def test_max_kl_stops_before_the_update(ppo_trainer) -> None:
    free = ppo_trainer(lr=0.05, save_every=1)
    free.fit()
    kl = [line["objective/kl"] for line in read_metrics(free.run) if "objective/kl" in line]
    assert kl[0] == 0 < kl[1]
    trainer = ppo_trainer(lr=0.05, save_every=1, max_kl=kl[1] / 2)
    with pytest.raises(RunStopped) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith(f"step 2: the KL to the reference is {kl[1]:.3g} nats per response, above --max-kl")
    assert f"the last good checkpoint is {trainer.run / 'checkpoints' / 'step_00000001'}" in message
    saved = load_file(trainer.run / "checkpoints" / "step_00000001" / "model.safetensors")
    assert_equal_weights(weights(ppo_models(trainer).actor), saved)
    record = json.loads((trainer.run / "kl_step_00000002.json").read_text())
    found = [r["values"]["kl"] for r in record["rows"]]
    assert found == sorted(found, reverse=True) and np.mean(found) == pytest.approx(kl[1], rel=1e-5)
    assert ppo_trainer(lr=0.05, max_kl=max(kl) * 1.01).fit() == 0


# ---------------------------------------------------------------------------------------------------------------------
# The door to the optimizer, and the way out
# ---------------------------------------------------------------------------------------------------------------------


class Scaler:
    """What Accelerate asks of a loss scaler."""

    def __init__(self, scale: float) -> None:
        self.scale, self.updates = scale, 0

    def get_scale(self) -> float:
        return self.scale

    def update(self) -> None:
        self.updates += 1


def test_an_overflow_under_loss_scaling_is_normal(runtime, monkeypatch) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    monkeypatch.setattr(runtime.accelerator, "unscale_gradients", lambda optimizer: None)

    def step(scale: float, loss: float) -> None:
        monkeypatch.setattr(runtime.accelerator, "scaler", Scaler(scale))
        p.grad = torch.full_like(p, math.inf)
        runtime.step(optimizer, {"model": [p]}, 1.0, torch.tensor(loss))

    with pytest.raises(Overflow):  # the scaler would skip the step of the real optimizer
        step(65536.0, 1.0)
    with pytest.raises(FloatingPointError, match="the gradient of model"):
        step(1.0, 1.0)  # there is no scale left to lower
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        step(65536.0, math.nan)
    runtime.discard(optimizer)
    assert p.grad is None and runtime.accelerator.scaler.updates == 1


def test_a_stopped_run_is_one_line_and_exit_code_1(capsys) -> None:
    def main() -> None:
        raise RunStopped("step 3: the loss is not finite\nin row 7")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: step 3: the loss is not finite in row 7\n"


def test_prompts_of_ppo_are_named_by_their_place_in_the_data(ppo_trainer) -> None:
    """Where a batch is larger than the data a prompt stands in it twice; each place is a row of its own."""
    trainer = ppo_trainer(train=prompt_examples(5), on_nonfinite="skip", iterations=1)
    break_gradient(trainer, 1)
    assert trainer.fit() == 0
    record = json.loads((trainer.run / "nonfinite_step_00000001.json").read_text())
    assert sorted(r["row"] for r in record["rows"]) == sorted(loop.prompt_order(5, 8, 0, 1).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Overflows under loss scaling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scaling(runtime, monkeypatch):
    """`scaling(scale)`: torch's own loss scaling on this machine's CPU; returns the scaler."""

    def start(scale: float = 256.0, growth_interval: int = 2000) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
        monkeypatch.setattr(runtime.accelerator, "scaler", scaler)
        monkeypatch.setattr(runtime.accelerator, "unscale_gradients", lambda o: scaler.unscale_(o.optimizer))
        return scaler

    return start


def make_stage(stage: str, request, **settings):
    """A trainer of any stage with a schedule that moves, and with checkpoints and evaluations on the way."""
    cadence = dict(eval_every=2, save_every=2, eval_examples=4)
    if stage == "ppo":
        return request.getfixturevalue("ppo_trainer")(kl_target=0.5, minibatches=2, **cadence, **settings)
    sizes = dict(global_batch_size=7, epochs=2, log_every=1, warmup_steps=2)
    return request.getfixturevalue(f"{stage}_trainer")(**sizes, **cadence, **settings)


def overflow(trainer, scaler: torch.amp.GradScaler, limits: dict[int, float]) -> None:
    """Gradients of the steps (PPO: iterations) in `limits` are infinite while the scale is above the limit."""
    parameter = trainer.parameters["critic"][0] if "critic" in trainer.parameters else trainer.parameters["model"][-1]
    parameter.register_hook(
        lambda g: g + math.inf if scaler.get_scale() > limits.get(trainer.step + 1, math.inf) else g
    )


def told(trainer) -> list[dict]:
    """What the run logged, without times and the count of overflows."""
    lines = read_metrics(trainer.run)
    return [{k: v for k, v in x.items() if not k.startswith("time") and k != "train/overflows"} for x in lines]


STAGES = ["sft", "rm", "ppo"]
OVERFLOWS = [({1: 128.0}, 1), ({1: 64.0, 3: 16.0, 4: 16.0}, 4), ({2: 1.0}, 8)]


@pytest.mark.parametrize("limits,count", OVERFLOWS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_costs_no_step_no_schedule_and_no_row(stage, limits, count, request, scaling) -> None:
    """The run has the bits and the figures of one that had started at the scale which fits."""
    scaling()
    calm = make_stage(stage, request)
    assert calm.fit() == 0
    scaler = scaling()
    trainer = make_stage(stage, request)
    overflow(trainer, scaler, limits)
    assert trainer.fit() == 0
    assert_equal_weights(*(weights(t.policy if stage == "ppo" else t.model) for t in (trainer, calm)))
    assert told(trainer) == told(calm) and trainer.step == calm.step
    assert trainer.guard.overflows == count and scaler.get_scale() == 256 / 2**count
    assert [x["train/overflows"] for x in read_metrics(trainer.run) if "train/overflows" in x][-1] == count
    assert not any("train/overflows" in line for line in read_metrics(calm.run))
    counted = {int(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()}
    steps = [line.get("train/optimizer_steps", "train/loss" in line) for line in told(trainer)]
    assert counted == {sum(map(int, steps))}  # as many as were told, and none twice


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_between_overflows_is_exact(stage, request, scaling) -> None:
    limits = {1: 64.0, 2: 16.0, 3: 8.0}
    scaler = scaling(growth_interval=3)  # the scale also grows on the way
    whole = make_stage(stage, request)
    overflow(whole, scaler, limits)
    states, held, save = {}, {}, whole.saver.save_step
    model = whole.policy if stage == "ppo" else whole.model

    def keep(step, state):
        states[step], held[step] = copy.deepcopy(state), weights(model)
        return save(step, state)

    whole.saver.save_step = keep
    assert whole.fit() == 0
    end = weights(model), scaler.state_dict(), whole.guard.state()

    scaler = scaling(growth_interval=3)
    again = make_stage(stage, request, state=states[2])
    other = again.policy if stage == "ppo" else again.model
    other.load_state_dict(held[2])
    overflow(again, scaler, limits)
    assert again.guard.overflows == states[2]["overflows"] > 0 and again.step == 2
    assert again.fit() == 0
    assert_equal_weights(weights(other), end[0])
    assert (scaler.state_dict(), again.guard.state()) == end[1:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_that_collapses_ends_the_run_with_a_remedy(stage, request, scaling) -> None:
    scaler = scaling()
    trainer = make_stage(stage, request)
    overflow(trainer, scaler, {2: 0.0})
    with pytest.raises(RunStopped) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith("step 2: the gradient of ") and " at a loss scale of 1 is not finite in row" in message
    assert "no step was taken" in message and "--dtype fp32" in message and "--on-nonfinite skip" in message
    assert trainer.step == 1 and trainer.guard.overflows == 8


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_no_scale_helps_leaves_the_scale_to_the_others(stage, request, scaling) -> None:
    scaler = scaling()
    trainer = make_stage(stage, request, on_nonfinite="skip")
    overflow(trainer, scaler, {2: 0.0})
    assert trainer.fit() == 0
    assert (trainer.guard.skipped, trainer.guard.overflows, scaler.get_scale()) == (1, 8, 256.0)


def test_a_norm_that_fp32_does_not_hold_is_no_overflow_of_the_scaling(sft_trainer, scaling) -> None:
    scaling(2.0)
    trainer = sft_trainer(batch_size=8, **STEADY)
    trainer.parameters["model"][-1].register_hook(lambda g: torch.full_like(g, 3e38))  # finite, their norm is not
    with pytest.raises(RunStopped, match="step 1: the norm of the gradients is above what fp32 holds.*Lower --lr"):
        trainer.fit()
