"""Reward model: one forward per completion, the loss of all pairs, and the scale that PPO relies on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from every_family import EVERY
from setups import EOS, VOCAB, Examples, assert_equal_weights, prompt_examples, ranked_examples, read_metrics, weights

from config.user_error import RunStopped
from models.families import load_checkpoint
from models.weights.checkpoint import describe
from training import loop, trainers
from training.start import frozen
from utils.data.batching import collate_ranked
from utils.data.examples import RankedExample

FAMILIES = EVERY


def naive_step_loss(model, examples) -> float:
    """Mean over prompts of the mean over pairs, pair by pair, every completion scored alone."""
    losses = []
    for example in examples:
        ids = [torch.tensor([*p, *r])[None] for p, r in zip(example.prompt_ids, example.response_ids)]
        with torch.no_grad():
            s = [float(model(x, torch.ones_like(x, dtype=torch.bool))) for x in ids]
        pairs = [(i, j) for i in range(len(s)) for j in range(i + 1, len(s))]
        losses.append(np.mean([math.log1p(math.exp(s[j] - s[i])) for i, j in pairs]))
    return float(np.mean(losses))


def count_forwards(model, monkeypatch) -> list[int]:
    """Rows of every forward pass of a model from now on."""
    rows, forward = [], model.forward

    def counting(ids, *args, **kwargs):
        rows.append(len(ids))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return rows


def test_every_completion_is_forwarded_once_and_the_loss_is_that_of_all_pairs(rm_trainer, monkeypatch) -> None:
    train = ranked_examples(8, completions=(2, 4, 3))
    trainer = rm_trainer(train, batch_size=3)
    expected = naive_step_loss(trainer.model, train)
    rows = count_forwards(trainer.model, monkeypatch)
    metrics = trainer.train_step(np.arange(8))
    sizes = [len(r.response_ids) for r in train]
    assert rows == [sum(sizes[:3]), sum(sizes[3:6]), sum(sizes[6:])]
    assert float(metrics["train/loss"]) == pytest.approx(expected, abs=1e-6)


def test_one_big_batch_and_any_split_of_it_are_the_same_step(rm_trainer) -> None:
    train = ranked_examples(8, completions=(2, 4, 3))
    results = {}
    for batch_size in (8, 1, 2, 5):
        trainer = rm_trainer(train, batch_size=batch_size)
        metrics = trainer.train_step(np.arange(8))
        figures = [float(metrics[f"train/{key}"]) for key in ("loss", "accuracy", "grad_norm")]
        results[batch_size] = weights(trainer.model), figures
    for batch_size in (1, 2, 5):
        assert_equal_weights(results[batch_size][0], results[8][0], atol=1e-6)
        assert results[batch_size][1] == pytest.approx(results[8][1], rel=1e-5)


def test_every_row_is_seen_exactly_once(rm_trainer, monkeypatch) -> None:
    trainer = rm_trainer(ranked_examples(21), eval_every=1000)
    seen = []
    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda prompts: (seen.extend(prompts.tolist()), step(prompts))[1])
    trainer.fit()
    assert trainer.total_steps == 3 and sorted(seen) == list(range(21))


def test_rows_whose_completions_have_prompts_of_their_own(rm_trainer) -> None:
    rows = [RankedExample((np.array([1, 2]), np.array([3, 4, 5, 6])), (np.array([7, EOS]), np.array([8, 9, EOS])))]
    trainer = rm_trainer(Examples(rows, [7]), global_batch_size=1, batch_size=1)
    expected = naive_step_loss(trainer.model, rows)
    assert float(trainer.train_step(np.arange(1))["train/loss"]) == pytest.approx(expected, abs=1e-6)


def test_normalisation_holds_on_fresh_samples_and_changes_no_order(rm_trainer, make_model, ppo_trainer) -> None:
    """Train, save, load into PPO, and score what the SFT model says to prompts nobody has seen."""
    sft = frozen(make_model("lm", seed=5))
    trainer = rm_trainer(
        ranked_examples(800, seed=2), sft=sft, normalise_prompts=800, temperature=0.8, response_length=8, lr=3e-3,
        batch_size=64, global_batch_size=64, max_steps=6, eval_every=1000,
    )  # fmt: skip
    trainer.fit()
    model = load_checkpoint(trainer.run / "final", "reward")
    gain, bias = model.normalisation
    lines = read_metrics(trainer.run)
    first, last = (line for line in lines if "norm/gain" in line)
    assert (gain, bias) == (last["norm/gain"], last["norm/bias"]) != (first["norm/gain"], first["norm/bias"])
    assert gain == pytest.approx(1 / last["norm/raw_sd"], rel=1e-5)
    assert bias == pytest.approx(-last["norm/raw_mean"] * gain, rel=1e-4)

    ppo = ppo_trainer(reference=sft, actor=make_model("lm", seed=5), reward_model=model, response_length=8)
    experience = ppo.rollouts.sample(list(prompt_examples(1500, seed=77)), list(range(1500)))
    ppo.rollouts.evaluate_roles(experience, [np.arange(i, i + 100) for i in range(0, 1500, 100)])
    assert abs(float(experience.scores.mean())) < 0.1
    assert abs(float(experience.scores.std()) - 1) < 0.1

    accuracies = []
    for affine in ((gain, bias), (1.0, 0.0), (0.01, 7.0)):
        trainer.runtime.unwrap(trainer.model).set_normalisation(*affine)
        accuracies.append(trainer.evaluate()["accuracy"])
    assert len(set(accuracies)) == 1


def test_the_affine_is_measured_from_one_and_zero_and_never_trained(rm_trainer, monkeypatch) -> None:
    trainer = rm_trainer(max_steps=2, eval_every=1000, lr=1e-2)
    model = trainer.runtime.unwrap(trainer.model)
    model.set_normalisation(5.0, -3.0)
    raw = trainer.scale.measure(model)
    again = trainer.scale.measure(model)
    assert torch.equal(raw, again)
    names = {name for name, _ in model.named_parameters()}
    assert not any("norm_" in name for name in names) and "head.norm_gain" in model.state_dict()
    before = model.normalisation
    trainer.train_step(np.arange(8))
    assert model.normalisation == before  # and the scores that were trained on have it
    batch = collate_ranked(trainer.train[:2], VOCAB)
    with torch.no_grad():
        h = model.hidden(batch.rows.ids, batch.rows.att, right_padded=True)
        last = h[torch.arange(4), batch.rows.length - 1]
        expected = before[0] * (last @ model.head.weight[0] + model.head.bias) + before[1]
    torch.testing.assert_close(trainer.scores(batch)[0].flatten(), expected, atol=1e-5, rtol=1e-5)


def test_samples_for_the_scale_are_drawn_as_ppo_draws_them(rm_trainer, make_model, ppo_trainer) -> None:
    sft = frozen(make_model("lm", seed=5))
    trainer = rm_trainer(sft=sft, normalise_prompts=9, temperature=0.8, response_length=7)
    scale, ppo = trainer.scale, ppo_trainer(actor=make_model("lm", seed=5), response_length=7, temperature=0.8)
    rollouts = ppo.rollouts.sample(scale.prompts, scale.seeds)
    assert scale.samples.prompts() == rollouts.prompts() and scale.samples.responses() == rollouts.responses()
    own = [example.prompt_ids[0].tolist() for example in trainer.train]
    drawn = [own.index(prompt.tolist()) for prompt in scale.prompts]
    assert len(set(drawn)) == 9 and drawn != sorted(drawn)  # at random, each once
    assert scale.seeds == loop.row_seeds(0, loop.SCALE_SAMPLES, 9)
    other = rm_trainer(sft=sft, normalise_prompts=9, seed=1).scale
    assert [own.index(prompt.tolist()) for prompt in other.prompts] != drawn
    assert other.seeds == loop.row_seeds(1, loop.SCALE_SAMPLES, 9)
    trainer.measure_scale()
    assert trainer.saver.description["normalised"] == {
        "step": 0, "samples": 9, "temperature": 0.8, "response_length": 7,
    }  # fmt: skip


def test_prompts_for_the_scale_leave_room_for_a_response(rm_trainer) -> None:
    trainer = rm_trainer(max_length=14, response_length=8)
    assert max(map(len, trainer.scale.prompts)) == 6
    assert int(trainer.scale.samples.lengths.max()) <= 14


def test_epochs_and_tokens_per_second_of_a_step(rm_trainer, monkeypatch) -> None:
    """20 prompts in steps of 8. Every look at the clock is half a second later; every completion counts whole."""
    clock = iter(np.arange(0, 100, 0.5))
    trainer = rm_trainer(ranked_examples(20, completions=(2, 3)), log_every=1, max_steps=4, epochs=2, eval_every=100)
    tokens, step = [], trainer.train_step

    def watch(prompts):
        rows = [trainer.train[i] for i in prompts]
        tokens.append(sum(len(p) + len(r) for row in rows for p, r in zip(row.prompt_ids, row.response_ids)))
        return step(prompts)

    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(trainer, "train_step", watch)
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "train/loss" in line]
    assert [line["train/epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert [line["time/tokens_per_s"] for line in lines] == pytest.approx([2 * n for n in tokens])


def test_scores_that_do_not_vary_are_an_error(rm_trainer, make_model) -> None:
    model = make_model("reward")
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(RunStopped, match="step 0: cannot normalise scores of mean .*no checkpoint has been saved yet"):
        rm_trainer(model=model).fit()


def test_evaluations_and_the_best_checkpoint_do_not_disturb_training(rm_trainer) -> None:
    finals, accuracies = [], []
    for eval_every in (1, 100):
        trainer = rm_trainer(ranked_examples(40), eval_every=eval_every, lr=3e-3, normalise_prompts=16)
        trainer.fit()
        finals.append(weights(trainer.model))
        accuracies.append([x["eval/accuracy"] for x in read_metrics(trainer.run) if "eval/accuracy" in x])
    assert_equal_weights(*finals)
    assert len(accuracies[0]) == 6 and len(accuracies[1]) == 2 and accuracies[0][-1] == accuracies[1][-1]


def test_best_is_the_lowest_loss_and_has_a_scale_of_its_own(rm_trainer) -> None:
    trainer = rm_trainer(ranked_examples(24), lr=2e-2, epochs=5, eval_every=1, save_every=1, keep=99)
    trainer.fit()
    nll = {line["step"]: line["eval/nll"] for line in read_metrics(trainer.run) if "eval/nll" in line and line["step"]}
    best = min(nll, key=nll.get)
    assert best < trainer.total_steps == 15  # these labels are noise: it only gets worse
    kept, final = describe(trainer.run / "best"), describe(trainer.run / "final")
    assert (kept["step"], kept["eval/nll"], kept["normalised"]["step"], kept["held_out"]["step"]) == (
        best, nll[best], best, best,
    )  # fmt: skip
    step = trainer.run / "checkpoints" / f"step_{best:08d}"
    assert describe(step)["normalised"]["step"] == 0 != describe(step)["step"]  # training goes on with the first one
    assert final["normalised"] == {"step": 15, "samples": 16, "temperature": 1.0, "response_length": 8}
    for folder in ("best", "final"):
        model = load_checkpoint(trainer.run / folder, "reward").eval()
        rows = trainer.scale.samples
        scores = model(rows.ids, rows.att, right_padded=True).detach()
        assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
        assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_held_out_figures_go_into_the_checkpoint(rm_trainer) -> None:
    trainer = rm_trainer(max_steps=2, eval_examples=7)
    trainer.fit()
    held_out = json.loads((trainer.run / "final" / "model.json").read_text())["held_out"]
    line = [line for line in read_metrics(trainer.run) if "eval/accuracy" in line][-1]
    keys = {
        "accuracy", "nll", "margin_mean", "margin_sd", "ece", "kendall_tau", "score_mean", "score_sd", "length_corr",
        "longer_wins",
    }  # fmt: skip
    assert set(held_out) == keys | {"prompts", "step"}
    assert held_out["prompts"] == 7 and held_out["step"] == 2
    assert {key: line[f"eval/{key}"] for key in keys} == {key: held_out[key] for key in keys}
    train_line = next(line for line in read_metrics(trainer.run) if "train/loss" in line)
    assert set(train_line) == {
        "step", "time", "train/loss", "train/accuracy", "train/grad_norm", "train/lr", "train/epoch",
        "time/tokens_per_s",
    }  # fmt: skip


def test_held_out_figures_equal_a_naive_computation(rm_trainer) -> None:
    validation = ranked_examples(9, seed=4, completions=(2, 3))
    trainer = rm_trainer(validation=validation, batch_size=2)
    report = trainer.evaluate()
    assert report["nll"] == pytest.approx(naive_step_loss(trainer.model, validation), abs=1e-6)
    right, longer = [], []
    for example in validation:
        ids = [torch.tensor([*p, *r])[None] for p, r in zip(example.prompt_ids, example.response_ids)]
        scores = [float(trainer.model(x, torch.ones_like(x, dtype=torch.bool)).detach()) for x in ids]
        n = [len(r) for r in example.response_ids]
        for i in range(len(scores)):
            for j in range(i + 1, len(scores)):
                right.append(scores[i] > scores[j])
                longer.append(0.5 if n[i] == n[j] else float(n[i] > n[j]))
    assert report["accuracy"] == pytest.approx(np.mean(right)) and report["longer_wins"] == pytest.approx(
        np.mean(longer)
    )


def test_it_learns_which_answers_win(rm_trainer) -> None:
    """A token that every chosen answer has: learned in a few steps, on held-out prompts too."""

    def marked(count: int, seed: int) -> Examples:
        rows = ranked_examples(count, seed)
        good = [
            (np.array([*r.response_ids[0][:-1], 48, EOS]), r.response_ids[1][r.response_ids[1] != 48]) for r in rows
        ]
        return Examples([RankedExample(r.prompt_ids, pair) for r, pair in zip(rows, good)], rows.lengths + 1)

    trainer = rm_trainer(marked(400, 0), marked(60, 1), lr=1e-2, batch_size=16, global_batch_size=16, epochs=3)
    before = trainer.evaluate()["accuracy"]
    trainer.fit()
    held_out = describe(trainer.run / "final")["held_out"]
    assert held_out["accuracy"] > 0.9 > before and held_out["nll"] < 0.4
