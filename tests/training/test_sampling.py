"""Sampled rows: compact form, independence of how the sampling is divided, micro-batches."""

import numpy as np
import pytest
import torch
from setups import EOS, VOCAB, LetterTokenizer, prompt_examples

from config.configs import SFTConfig
from models.generation import Generation
from training import sampling
from training.sampling import Sampler, compact, join, state_columns

PAD = VOCAB


@pytest.fixture
def actor(make_model):
    return make_model("actor", std=0.1)


def sampler(runtime, batch_size: int = 4, response_length: int = 8) -> Sampler:
    return Sampler(LetterTokenizer(), runtime, 0.8, response_length, batch_size)


def test_compact_moves_prompt_and_response_together() -> None:
    generation = Generation(
        prompts=torch.tensor([[PAD, PAD, 7], [4, 5, 6]]),
        prompt_len=torch.tensor([1, 3]),
        responses=torch.tensor([[11, EOS, PAD], [12, 13, 14]]),
        n=torch.tensor([2, 3]),
        ended=torch.tensor([True, False]),
        stopped=torch.tensor([False, False]),
        logprobs=torch.tensor([[-1.0, -2.0, 99.0], [-3.0, -4.0, -5.0]]),
    )
    rows = compact(generation, PAD, torch.device("cpu"))
    assert rows.ids.tolist() == [[7, 11, EOS, PAD, PAD, PAD], [4, 5, 6, 12, 13, 14]]
    assert rows.att.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert rows.rmask.tolist() == [[True, True, False], [True] * 3]
    assert rows.sampler_logp.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    assert rows.prompts() == [[7], [4, 5, 6]]
    assert rows.responses() == [[11, EOS], [12, 13, 14]]
    assert rows.responses(with_eos=False) == [[11], [12, 13, 14]]
    assert rows.lengths.tolist() == [3, 6] and len(rows) == 2


def test_how_many_rows_are_sampled_at_once_changes_nothing(actor, runtime, monkeypatch) -> None:
    prompts, seeds = list(prompt_examples(9)), list(range(9))
    whole = sampler(runtime, batch_size=64).sample(actor, prompts, seeds)
    monkeypatch.setattr(sampling, "_CACHED_PER_TRAINED", 1)
    divided = sampler(runtime, batch_size=1)
    parts = list(divided._batches([len(p) for p in prompts], actor.config.block_size))
    assert len(parts) > 2 and sorted(np.concatenate(parts)) == list(range(9))
    for part in parts:
        assert len(part) * (max(len(prompts[i]) for i in part) + 8) <= actor.config.block_size
    again = divided.sample(actor, prompts, seeds)
    assert again.prompts() == whole.prompts() == [p.tolist() for p in prompts]
    assert again.responses() == whole.responses()
    assert torch.equal(again.ids, whole.ids) and torch.equal(again.ended, whole.ended)
    torch.testing.assert_close(again.sampler_logp, whole.sampler_logp, atol=1e-5, rtol=0)


def test_a_row_that_alone_exceeds_the_budget_is_still_sampled(runtime) -> None:
    parts = list(sampler(runtime, batch_size=1)._batches([500, 3, 500], block_size=8))
    assert [part.tolist() for part in parts] == [[0], [2], [1]]


def test_sampled_rows_hold_nothing_behind_eos_and_no_forbidden_id(actor, runtime) -> None:
    rows = sampler(runtime).sample(actor, list(prompt_examples(40)), list(range(40)))
    assert 0 < int(rows.ended.sum()) < 40  # both kinds occur
    for tokens, ended in zip(rows.responses(), rows.ended.tolist()):
        assert all(0 <= token < VOCAB for token in tokens)
        assert tokens.count(EOS) == ended and (not ended or tokens[-1] == EOS)
    assert rows.ids[~rows.att].eq(PAD).all()
    assert rows.sampler_logp[~rows.rmask].eq(0).all() and rows.sampler_logp[rows.rmask].lt(0).all()
    again = sampler(runtime).sample(actor, list(prompt_examples(40)), list(range(40)))
    assert torch.equal(rows.ids, again.ids)


def test_join_restores_an_order(actor, runtime) -> None:
    prompts = list(prompt_examples(6))
    one = sampler(runtime).sample(actor, prompts[:2], [0, 1])
    two = sampler(runtime).sample(actor, prompts[2:], [2, 3, 4, 5])
    both = join([two, one], np.array([4, 5, 0, 1, 2, 3]), PAD)
    assert both.prompts() == [p.tolist() for p in prompts]
    assert both.responses() == one.responses() + two.responses()


def test_micro_batch_points_at_the_state_before_each_token(actor, runtime) -> None:
    rows = sampler(runtime).sample(actor, list(prompt_examples(6)), list(range(6)))
    batch = rows.micro_batch(np.array([4, 1, 2]))
    assert batch.ids.shape[1] == max(rows.lengths[[4, 1, 2]])
    position = 0
    for i, row in enumerate([4, 1, 2]):
        for t, token in enumerate(rows.responses()[row]):
            column = int(batch.at[position])
            assert column == i * batch.ids.shape[1] + int(rows.prompt_len[row]) + t - 1
            assert int(batch.tokens[position]) == token
            position += 1
    assert position == len(batch.at) == int(batch.rmask.sum())
    unpacked = batch.unpack(batch.tokens)
    assert [row[row != 0].tolist() for row in unpacked] == [
        [t for t in rows.responses()[row] if t != 0] for row in (4, 1, 2)
    ]


def test_state_columns_of_a_one_token_prompt() -> None:
    assert state_columns(torch.tensor([1, 2]), torch.tensor([2, 1]), 4).tolist() == [0, 1, 5]


def test_rows_at_once_follow_what_training_has_room_for(runtime) -> None:
    """A token budget counts as such; with recomputed blocks there is room for no more tokens than are trained."""
    made = Sampler.of(SFTConfig(tokens_per_micro_batch=64), LetterTokenizer(), runtime, 1.0, 6)
    recomputing = Sampler.of(
        SFTConfig(tokens_per_micro_batch=64, activation_checkpointing=True), LetterTokenizer(), runtime, 1.0, 6
    )
    sizes = [[len(part) for part in s._batches([10] * 40, block_size=1000)] for s in (made, recomputing)]
    assert sizes == [[32, 8], [4] * 10]
