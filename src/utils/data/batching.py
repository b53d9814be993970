"""From examples to batches: collation, the order of an epoch, micro-batches of like lengths.

Compact rows
    The layout of every batch that is trained or scored on: the prompt, then the response without a gap, then padding on
    the right up to the longest row. Positions count from each row's first token, so a token's position is its column.
    Masks come from lengths, never from comparing ids with PAD, which is a virtual id (utils/tokenizers/interface.py).

Shapes: B rows, L columns (the longest row of the batch), P columns of prompts, K completions of one ranked row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from utils.data.examples import RankedExample, SFTExample


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of prompt + response."""

    ids: torch.Tensor
    """[B, L] int64: prompt ids, response ids with EOS at the end, then PAD."""
    att: torch.Tensor
    """[B, L] bool: True on real tokens, which are the first `length` columns."""
    prompt_len: torch.Tensor
    """[B] int64: tokens of the prompt; the response starts in this column."""
    length: torch.Tensor
    """[B] int64: tokens of prompt and response, EOS included."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


@dataclass(frozen=True)
class RankedBatch:
    """All completions of B ranked rows, each forwarded once."""

    rows: Batch
    """One row per completion, in the order of the True slots of `mask` (row by row, best first)."""
    mask: torch.Tensor
    """[B, K] bool: which slots of a score matrix exist; `scores[mask] = head output` puts each score into its place."""

    def to(self, device: torch.device | str) -> "RankedBatch":
        """The same batch on a device."""
        return RankedBatch(self.rows.to(device), self.mask.to(device, non_blocking=True))


def collate_sft(examples: Sequence[SFTExample], pad_id: int) -> Batch:
    """Demonstrations (or plain texts) to a batch [B, L]."""
    return _collate([(example.prompt_ids, example.response_ids) for example in examples], pad_id)


def collate_ranked(examples: Sequence[RankedExample], pad_id: int) -> RankedBatch:
    """Rankings to one batch of all their completions, and the [B, K] mask of the slots they fill (K of the longest
    ranking)."""
    pairs = [pair for example in examples for pair in zip(example.prompt_ids, example.response_ids, strict=True)]
    counts = np.array([len(example.response_ids) for example in examples])
    mask = np.arange(counts.max()) < counts[:, None]
    return RankedBatch(_collate(pairs, pad_id), torch.from_numpy(mask))


def left_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to (ids [B, P] int64, att [B, P] bool), PAD on the left so that every row generates from the last
    column."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    att = np.arange(width) >= (width - lengths)[:, None]
    return torch.from_numpy(_fill(prompts, att, pad_id)), torch.from_numpy(att)


def right_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to (ids [B, P] int64, att [B, P] bool), PAD on the right."""
    lengths = np.array([len(prompt) for prompt in prompts])
    att = np.arange(int(lengths.max())) < lengths[:, None]
    return torch.from_numpy(_fill(prompts, att, pad_id)), torch.from_numpy(att)


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Optimizer steps that take every one of so many rows once, none of them more than `global_batch_size`."""
    return math.ceil(rows / global_batch_size)


def epoch_batches(lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: all rows in random order, divided evenly over `steps_per_epoch` batches.

    A pure function of its arguments, so that (epoch, number of batches done) is the whole position in the data.

    Evenly, because a step moves the weights as far whatever its rows are: were the last batch what is left over, say 1
    row behind three batches of 32, that row would count as much as 32 others. So 97 rows are batches of 25, 24, 24, 24.

    Args:
        lengths: [N] tokens per row.
        global_batch_size: most rows of one optimizer step, over all micro-batches and processes.
        seed, epoch: of the run, and from 0: every epoch has its own order.

    Returns:
        Arrays of row indices, every index once, whose sizes differ by at most one. Each is a random sample of the rows,
        sorted by length, shortest first: slices of it are micro-batches of like lengths.
    """
    lengths = np.asarray(lengths)
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    steps = steps_per_epoch(len(order), global_batch_size)
    batches = np.array_split(order, steps) if steps else []
    return [rows[np.argsort(lengths[rows], kind="stable")] for rows in batches]


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, max_rows: int, max_tokens: int = 0, sequences: np.ndarray | None = None
) -> list[np.ndarray]:
    """Cut the rows of one optimizer step into passes, each a slice of `rows`.

    Args:
        rows: [B] row indices, sorted by length.
        lengths: [N] tokens of each row, indexed by the values of `rows`.
        max_rows: rows of a pass; without meaning when `max_tokens` is given.
        max_tokens: padded tokens of a pass, sequences x longest; a row that is longer has a pass of its own. 0: off.
        sequences: [B] sequences behind each entry of `rows`, for rankings; None: one each.
    """
    if not max_tokens:
        return [rows[i : i + max_rows] for i in range(0, len(rows), max_rows)]
    starts, count, longest = [0], 0, 0
    for i, length in enumerate(np.asarray(lengths)[rows]):
        more = 1 if sequences is None else int(sequences[i])
        if i > starts[-1] and (count + more) * max(longest, length) > max_tokens:
            starts.append(i)
            count, longest = 0, 0
        count, longest = count + more, max(longest, length)
    return np.split(rows, starts[1:]) if len(rows) else []


def _collate(pairs: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> Batch:
    prompt_len = np.array([len(prompt) for prompt, _ in pairs])
    length = prompt_len + np.array([len(response) for _, response in pairs])
    att = np.arange(length.max()) < length[:, None]
    ids = _fill([part for pair in pairs for part in pair], att, pad_id)
    return Batch(*map(torch.from_numpy, (ids, att, prompt_len, length)))


def _fill(parts: Sequence[np.ndarray], att: np.ndarray, pad_id: int) -> np.ndarray:
    """Lays sequences end to end into the True places of `att`, row by row."""
    ids = np.full(att.shape, pad_id, dtype=np.int64)
    ids[att] = np.concatenate(parts)
    return ids
