"""From prompts to training data for PPO: sample, score, and take log-probabilities and values of what was sampled.

Shapes: B rollouts, T response columns, b rows and N response tokens of a micro-batch, d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import PPOConfig
from training.engine.nonfinite import check_rollout
from training.engine.phases import Phases
from training.engine.runtime import Runtime
from training.reward_scale import Spread
from training.sampling import MicroBatch, SampledRows, Sampler
from utils.data.batching import micro_batches
from utils.loss import Moments, masked_moments, masked_whiten
from utils.reward_function import NonFiniteReward
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer

ScoreTexts = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass
class Experience(SampledRows):
    """One batch of rollouts, in compact rows, and what the four roles make of it. [B, T] fields are 0 where rmask is
    false.

    logp: [B, T] log-probabilities of the policy that sampled, by the training forward, at the sampling temperature.
    logp_ref: [B, T] those of the reference. values: [B, T] of the critic, before token t.
    entropy: [B, T] of the policy, exact. scores: [B] reward of the response, without any penalty: the reward model's,
    which is normalised, and the reward function's.
    """

    logp: Tensor
    logp_ref: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor

    @classmethod
    def of(cls, rows: SampledRows) -> Experience:
        """Sampled rows with the roles' outputs still to be filled in."""
        empty = torch.zeros_like(rows.sampler_logp)
        outputs = {name: empty.clone() for name in ("logp", "logp_ref", "values", "entropy")}
        sampled = {field.name: getattr(rows, field.name) for field in fields(rows)}
        return cls(**sampled, **outputs, scores=empty.new_zeros(len(rows)))


class ActorCritic(nn.Module):
    """Policy and critic in one module with one forward, so that one optimizer and one parallel engine hold both."""

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(
        self, batch: MicroBatch, tau: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities [b, T] at temperature tau, values [b, T], and the entropy [b, T] when asked for."""
        h = batch.states(self.actor)  # (N, d) in which the response tokens were chosen
        if with_entropy:
            logp, entropy = self.actor.token_logprobs_and_entropy(h, batch.tokens, tau)
        else:
            logp, entropy = self.actor.token_logprobs(h, batch.tokens, tau), None
        if self.critic.trunk is self.actor.trunk:  # --share-adapter
            values = self.critic.head(h)
        else:
            values = self.critic(batch.ids, batch.att, right_padded=True, at=batch.at)
        return batch.unpack(logp), batch.unpack(values), None if entropy is None else batch.unpack(entropy)


def split_minibatches(
    length: np.ndarray, minibatches: int, micro_batch: int, generator: np.random.Generator, max_tokens: int = 0
) -> list[list[np.ndarray]]:
    """Split B rows into minibatches at random, and each into micro-batches of like length.

    Args:
        length: [B] tokens of each row.
        minibatches: optimizer steps per pass. micro_batch: rows per forward pass, or with `max_tokens` as many as have
            no more than so many padded tokens; see `utils.data.batching.micro_batches`.

    Returns:
        Row indices: one list of micro-batches per minibatch; every row is in exactly one.
    """
    shuffled = generator.permutation(len(length))
    by_length = [rows[np.argsort(length[rows], kind="stable")] for rows in np.array_split(shuffled, minibatches)]
    return [micro_batches(rows, length, micro_batch, max_tokens) for rows in by_length]


def whiten_over_ranks(x: Tensor, mask: Tensor, runtime: Runtime, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` of x [B, T] by mean and variance over the rollouts of all ranks."""
    stats = Moments(*runtime.sum_over_ranks(torch.stack(masked_moments(x, mask))))
    return masked_whiten(x, mask, shift_mean, stats=stats)


class Rollouts:
    """Samples responses and has all four roles evaluate them."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        reward_model: nn.Module | None,
        reward_fn: ScoreTexts | None,
        config: PPOConfig,
        tokenizer: Tokenizer,
        runtime: Runtime,
        template: PromptTemplate | None = None,
    ) -> None:
        self.policy = policy
        self.template = template or PromptTemplate()
        self.actor = runtime.unwrap(policy).actor
        self.reference = reference
        self.reward_model = reward_model
        self.reward_fn = reward_fn
        self.config = config
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.sampler = Sampler.of(config, tokenizer, runtime, config.temperature, config.response_length)
        self.spread = {
            "model": Spread("the reward model (-c)", "look at it with -t reward, and run the doctor on its run"),
            "function": Spread(f"--reward-fn {config.reward_fn}", "print what it returns for two unlike responses"),
        }

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> Experience:
        """One response per prompt; the roles' outputs are still to be filled in by `evaluate_roles`."""
        return Experience.of(self.sampler.sample(self.actor, prompts, seeds))

    @torch.no_grad()
    def evaluate_roles(
        self, experience: Experience, micro_batches: Sequence[np.ndarray], phases: Phases | None = None
    ) -> None:
        """Fill in log-probabilities, values, entropy and scores; raises NonFiniteRollout unless all are finite.

        Log-probabilities are recomputed by the training forward in the very micro-batches of the first pass and not
        taken from the sampler: cached keys and bf16 drift would make the first importance ratio differ from 1.
        """
        tau, cause = self.config.temperature, None
        phases = phases or Phases(self.runtime.wait)
        with phases("score"):
            for rows in tqdm(micro_batches, desc="scoring", unit="batch", leave=False, delay=3):
                batch = experience.micro_batch(rows)
                T = batch.rmask.shape[1]
                logp, values, entropy = self.policy(batch, tau, with_entropy=True)
                experience.logp[batch.rows, :T] = logp
                experience.values[batch.rows, :T] = values
                experience.entropy[batch.rows, :T] = entropy
                if self.reward_model is not None:
                    with self.runtime.autocast():
                        experience.scores[batch.rows] = self.reward_model(batch.ids, batch.att, right_padded=True)
            if self.reward_model is not None:
                self.spread["model"].watch(experience.scores)
            if self.reward_fn is not None:
                cause = self._add_reward(experience, self.reward_fn)
        with phases("reference"):
            for rows in tqdm(micro_batches, desc="reference", unit="batch", leave=False, delay=3):
                batch = experience.micro_batch(rows)
                with self.runtime.autocast():
                    logp = self.reference.token_logprobs(batch.states(self.reference), batch.tokens, tau)
                experience.logp_ref[batch.rows, : batch.rmask.shape[1]] = batch.unpack(logp)
        check_rollout(experience, ("sampler_logp", "logp", "logp_ref", "values", "scores"), cause)

    def _add_reward(self, experience: Experience, reward_fn: ScoreTexts) -> NonFiniteReward | None:
        """Add the reward function's scores; returns its error if one of them is not finite."""
        cause = None
        try:
            given = reward_fn(*self.texts(experience))
        except NonFiniteReward as error:
            given, cause = error.scores, error
        self.spread["function"].watch(torch.tensor(given, dtype=torch.float64))
        extra = torch.tensor(given, device=experience.scores.device)
        # In place of the reward model the function counts in full, whatever its weight.
        experience.scores += extra if self.reward_model is None else self.config.reward_fn_weight * extra
        return cause

    def texts(self, experience: Experience) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, without EOS."""
        prompts = [self.template.decode_prompt(self.tokenizer, p) for p in experience.prompts()]
        return prompts, [self.tokenizer.decode(r) for r in experience.responses()]
