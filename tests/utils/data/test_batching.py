"""Batches: masks from lengths, buckets that are a pure function, fair shares."""

import numpy as np
import pytest
import torch

from utils.data.batching import (
    Batch,
    collate_ranked,
    collate_sft,
    epoch_batches,
    left_pad,
    micro_batches,
    right_pad,
    steps_per_epoch,
)
from utils.data.examples import RankedExample, SFTExample

EOS = 50256


def ids(*values):
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("pad", [EOS, EOS + 1, 7])
def test_collate_lays_rows_out_compactly_with_masks_from_lengths(pad):
    batch = collate_sft([SFTExample(ids(1, 2), ids(3, 4, EOS)), SFTExample(ids(7), ids(EOS))], pad)
    assert batch.ids.tolist() == [[1, 2, 3, 4, EOS], [7, EOS, pad, pad, pad]]
    assert batch.att.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.prompt_len.tolist() == [2, 1] and batch.length.tolist() == [5, 2]
    assert (batch.ids.dtype, batch.att.dtype, batch.length.dtype) == (torch.int64, torch.bool, torch.int64)


def test_collate_of_plain_text_has_empty_prompts():
    batch = collate_sft([SFTExample(ids(), ids(3, EOS))], 9)
    assert batch.ids.tolist() == [[3, EOS]] and batch.prompt_len.tolist() == [0] and batch.length.tolist() == [2]


def test_collate_ranked_flattens_completions_and_marks_the_slots():
    pair = RankedExample((ids(1), ids(1)), (ids(2, EOS), ids(3, 4, EOS)))
    three = RankedExample((ids(5), ids(5), ids(6, 6)), (ids(EOS), ids(8, EOS), ids(9, EOS)))
    batch = collate_ranked([pair, three], 99)
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.rows.ids.tolist() == [
        [1, 2, EOS, 99],
        [1, 3, 4, EOS],
        [5, EOS, 99, 99],
        [5, 8, EOS, 99],
        [6, 6, 9, EOS],
    ]
    scores = torch.full(batch.mask.shape, float("nan"))
    scores[batch.mask] = torch.arange(5.0)
    assert scores[0, :2].tolist() == [0, 1] and scores[1].tolist() == [2, 3, 4] and scores[0, 2].isnan()


def test_left_pad():
    out, att = left_pad([ids(1, 2, 3), ids(4)], 9)
    assert out.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert att.tolist() == [[True] * 3, [False, False, True]]


def test_right_pad():
    out, att = right_pad([ids(1, 2, 3), ids(4)], 9)
    assert out.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert att.tolist() == [[True] * 3, [True, False, False]]


def test_batches_move_to_a_device():
    batch = collate_ranked([RankedExample((ids(1), ids(1)), (ids(2), ids(3)))], 9).to("meta")
    assert isinstance(batch.rows, Batch) and {
        batch.mask.device.type,
        batch.rows.ids.device.type,
        batch.rows.att.device.type,
    } == {"meta"}


SIZES = [(97, 32), (12_000, 64), (40_000, 32), (1000, 16), (37, 8), (33, 32), (8, 8), (100, 1), (7, 8), (1, 4), (0, 4)]


@pytest.mark.parametrize(("n", "size"), SIZES)
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_takes_every_row_once_in_even_sorted_batches(n, size, epoch):
    """No batch is a handful of rows: each is a whole step, so its rows would count many times as much as others."""
    lengths = np.random.default_rng(0).integers(1, 50, n)
    batches = epoch_batches(lengths, size, seed=1, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    assert all(np.all(np.diff(lengths[batch]) >= 0) for batch in batches)
    assert len(batches) == steps_per_epoch(n, size) == -(-n // size)
    sizes = {len(batch) for batch in batches}
    assert not sizes or max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_an_epoch_is_a_pure_function_and_differs_by_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 50, 200)

    def order(seed, epoch):
        np.random.seed(seed + epoch + 5)  # the global state has no say
        return [batch.tolist() for batch in epoch_batches(lengths, 8, seed, epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_micro_batches_of_an_epoch_leave_little_padding():
    lengths = np.random.default_rng(0).integers(1, 200, 4096)
    batches = epoch_batches(lengths, 64, 0, 0)
    parts = [part for batch in batches for part in micro_batches(batch, lengths, 8)]
    padded, whole = (sum(len(rows) * lengths[rows].max() for rows in found) for found in (parts, batches))
    assert padded < 1.15 * lengths.sum() < whole


def test_the_order_of_lengths_is_random_from_batch_to_batch():
    lengths = np.random.default_rng(0).integers(1, 200, 4096)
    means = [lengths[batch].mean() for batch in epoch_batches(lengths, 32, 0, 0)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.parametrize("budget", [1, 20, 64, 1000])
@pytest.mark.parametrize("ranked", [False, True])
def test_token_budget_takes_every_row_once_and_pads_no_further(budget, ranked):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 50)
    rows = rng.permutation(50)[:30]
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    sequences = rng.integers(2, 5, 30) if ranked else np.ones(30, dtype=int)
    parts = micro_batches(rows, lengths, 4, budget, sequences if ranked else None)
    assert np.concatenate(parts).tolist() == rows.tolist()
    start = 0
    for i, part in enumerate(parts):
        count = sequences[start : start + len(part)].sum()
        assert len(part) == 1 or count * lengths[part].max() <= budget
        if i + 1 < len(parts):  # the next row would have been too much
            row = start + len(part)
            assert (count + sequences[row]) * lengths[rows[row]] > budget
        start += len(part)


def test_without_a_token_budget_rows_are_counted():
    rows = np.arange(7)
    assert [p.tolist() for p in micro_batches(rows, np.ones(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert micro_batches(rows[:0], np.ones(7), 3) == micro_batches(rows[:0], np.ones(7), 3, 10) == []
