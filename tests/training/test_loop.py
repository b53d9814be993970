"""Order of data and seeds as pure functions of the position."""

import math

import numpy as np
import pytest
import torch

from config.configs import RMConfig, SFTConfig
from config.user_error import UserError
from models.weights.checkpoint import save_model
from training import loop
from training.engine.runtime import require_one_process
from training.start import template_of

LENGTHS = np.random.default_rng(0).integers(3, 40, size=37)


def config(**settings) -> SFTConfig:
    return SFTConfig(**{**dict(batch_size=4, global_batch_size=8, epochs=2), **settings})


@pytest.mark.parametrize("count", [37, 40, 5])
def test_every_row_is_taken_exactly_once_an_epoch(count: int) -> None:
    lengths, settings = LENGTHS[:count] if count < 37 else np.resize(LENGTHS, count), config()
    per_epoch = loop.steps_per_epoch(lengths, settings)
    assert per_epoch == math.ceil(count / 8) and loop.optimizer_steps(lengths, settings) == 2 * per_epoch
    order = list(loop.data_order(lengths, settings, 0, 2 * per_epoch))
    assert len(order) == 2 * per_epoch and {len(rows) for rows in order} <= {count // per_epoch, -(-count // per_epoch)}
    epochs = [np.concatenate(order[:per_epoch]), np.concatenate(order[per_epoch:])]
    for rows in epochs:
        assert sorted(rows) == list(range(count))
    assert count == 5 or epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 9])
def test_a_run_can_be_taken_up_at_any_step(start: int) -> None:
    whole = list(loop.data_order(LENGTHS, config(), 0, 9))
    rest = list(loop.data_order(LENGTHS, config(), start, 9))
    assert [a.tolist() for a in rest] == [a.tolist() for a in whole[start:]]


def test_max_steps_ends_early_and_another_seed_is_another_order() -> None:
    assert loop.optimizer_steps(LENGTHS, config(max_steps=3)) == 3
    assert loop.optimizer_steps(LENGTHS, config(max_steps=300)) == 10
    first, other = (next(loop.data_order(LENGTHS, config(seed=seed), 0, 1)) for seed in (0, 1))
    assert first.tolist() != other.tolist()


def test_micro_batches_are_slices_of_a_step() -> None:
    rows = next(loop.data_order(LENGTHS, config(), 0, 1))
    parts = loop.micro_batches(rows, LENGTHS, config(batch_size=3))
    assert np.concatenate(parts).tolist() == rows.tolist() and [len(p) for p in parts] == [3, 3, 2]
    assert (np.diff(LENGTHS[rows]) >= 0).all()


def test_evaluations_take_the_same_rows_always() -> None:
    settings = RMConfig(batch_size=4, global_batch_size=8, eval_examples=10)
    parts = loop.evaluation_batches(LENGTHS, settings)
    assert sorted(np.concatenate(parts)) == list(range(10)) and max(map(len, parts)) == 4
    everything = loop.evaluation_batches(LENGTHS[:6], settings)
    assert sorted(np.concatenate(everything)) == list(range(6))


def test_prompts_go_round_in_shuffled_passes() -> None:
    taken = np.concatenate([loop.prompt_order(10, 4, 0, update) for update in range(1, 11)])
    for start in range(0, 40, 10):
        assert sorted(taken[start : start + 10]) == list(range(10))
    assert taken[:10].tolist() != taken[10:20].tolist()
    large = loop.prompt_order(3, 8, 0, 1)  # fewer prompts than a rollout batch
    assert len(large) == 8 and np.bincount(large).min() >= 2


def test_seeds_of_rows_do_not_depend_on_how_many_there_are_and_differ_between_purposes() -> None:
    assert loop.row_seeds(0, 5, 3) == loop.row_seeds(0, 5, 9)[:3]
    purposes = [1, 2, loop.SFT_SAMPLES, loop.SCALE_SAMPLES, loop.EVALUATION_SAMPLES]
    seeds = [seed for s in (0, 1) for purpose in purposes for seed in loop.row_seeds(s, purpose, 50)]
    assert len(set(seeds)) == len(seeds)


def test_a_state_brings_back_step_best_and_optimizer(sft_trainer) -> None:
    trainer = sft_trainer(max_steps=3, eval_every=1)
    trainer.fit()
    state = trainer.state()
    assert state["step"] == 3 and state["best"] == trainer.best < math.inf
    again = sft_trainer(max_steps=3, eval_every=1, state=state)
    assert (again.step, again.best) == (3, trainer.best)
    moments = again.optimizer.state_dict()["state"]
    assert moments and all(
        torch.equal(moments[i]["exp_avg"], s["exp_avg"]) for i, s in state["optimizer"]["state"].items()
    )
    assert loop.resume_trainer(None, again.optimizer, again.runtime) == (0, math.inf)


def test_several_processes_are_refused() -> None:
    class Two:
        world_size = 2

    with pytest.raises(UserError, match="one device"):
        require_one_process(Two())


def test_a_checkpoint_without_a_template_is_refused(tmp_path, make_model) -> None:
    save_model(make_model(), tmp_path)
    with pytest.raises(UserError, match="prompt template"):
        template_of(tmp_path)
