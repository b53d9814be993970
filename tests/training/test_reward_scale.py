"""The scale of a reward model: where its samples are scored, and in which passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from setups import LetterTokenizer, runtime_on
from torch import nn

from config.model_configs import GPTConfig
from config.user_error import UserError
from models.gpt import GPT, GPTRewardModel
from training.reward_scale import RewardScale, Spread
from training.sampling import Sampler

CONFIG = GPTConfig(name="tiny", n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=50, init_std=0.3)


class Watched(nn.Module):
    """A reward model that notes the shape of every batch."""

    def __init__(self, model: GPTRewardModel) -> None:
        super().__init__()
        self.model, self.shapes, self.training_modes = model, [], []
        self.set_normalisation = model.set_normalisation

    @property
    def normalisation(self) -> tuple[float, float]:
        return self.model.normalisation

    def forward(self, ids, att, **flags):
        self.shapes.append(tuple(ids.shape))
        self.training_modes.append(self.model.training)
        return self.model(ids, att, **flags)


def scale(max_tokens: int = 0, batch_size: int = 100) -> RewardScale:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 49, n).astype(np.int32) for n in (2, 9, 3, 14, 5, 7, 4, 12)]
    sampler = Sampler(LetterTokenizer(), runtime_on("cpu"), 1.0, 6, batch_size, max_tokens)
    return RewardScale(GPT(CONFIG).eval(), prompts, range(8), sampler)


@pytest.mark.parametrize("sizes", [dict(max_tokens=30), dict(batch_size=3), dict(max_tokens=60)])
def test_passes_keep_to_their_budget_and_change_no_score(sizes):
    torch.manual_seed(1)
    model = Watched(GPTRewardModel(CONFIG))
    whole = scale().measure(model)
    assert len(model.shapes) == 1
    affine = model.normalisation
    model.shapes.clear()
    torch.testing.assert_close(scale(**sizes).measure(model), whole, atol=1e-5, rtol=0)
    assert len(model.shapes) > 2
    assert all(rows <= sizes.get("batch_size", 100) for rows, _ in model.shapes)
    assert all(rows == 1 or rows * width <= sizes.get("max_tokens", 10**9) for rows, width in model.shapes)
    assert model.normalisation == pytest.approx(affine, abs=1e-4)


@pytest.mark.parametrize("was_training", [True, False])
def test_measuring_is_done_in_evaluation_mode_and_sets_mean_0_and_deviation_1(was_training):
    torch.manual_seed(1)
    model = Watched(GPTRewardModel(CONFIG)).train(was_training)
    measured = scale()
    raw = measured.measure(model)
    assert model.training is was_training and model.training_modes == [False]
    gain, bias = model.normalisation
    scores = gain * raw + bias
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    # Measured anew, the same raw scores come out: the old affine does not count twice.
    torch.testing.assert_close(measured.measure(model), raw)


def test_one_training_prompt_gives_no_scale():
    RewardScale.check_rows("rows.jsonl", 2)
    with pytest.raises(UserError, match=r"^--dataset rows.jsonl: leaves the reward model 1 training prompt, .*a dozen"):
        RewardScale.check_rows("rows.jsonl", 1)


class Scored(Watched):
    """A reward model that gives every row this score."""

    def __init__(self, score: float) -> None:
        super().__init__(GPTRewardModel(CONFIG))
        self.score = score

    def forward(self, ids, att, **flags):
        return torch.full((len(ids),), self.score)


@pytest.mark.parametrize(("score", "answers_alike", "told"), [
    (0.5, False, "scores . different answers alike; 8 samples are few: give more rows; else lower --lr"),
    (0.5, True, "the SFT model gave one answer to all 8 prompts; raise --temperature, or train it further"),
    (float("nan"), False, "numbers that are not finite; lower --lr"),
])  # fmt: skip
def test_scores_that_do_not_vary_are_told_with_their_cause(score, answers_alike, told):
    measured = scale()
    if answers_alike:
        measured.samples.responses = lambda: [[7, 3]] * 8
    with pytest.raises(ValueError, match=f"^cannot normalise scores of mean .*: .*{told}$"):
        measured.measure(Scored(score))


VARIED = [0.0, 1.0, 0.5, 0.2] * 4


@pytest.mark.parametrize("batches", [
    [[0.0] * 16], [[0.0] * 8] * 2, [[1.0] * 4] * 9, [[float(i)] * 8 for i in range(3)], [[1e6, 1e6 + 0.01] * 8],
    [[1e-9, 0.0] * 8], [[-3.8] * 16, VARIED],
])  # fmt: skip
def test_rewards_that_are_alike_from_the_start_are_told_once(batches, capsys):
    watch = Spread("--reward-fn f.py:f", "print what it returns")
    for scores in batches * 2:
        watch.watch(torch.tensor(scores, dtype=torch.float64))
    told = capsys.readouterr().out
    assert told.count("rewards of --reward-fn f.py:f are alike") == told.count("\n") == 1
    assert told.rstrip().endswith("print what it returns")


@pytest.mark.parametrize("batches", [
    [VARIED, [0.0] * 99], [[0.0] * 8], [[0.0, 0.0], [0.0, 1.0], *([[0.0] * 9] * 9)], [[0.0]] * 99, [[1e-3, 0.0] * 8],
    [[1.0, float("nan")] * 8], [[]],
])  # fmt: skip
def test_rewards_that_differ_or_are_few_are_not(batches, capsys):
    watch = Spread("-c", "")
    for scores in batches:
        watch.watch(torch.tensor(scores))
    assert capsys.readouterr().out == ""
