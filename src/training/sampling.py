"""Responses to prompts, sampled one way everywhere: in PPO's rollouts, in evaluations, for the reward's scale.

Shapes: B rows, L columns of a row, T response columns, b rows and N response tokens of a micro-batch.

Rows are compact rows (`utils.data.batching`), so that plain causal attention is right without a mask, and micro-batches
are cut from rows sorted by length. It is the same arithmetic as a left-padded [P | T] layout (a test holds the two
against each other) at a fraction of the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import RunConfig
from models.generation import Generation, generate
from training.engine.runtime import Runtime
from utils.loss import response_mask
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer

SFT_SAMPLES = 64  # held-out prompts at most that an SFT evaluation answers

# Keys and values of a token take about an eighth of what it takes in a training pass (two tensors of d channels per
# layer against some eighteen), so this many for each trained one fit where training fits.
_CACHED_PER_TRAINED = 8


def cached_tokens(context: int, batch_size: int, max_tokens: int, recomputes: bool) -> int:
    """Tokens of rows that are sampled together, longest row x rows: what the cache may hold."""
    trained = max_tokens or batch_size * context
    # With recomputed blocks a trained token keeps about as much as a cached one.
    return trained if recomputes else _CACHED_PER_TRAINED * trained


@dataclass
class MicroBatch:
    """Some rows, cut to the longest of them.

    rows: [b] int64, where they stand in what they were cut from. ids, att: [b, L] compact rows.
    rmask: [b, T] bool, real response tokens. at: [N] int64, indices into the b * L columns of the states in which the
    response tokens were chosen, row by row. tokens: [N] int64, the tokens chosen there.
    """

    rows: Tensor
    ids: Tensor
    att: Tensor
    rmask: Tensor
    at: Tensor
    tokens: Tensor

    def states(self, model: nn.Module) -> Tensor:
        """The model's final hidden states [N, d] in which the response tokens were chosen."""
        return model.hidden(self.ids, self.att, right_padded=True, at=self.at)

    def unpack(self, packed: Tensor) -> Tensor:
        """[N] values of the response tokens -> [b, T], 0 where there is no token."""
        empty = torch.zeros(self.rmask.shape, dtype=packed.dtype, device=packed.device)
        return empty.masked_scatter(self.rmask, packed)


@dataclass
class SampledRows:
    """Prompts with a sampled response each.

    ids, att: [B, L] int64 and bool. prompt_len, n: [B] int64 on the host, tokens of prompt and response
    (EOS included). ended: [B] bool, the response has an EOS. rmask: [B, T] bool, t < n.
    sampler_logp: [B, T] log-probabilities as the sampler saw them, 0 where rmask is false.
    """

    ids: Tensor
    att: Tensor
    prompt_len: Tensor
    n: Tensor
    ended: Tensor
    rmask: Tensor
    sampler_logp: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each row."""
        return (self.prompt_len + self.n).numpy()

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        """Cut the given rows out."""
        device = self.ids.device
        prompt_len, n = self.prompt_len[rows], self.n[rows]
        L, T = int((prompt_len + n).max()), int(n.max())
        index = torch.as_tensor(rows, device=device)
        at = state_columns(prompt_len, n, L).to(device)
        ids = self.ids[index, :L]
        return MicroBatch(index, ids, self.att[index, :L], self.rmask[index, :T], at, ids.flatten()[at + 1])

    def sequence(self, row: int) -> tuple[list[int], list[int]]:
        """The prompt tokens and the response tokens of a row."""
        ids, prompt, end = self.ids[row].tolist(), int(self.prompt_len[row]), int(self.lengths[row])
        return ids[:prompt], ids[prompt:end]

    def prompts(self) -> list[list[int]]:
        """The prompt tokens of each row."""
        return [row[:p] for row, p in zip(self.ids.tolist(), self.prompt_len.tolist())]

    def responses(self, with_eos: bool = True) -> list[list[int]]:
        """The response tokens of each row."""
        n = self.n if with_eos else self.n - self.ended.cpu().long()
        return [row[p : p + m] for row, p, m in zip(self.ids.tolist(), self.prompt_len.tolist(), n.tolist())]


def state_columns(prompt_len: Tensor, n: Tensor, width: int) -> Tensor:
    """Where the states are in which response tokens were chosen: the column before each of them.

    Args:
        prompt_len, n: [b] int64 on the host, tokens of prompt (at least 1) and of response.
        width: L, columns of the batch.

    Returns:
        [N] int64 indices into the b * L flattened columns, row by row; built on the host, so no device synchronisation.
    """
    rows = enumerate(zip(prompt_len.tolist(), n.tolist()))
    return torch.cat([torch.arange(i * width + p - 1, i * width + p - 1 + m) for i, (p, m) in rows])


def compact(generation: Generation, pad_id: int, device: torch.device) -> SampledRows:
    """Rows moved from left-padded prompt and right-padded response to compact rows."""
    prompt_len, n = generation.prompt_len.cpu(), generation.n.cpu()
    prompts, responses = generation.prompts.cpu(), generation.responses.cpu()
    length, P, T = prompt_len + n, prompts.shape[1], int(n.max())
    att = torch.arange(int(length.max())) < length[:, None]
    rmask = response_mask(n, T)
    both = torch.cat([prompts, responses[:, :T]], dim=1)  # (B, P + T), each row's tokens in one piece
    ids = torch.full(att.shape, pad_id)
    ids[att] = both[torch.cat([torch.arange(P) >= P - prompt_len[:, None], rmask], dim=1)]
    logp = torch.where(rmask.to(device), generation.logprobs[:, :T].to(device), 0.0)
    ended = generation.ended.to(device)
    return SampledRows(ids.to(device), att.to(device), prompt_len, n, ended, rmask.to(device), logp)


def join(batches: Sequence[SampledRows], order: np.ndarray, pad_id: int) -> SampledRows:
    """Several batches as one: row i of the result is row order[i] of all batches one after another."""

    def column(name: str) -> Tensor:
        columns = [getattr(batch, name) for batch in batches]
        if columns[0].ndim == 2:
            width = max(x.shape[1] for x in columns)
            columns = [F.pad(x, (0, width - x.shape[1]), value=pad_id if name == "ids" else 0) for x in columns]
        return torch.cat(columns)[torch.as_tensor(order, device=columns[0].device)]

    return SampledRows(**{field.name: column(field.name) for field in fields(SampledRows)})


@dataclass(frozen=True)
class Sampler:
    """How responses are sampled: by a policy itself at a temperature, so without top-k or top-p.

    batch_size, max_tokens and recomputes are --batch-size, --tokens-per-micro-batch and --activation-checkpointing of
    training; they bound how many rows are in work at once and have no influence on the responses, since every row has a
    random stream of its own.
    """

    tokenizer: Tokenizer
    runtime: Runtime
    temperature: float
    response_length: int
    batch_size: int
    max_tokens: int = 0
    recomputes: bool = False
    template: PromptTemplate = PromptTemplate()  # of the prompts, for their texts

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer: Tokenizer, runtime: Runtime, temperature: float, response_length: int
    ) -> Sampler:
        """A sampler that needs no more room than a run's training does."""
        sizes = (config.batch_size, config.tokens_per_micro_batch, config.activation_checkpointing)
        return cls(tokenizer, runtime, temperature, response_length, *sizes)

    @torch.no_grad()
    def sample(self, model: nn.Module, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> SampledRows:
        """One response per prompt, in the order of the prompts."""
        batches = list(self._batches([len(p) for p in prompts], model.config.block_size))
        sampled = []
        for rows in tqdm(batches, desc="sampling", unit="batch", leave=False, delay=3):
            with self.runtime.autocast():
                generation = generate(
                    model, [prompts[i] for i in rows], max_new_tokens=self.response_length,
                    eos_id=self.tokenizer.eos_id, pad_id=self.tokenizer.pad_id, temperature=self.temperature,
                    seeds=[seeds[i] for i in rows],
                )  # fmt: skip
            sampled.append(compact(generation, self.tokenizer.pad_id, self.runtime.device))
        return join(sampled, np.argsort(np.concatenate(batches)), self.tokenizer.pad_id)

    def _batches(self, prompt_len: list[int], block_size: int) -> Iterator[np.ndarray]:
        """Rows to sample together: prompts of like length, and not more cache than training has room for."""
        budget = cached_tokens(block_size, self.batch_size, self.max_tokens, self.recomputes)
        order = np.argsort([-n for n in prompt_len], kind="stable")
        while len(order):
            # The longest come first, so the first row's width is that of the batch.
            rows = max(1, budget // (prompt_len[order[0]] + self.response_length))
            yield order[:rows]
            order = order[rows:]
