"""Supervised fine-tuning: what is trained on, how it is weighted, what is kept."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_family import EVERY, GPT2_ALONE
from setups import EOS, VOCAB, Examples, assert_equal_weights, random_ids, read_metrics, response, sft_examples, weights

from models.families import load_checkpoint, new_model
from models.generation import generate
from models.weights.checkpoint import describe
from training import held_out, loop, trainers
from training.experience import ActorCritic
from training.sampling import MicroBatch
from training.trainers import sft_targets
from utils.data.batching import collate_sft
from utils.data.examples import SFTExample

FAMILIES = EVERY


@torch.no_grad()
def naive_loss(model, examples) -> tuple[float, int]:
    """Summed loss and count of response tokens, one row at a time, with labels of -100 on the prompt."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(np.concatenate([example.prompt_ids, example.response_ids])).long()[None]
        labels = ids.clone()
        labels[:, : max(1, len(example.prompt_ids))] = -100
        logits = model(ids)
        total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
    return total, count


def test_targets_are_the_response_and_its_eos() -> None:
    batch = collate_sft([SFTExample(np.array([1, 2]), np.array([3, 4, EOS])), *sft_examples(1)], VOCAB)
    here = sft_targets(batch)[:3]
    assert here.tolist() == [1, 2, 3]
    assert batch.ids.flatten()[here + 1].tolist() == [3, 4, EOS]


@pytest.mark.parametrize("pad_id", [VOCAB, EOS, 7, 0])
def test_the_padding_id_has_no_influence(sft_trainer, pad_id: int) -> None:
    trainer, examples = sft_trainer(), list(sft_examples(6))
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.token_loss_sum(collate_sft(examples, pad_id)))
        assert loss == pytest.approx(naive_loss(trainer.model, examples)[0], abs=1e-4)


def test_evaluation_is_the_loss_per_response_token(sft_trainer) -> None:
    trainer = sft_trainer(eval_examples=7, batch_size=3)
    trainer.model.train()
    trainer.evaluate()
    total, count = naive_loss(trainer.model.eval(), trainer.validation[:7])
    (line,) = read_metrics(trainer.run)
    assert line["eval/loss"] == pytest.approx(total / count, abs=1e-5)
    assert line["eval/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert set(line) == {
        "step", "time", "eval/loss", "eval/perplexity", "resp/eos_rate", "resp/len_mean", "resp/distinct_2",
        "resp/repetition", "resp/duplicate_rate",
    }  # fmt: skip
    samples = [json.loads(row) for row in (trainer.run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 7 and all(set(row) == {"step", "prompt", "response"} for row in samples)


@GPT2_ALONE
def test_evaluation_has_no_dropout_and_disturbs_nothing(sft_trainer, make_model) -> None:
    finals = []
    for eval_every in (1, 100):
        torch.manual_seed(0)
        trainer = sft_trainer(model=make_model("lm", dropout=0.2, std=0.1), eval_every=eval_every, max_steps=4, lr=1e-2)
        trainer.fit()
        finals.append(weights(trainer.model))
        losses = [line["eval/loss"] for line in read_metrics(trainer.run) if "eval/loss" in line]
        before = losses[-1]
        trainer.evaluate()
        assert read_metrics(trainer.run)[-1]["eval/loss"] == before
    assert len(losses) == 2  # first and last
    assert_equal_weights(*finals)


def test_one_big_batch_and_any_split_of_it_are_the_same_step(sft_trainer, monkeypatch) -> None:
    """For rows of very different lengths: the gradient is that of the mean over all target tokens of the step."""
    rng = np.random.default_rng(3)
    rows = [SFTExample(random_ids(rng, 1, 20), response(rng, 0, 20 if i % 2 else 1)) for i in range(8)]
    train = Examples(rows, [len(r.prompt_ids) + len(r.response_ids) for r in rows])
    gradients, metrics = {}, {}
    for batch_size in (8, 1, 2, 3):
        trainer = sft_trainer(train, batch_size=batch_size, max_grad_norm=1e9)

        def keep(*args, model=trainer.model, size=batch_size, **kwargs):
            gradients[size] = {name: p.grad.clone() for name, p in model.named_parameters()}

        monkeypatch.setattr(trainer.optimizer.optimizer, "step", keep)
        metrics[batch_size] = trainer.train_step(np.argsort(train.lengths))
    for batch_size in (1, 2, 3):
        assert_equal_weights(gradients[batch_size], gradients[8], atol=1e-6)
        for key in ("train/loss", "train/grad_norm"):
            assert float(metrics[batch_size][key]) == pytest.approx(float(metrics[8][key]), rel=1e-5)
    total, count = naive_loss(trainer.model, rows)
    assert float(metrics[3]["train/loss"]) == pytest.approx(total / count, rel=1e-5)


def test_sum_of_logprobs_is_the_sft_loss(sft_trainer, make_model) -> None:
    """At temperature 1 PPO's log-probabilities of a row sum to minus its SFT loss."""
    trainer, examples = sft_trainer(), list(sft_examples(5))
    batch = collate_sft(examples, VOCAB)
    at = sft_targets(batch)
    n = batch.length - batch.prompt_len
    rmask = torch.arange(int(n.max())) < n[:, None]
    micro = MicroBatch(torch.arange(5), batch.ids, batch.att, rmask, at, batch.ids.flatten()[at + 1])
    actor = new_model(trainer.model.config, "actor")
    actor.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        logp, _, _ = ActorCritic(actor.eval(), make_model("critic"))(micro, 1.0)
        assert float(logp.sum()) == pytest.approx(-float(trainer.token_loss_sum(batch)), abs=1e-4)
    for row, example in enumerate(examples):
        assert float(logp[row].sum()) == pytest.approx(-naive_loss(trainer.model.eval(), [example])[0], abs=1e-4)


@GPT2_ALONE
@pytest.mark.slow
def test_the_learning_rate_is_stepped_once_an_optimizer_step(sft_trainer) -> None:
    """Peak 1e-4, end 1e-5, 10 steps of warm-up, 110 in all; with two micro-batches a step."""
    trainer = sft_trainer(
        sft_examples(10), batch_size=1, global_batch_size=2, epochs=22, lr=1e-4, min_lr_ratio=0.1, warmup_steps=10,
        log_every=1, eval_every=1000,
    )  # fmt: skip
    assert trainer.total_steps == 110
    trainer.fit()
    rates = {line["step"] - 1: line["train/lr"] for line in read_metrics(trainer.run) if "train/lr" in line}
    for step, rate in {0: 1e-5, 9: 1e-4, 10: 1e-4, 35: 8.68198e-5, 60: 5.5e-5}.items():
        assert rates[step] == pytest.approx(rate, rel=1e-5)
    assert rates[109] == pytest.approx(1e-5, rel=3e-3)  # step 110 would be the end of the cosine
    epochs = {line["step"]: line["train/epoch"] for line in read_metrics(trainer.run) if "train/epoch" in line}
    assert epochs[5] == 1.0 and epochs[110] == 22.0


def test_it_learns_to_end(sft_trainer, make_model) -> None:
    """The EOS is a target like any other: an overfitted model repeats the response and stops."""
    example = SFTExample(np.array([5, 6, 7]), np.array([11, 12, 13, EOS]))
    train = Examples([example], [7])
    trainer = sft_trainer(train, train, batch_size=1, global_batch_size=1, epochs=80, lr=1e-2, eval_every=1000)
    trainer.fit()
    answer = generate(trainer.model, [[5, 6, 7]], max_new_tokens=8, eos_id=EOS, temperature=0)
    assert answer.row(0).tolist() == [11, 12, 13, EOS] and bool(answer.ended)
    assert trainer.sample()["resp/eos_rate"] > 0.9


def test_the_best_model_by_held_out_loss_is_kept(sft_trainer) -> None:
    # At this rate the loss goes down and then up.
    trainer = sft_trainer(sft_examples(8), lr=3e-2, epochs=12, eval_every=1, min_lr_ratio=1.0)
    trainer.fit()
    losses = {line["step"]: line["eval/loss"] for line in read_metrics(trainer.run) if "eval/loss" in line}
    best = min((step for step in losses if step), key=losses.get)
    assert 0 < best < 12
    kept = describe(trainer.run / "best")
    assert (kept["step"], kept["eval/loss"]) == (best, losses[best])
    model = load_checkpoint(trainer.run / "best").eval()
    total, count = naive_loss(model, trainer.validation)
    assert total / count == pytest.approx(losses[best], abs=1e-5)
    assert describe(trainer.run / "final")["step"] == 12


def test_plain_text_has_no_prompt(sft_trainer) -> None:
    rng = np.random.default_rng(0)
    rows = [SFTExample(np.zeros(0, np.int32), response(rng, 3, 12)) for _ in range(12)]
    train = Examples(rows, [len(r.response_ids) for r in rows])
    trainer = sft_trainer(train, train, lr=1e-2, max_steps=2)
    total, count = naive_loss(trainer.model.eval(), rows)
    assert count == sum(len(r.response_ids) - 1 for r in rows)  # nothing predicts the first token
    assert trainer.fit() == 0
    lines = read_metrics(trainer.run)
    assert lines[0]["eval/loss"] == pytest.approx(total / count, abs=1e-5)
    assert not any(key.startswith("resp/") for line in lines for key in line)
    assert not (trainer.run / "samples.jsonl").exists()


def test_a_second_look_at_the_figures_of_a_step(sft_trainer) -> None:
    trainer = sft_trainer(log_every=2, max_steps=3)
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "train/loss" in line]
    assert [line["step"] for line in lines] == [2, 3]
    assert set(lines[0]) == {
        "step", "time", "train/loss", "train/grad_norm", "train/lr", "train/epoch", "time/tokens_per_s",
    }  # fmt: skip
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_epochs_and_tokens_per_second_of_a_step(sft_trainer, monkeypatch) -> None:
    """20 rows in steps of 8: a third step is the first epoch's last. Every look at the clock is half a second later."""
    clock = iter(np.arange(0, 100, 0.5))
    trainer = sft_trainer(sft_examples(20), log_every=1, max_steps=4, epochs=2, eval_every=100)
    tokens, step = [], trainer.train_step
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(
        trainer, "train_step", lambda rows: (tokens.append(int(trainer.train.lengths[rows].sum())), step(rows))[1]
    )
    trainer.fit()
    lines = [line for line in read_metrics(trainer.run) if "train/loss" in line]
    assert [line["train/epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])
    assert [line["time/tokens_per_s"] for line in lines] == pytest.approx([2 * n for n in tokens])


def test_samples_answer_the_first_held_out_prompts_with_room_for_the_answer(sft_trainer, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    lengths = [0, 50, 3, 40, 41, 39, 0, 9]
    rows = [SFTExample(rng.integers(0, 40, n).astype(np.int32), response(rng, 2, 3)) for n in lengths]
    validation = Examples(rows, [len(r.prompt_ids) + len(r.response_ids) for r in rows])
    asked = []
    monkeypatch.setattr(held_out, "sample_answers", lambda *given: (asked.append(given), ({"resp/x": 1.0}, []))[1])
    trainer = sft_trainer(validation=validation, eval_examples=6, sample_tokens=24, seed=5)
    assert trainer.sample() == trainer.sample() == {"resp/x": 1.0}
    for model, prompts, seeds, sampler in asked:
        assert model is trainer.runtime.unwrap(trainer.model)
        expected = [r.prompt_ids[-40:].tolist() for r in rows[:6] if len(r.prompt_ids)]  # a context of 64 tokens
        assert [p.tolist() for p in prompts] == expected
        assert seeds == loop.row_seeds(5, loop.SFT_SAMPLES, 5)
        assert (sampler.temperature, sampler.response_length) == (0.7, 24)
    many = sft_trainer(validation=sft_examples(90, seed=9), sample_tokens=24)
    many.sample()
    assert len(asked[-1][1]) == 64  # however many examples an evaluation takes
    assert sft_trainer(validation=validation, sample_tokens=64).sample() == {} and len(asked) == 3
