"""From prompts to training data for PPO: sample, score, and take log-probabilities and values of what was sampled.

Shapes: B rollouts, L columns of a row, T response columns, b rows and N response tokens of a micro-batch.

Rows are kept compact: prompt, response, padding, so that plain causal attention is right without a mask, and micro-batches are cut from
rows sorted by length. Positions count from each row's first token, so this is the same arithmetic as a left-padded [P | T] layout
(a test holds the two against each other) at a fraction of the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from inference.generate import Generation, generate
from training.runtime import Runtime
from utils.loss import entropy_from_logits, gather_logprobs, response_mask
from utils.tokenizer import Tokenizer


@dataclass
class MicroBatch:
    """Some rows of an experience, cut to the longest of them.

    rows: [b] int64, where they stand in the experience. ids, att: [b, L] right-padded. rmask: [b, T] bool, real response tokens.
    at: [N] int64, indices into the b * L columns of the states in which the response tokens were chosen, row by row.
    tokens: [N] int64, the tokens chosen there.
    """

    rows: Tensor
    ids: Tensor
    att: Tensor
    rmask: Tensor
    at: Tensor
    tokens: Tensor

    def unpack(self, packed: Tensor) -> Tensor:
        """[N] values of the response tokens -> [b, T], 0 where there is no token."""
        return torch.zeros(self.rmask.shape, dtype=packed.dtype, device=packed.device).masked_scatter(
            self.rmask, packed
        )


@dataclass
class Experience:
    """One batch of rollouts. [B, T] fields are 0 where rmask is false.

    ids, att: [B, L] int64 and bool, compact rows. prompt_len, n: [B] int64 on the host, tokens of prompt and response (EOS included).
    ended: [B] bool, the response has an EOS. rmask: [B, T] bool, t < n.
    logp: [B, T] log-probabilities of the policy that sampled, by the training forward, at the sampling temperature.
    logp_ref: [B, T] those of the reference. sampler_logp: [B, T] what the sampler said (a diagnostic).
    values: [B, T] of the critic, before token t. entropy: [B, T] of the policy, exact.
    scores: [B] normalised reward of the response, without any penalty.
    """

    ids: Tensor
    att: Tensor
    prompt_len: Tensor
    n: Tensor
    ended: Tensor
    rmask: Tensor
    sampler_logp: Tensor
    logp: Tensor
    logp_ref: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        """Cut the given rows out."""
        device = self.ids.device
        prompt_len, n = self.prompt_len[rows], self.n[rows]
        L, T = int((prompt_len + n).max()), int(n.max())
        index = torch.as_tensor(rows, device=device)
        at = state_columns(prompt_len, n, L).to(device)
        ids = self.ids[index, :L]
        return MicroBatch(index, ids, self.att[index, :L], self.rmask[index, :T], at, ids.flatten()[at + 1])

    def responses(self) -> list[list[int]]:
        """The response tokens of each row, EOS included."""
        rows = self.ids.tolist()
        return [row[p : p + m] for row, p, m in zip(rows, self.prompt_len.tolist(), self.n.tolist())]

    def prompts(self) -> list[list[int]]:
        """The prompt tokens of each row."""
        rows = self.ids.tolist()
        return [row[:p] for row, p in zip(rows, self.prompt_len.tolist())]


def state_columns(prompt_len: Tensor, n: Tensor, width: int) -> Tensor:
    """Where the states are in which response tokens were chosen: the column before each of them.

    Args:
        prompt_len, n: [b] int64 on the host, tokens of prompt (at least 1) and of response. width: L, columns of the batch.

    Returns:
        [N] int64 indices into the b * L flattened columns, row by row; built on the host, so no device synchronisation.
    """
    return torch.cat(
        [
            torch.arange(i * width + p - 1, i * width + p - 1 + m)
            for i, (p, m) in enumerate(zip(prompt_len.tolist(), n.tolist()))
        ]
    )


class ActorCritic(nn.Module):
    """Policy and critic in one module with one forward, so that one optimizer and one data-parallel engine hold both."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(
        self, batch: MicroBatch, tau: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities [b, T] at temperature tau, values [b, T], and the entropy [b, T] when asked for."""
        logits = self.actor(batch.ids, batch.att, right_padded=True, at=batch.at)  # (N, V)
        logp = batch.unpack(gather_logprobs(logits, batch.tokens, tau))
        values = batch.unpack(self.critic(batch.ids, batch.att, right_padded=True, at=batch.at))
        entropy = batch.unpack(entropy_from_logits(logits.detach(), tau)) if with_entropy else None
        return logp, values, entropy


def compact(generation: Generation, pad_id: int, device: torch.device) -> Experience:
    """Experience with rows moved from left-padded prompt and response to compact form; model outputs still to be filled in."""
    prompt_len, n = generation.prompt_len.cpu(), generation.n.cpu()
    prompts, responses = generation.prompts.cpu(), generation.responses.cpu()
    B, P = prompts.shape
    L, T = int((prompt_len + n).max()), int(n.max())
    ids = torch.full((B, L), pad_id, dtype=torch.long)
    for row, (p, m) in enumerate(zip(prompt_len.tolist(), n.tolist())):
        ids[row, :p] = prompts[row, P - p :]
        ids[row, p : p + m] = responses[row, :m]
    att = torch.arange(L) < (prompt_len + n)[:, None]
    empty = torch.zeros(B, T, device=device)
    return Experience(
        ids=ids.to(device), att=att.to(device), prompt_len=prompt_len, n=n, ended=generation.ended.to(device),
        rmask=response_mask(n, T).to(device), sampler_logp=generation.logprobs[:, :T].to(device),
        logp=empty.clone(), logp_ref=empty.clone(), values=empty.clone(), entropy=empty.clone(), scores=torch.zeros(B, device=device),
    )  # fmt: skip


def minibatch_plan(
    length: Tensor, minibatches: int, micro_batch: int, generator: np.random.Generator
) -> list[list[np.ndarray]]:
    """Split B rows into minibatches at random, and each into micro-batches of like length.

    Args:
        length: [B] tokens of each row.
        minibatches: optimizer steps per pass. micro_batch: rows per forward pass.

    Returns:
        Row indices: one list of micro-batches per minibatch; every row is in exactly one.
    """
    shuffled = generator.permutation(len(length))
    plan = []
    for part in np.array_split(shuffled, minibatches):
        part = part[np.argsort(length.numpy()[part], kind="stable")]
        plan.append([part[i : i + micro_batch] for i in range(0, len(part), micro_batch)])
    return plan


ScoreTexts = Callable[[Sequence[str], Sequence[str]], list[float]]


class Rollouts:
    """Samples responses and has all four roles look at them."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        reward_model: nn.Module | None,
        reward_fn: ScoreTexts | None,
        reward_fn_weight: float,
        tokenizer: Tokenizer,
        runtime: Runtime,
        temperature: float,
        response_length: int,
    ) -> None:
        self.policy = policy
        self.actor = runtime.unwrap(policy).actor
        self.reference = reference
        self.reward_model = reward_model
        self.reward_fn = reward_fn
        self.reward_fn_weight = reward_fn_weight
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.temperature = temperature
        self.response_length = response_length

    @torch.no_grad()
    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> Experience:
        """One response per prompt, in compact rows; model outputs are still to be filled in by `look`."""
        with self.runtime.autocast():
            generation = generate(
                self.actor, prompts, max_new_tokens=self.response_length, eos_id=self.tokenizer.eos_id,
                pad_id=self.tokenizer.pad_id, temperature=self.temperature, seeds=seeds,
            )  # fmt: skip
        return compact(generation, self.tokenizer.pad_id, self.runtime.device)

    @torch.no_grad()
    def look(self, experience: Experience, micro_batches: Sequence[np.ndarray]) -> None:
        """Fill in log-probabilities, values, entropy and scores.

        Log-probabilities are recomputed by the training forward in the very micro-batches of the first minibatch and not taken from
        the sampler: cached keys and bf16 drift would make the first importance ratio differ from 1.
        """
        for batch in self._micro_batches(experience, micro_batches):
            T = batch.rmask.shape[1]
            logp, values, entropy = self.policy(batch, self.temperature, with_entropy=True)
            experience.logp[batch.rows, :T] = logp
            experience.values[batch.rows, :T] = values
            experience.entropy[batch.rows, :T] = entropy
            with self.runtime.autocast():
                logits = self.reference(batch.ids, batch.att, right_padded=True, at=batch.at)
                if self.reward_model is not None:
                    experience.scores[batch.rows] = self.reward_model(batch.ids, batch.att, right_padded=True)
            experience.logp_ref[batch.rows, :T] = batch.unpack(gather_logprobs(logits, batch.tokens, self.temperature))
        if self.reward_fn is not None:
            prompts, responses = self.texts(experience)
            extra = torch.tensor(self.reward_fn(prompts, responses), device=experience.scores.device)
            experience.scores += extra if self.reward_model is None else self.reward_fn_weight * extra

    def texts(self, experience: Experience) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, without EOS."""
        decode = self.tokenizer.decode
        return [decode(p) for p in experience.prompts()], [decode(r) for r in experience.responses()]

    @staticmethod
    def _micro_batches(experience: Experience, rows: Sequence[np.ndarray]) -> Iterator[MicroBatch]:
        return (experience.micro_batch(r) for r in rows)
