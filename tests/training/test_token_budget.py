"""--tokens-per-micro-batch: the same step whatever the budget, no row twice or never, no waiting for the device."""

import numpy as np
import pytest
import torch
from setups import assert_equal_weights, ranked_examples, sft_examples, weights
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.slow

BUDGETS = [1, 25, 60, 100_000]


class Waits(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors of floats, which live on the device; lengths are on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def watch_forwards(trainer, monkeypatch, training: bool = True) -> list[tuple[int, int]]:
    """Shapes of the trunk's passes, those with gradients or those without."""
    shapes, model = [], trainer.runtime.unwrap(trainer.model)
    hidden = model.hidden

    def counting(ids, *args, **kwargs):
        if torch.is_grad_enabled() == training:
            shapes.append(tuple(ids.shape))
        return hidden(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counting)
    return shapes


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_step_does_not_depend_on_the_budget(stage, request, monkeypatch) -> None:
    make = request.getfixturevalue(f"{stage}_trainer")
    train = sft_examples(8) if stage == "sft" else ranked_examples(8, completions=(2, 4, 3))
    order = np.argsort(train.lengths, kind="stable")
    results = {}
    for budget in (0, *BUDGETS):
        trainer = make(train, batch_size=8, tokens_per_micro_batch=budget, max_grad_norm=1e9)
        shapes, gradients = watch_forwards(trainer, monkeypatch), {}

        def keep(*args, model=trainer.model, found=gradients, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

        monkeypatch.setattr(trainer.optimizer.optimizer, "step", keep)
        metrics = trainer.train_step(order)
        results[budget] = gradients, float(metrics["train/loss"]), len(shapes)
        assert sum(rows for rows, _ in shapes) == (8 if stage == "sft" else sum(len(r.response_ids) for r in train))
        together = 1 if stage == "sft" else 4  # rows that are never parted: the completions of a prompt
        assert not budget or all(a * b <= budget or a <= together for a, b in shapes)
    for budget in BUDGETS:
        assert_equal_weights(results[budget][0], results[0][0], atol=1e-6)
        assert results[budget][1] == pytest.approx(results[0][1], rel=1e-5)
    assert [results[b][2] for b in (1, 100_000)] == [8, 1] and 1 < results[60][2] < 8


@pytest.mark.parametrize("minibatches", [1, 2])
def test_ppo_does_not_depend_on_the_budget(ppo_trainer, minibatches) -> None:
    """The invariant of the first minibatch is checked in every iteration, so it holds under each budget."""
    results = {}
    for budget in (0, *BUDGETS):
        trainer = ppo_trainer(batch_size=8, tokens_per_micro_batch=budget, minibatches=minibatches, ppo_epochs=3)
        plans = []
        step = trainer.optimizer_step

        def watch(experience, advantages, returns, minibatch, norms, plans=plans, step=step):
            plans.append((experience.lengths, minibatch))
            return step(experience, advantages, returns, minibatch, norms)

        trainer.optimizer_step = watch
        trainer.iteration(1)
        results[budget] = weights(trainer.policy)
        for start in range(0, len(plans), minibatches):
            rows = np.concatenate([part for _, plan in plans[start : start + minibatches] for part in plan])
            assert sorted(rows) == list(range(8))
        for lengths, plan in plans:
            assert all(not budget or len(p) == 1 or len(p) * lengths[p].max() <= budget for p in plan)
    for budget in BUDGETS:
        assert_equal_weights(results[budget], results[0], atol=1e-6)


@pytest.mark.parametrize("completions", [(2,), (4,), (9,), (2, 4, 9)])
@pytest.mark.parametrize("budget", [50, 200, 400])
def test_the_budget_of_an_evaluation_counts_every_completion(rm_trainer, monkeypatch, completions, budget) -> None:
    data = ranked_examples(12, completions=completions)
    trainer = rm_trainer(validation=data, tokens_per_micro_batch=budget)
    shapes = watch_forwards(trainer, monkeypatch, training=False)
    report = trainer.evaluate()
    assert sum(rows for rows, _ in shapes) == sum(len(row.response_ids) for row in data)
    assert all(rows * longest <= budget or rows <= max(completions) for rows, longest in shapes)
    other = rm_trainer(validation=data, batch_size=5).evaluate()
    assert report == pytest.approx(other, rel=1e-5, nan_ok=True)


def test_evaluations_and_the_scale_do_not_depend_on_the_budget(rm_trainer, ppo_trainer) -> None:
    scales = [rm_trainer(tokens_per_micro_batch=n).measure_scale() for n in (0, 30)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    figures = []
    for budget in (0, 30):
        trainer = ppo_trainer(tokens_per_micro_batch=budget)
        trainer.log.log = lambda step, metrics: figures.append(metrics)
        trainer.evaluate()
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_no_micro_batch_waits_for_the_device(stage, request) -> None:
    counts = []
    for budget in (1, 100_000):
        trainer = request.getfixturevalue(f"{stage}_trainer")(tokens_per_micro_batch=budget)
        with Waits() as waits:
            trainer.iteration(1) if stage == "ppo" else trainer.train_step(np.arange(8))
        counts.append(waits.count)
    assert counts[0] == counts[1]
