"""The scale of a reward: a reward model's affine, which gives its scores of SFT samples mean 0 and deviation 1.

Without it beta, the value clip and the penalty for a missing EOS would mean something else for every reward model.
Source: lm_human_preferences rewards.py:77-89 and train_reward.py:207-219, which measure on samples of the policy, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.configs import RMConfig
from config.user_error import UserError
from training.engine.runtime import Runtime
from training.loop import SCALE_SAMPLES, row_seeds
from training.sampling import SampledRows, Sampler
from utils.data.batching import micro_batches
from utils.dataset import RankedDataset
from utils.loss import reward_affine
from utils.tokenizer import Tokenizer

_ENOUGH = 16  # rewards that are alike by chance are fewer


@contextlib.contextmanager
def kept_affine(model: nn.Module, description: dict[str, Any]) -> Iterator[None]:
    """Puts a model's affine, and what `RewardScale.normalise` noted of it, back at the end."""
    affine, noted = model.normalisation, description.get("normalised")
    yield
    model.set_normalisation(*affine)
    description["normalised"] = noted


@dataclass
class RewardScale:
    """Measures gain and bias of a reward model, always on the same samples, drawn exactly as PPO draws its rollouts."""

    sft: nn.Module  # what PPO starts from
    prompts: Sequence[np.ndarray]  # they leave room for a response in its context
    seeds: Sequence[int]
    sampler: Sampler

    @classmethod
    def of(
        cls, config: RMConfig, sft: nn.Module, train: RankedDataset, tokenizer: Tokenizer, runtime: Runtime
    ) -> RewardScale:
        """On training prompts drawn at random, with the sampler that PPO will use."""
        room = (config.max_length or sft.config.block_size) - config.response_length
        order = np.random.default_rng(config.seed).permutation(len(train))[: config.normalise_prompts]
        prompts = [train[i].prompt_ids[0][-room:] for i in order]
        sampler = Sampler.of(config, tokenizer, runtime, config.temperature, config.response_length)
        return cls(sft, prompts, row_seeds(config.seed, SCALE_SAMPLES, len(prompts)), sampler)

    @staticmethod
    def check_rows(dataset: str, count: int) -> None:
        """UserError where `count` training prompts cannot give a scale, because one sample has no deviation."""
        if count < 2:
            raise UserError(
                f"--dataset {dataset}: leaves the reward model {count} training prompt, and the scale of its scores is "
                "their deviation on samples to two or more; give a dozen different prompts (some are kept for "
                "validation, test and PPO)"
            )

    @cached_property
    def samples(self) -> SampledRows:
        """One response of the SFT model to each prompt; sampled when first asked for, because it takes a while."""
        return self.sampler.sample(self.sft, self.prompts, self.seeds)

    def normalise(self, model: nn.Module, step: int, description: dict[str, Any]) -> dict[str, float]:
        """`measure`, noted in the description of the checkpoints to come; what the raw scores were, and the affine."""
        raw, sampler = self.measure(model), self.sampler
        sampled = {"temperature": sampler.temperature, "response_length": sampler.response_length}
        description["normalised"] = {"step": step, "samples": len(raw), **sampled}
        gain, bias = model.normalisation
        return {"raw_mean": float(raw.mean()), "raw_sd": float(raw.std(correction=0)), "gain": gain, "bias": bias}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """Set the affine of `model` and return the raw scores [N] of the samples, taken with gain 1 and bias 0.

        ValueError where they do not vary, or are not finite; it says why, and what may help.
        """
        was_training = model.training
        model.eval()
        model.set_normalisation(1.0, 0.0)
        rows = np.argsort(self.samples.lengths, kind="stable")
        raw = torch.zeros(len(rows), device=self.sampler.runtime.device)
        sizes = (self.sampler.batch_size, self.sampler.max_tokens)
        for part in micro_batches(rows, self.samples.lengths, *sizes):
            batch = self.samples.micro_batch(part)
            with self.sampler.runtime.autocast():
                raw[batch.rows] = model(batch.ids, batch.att, right_padded=True)
        try:
            gain, bias = reward_affine(raw)
        except ValueError as error:
            raise ValueError(f"{error}: {self._why_alike(raw)}") from error
        model.set_normalisation(float(gain), float(bias))
        model.train(was_training)
        return raw

    def _why_alike(self, raw: Tensor) -> str:
        """Why scores [N] have no deviation, and the remedy."""
        if not bool(raw.isfinite().all()):
            return "the reward model gives numbers that are not finite; lower --lr"
        different = len({tuple(row) for row in self.samples.responses()})
        if different == 1:
            return f"the SFT model gave one answer to all {len(raw)} prompts; raise --temperature, or train it further"
        few = f"{len(raw)} samples are few: give more rows; else " if len(raw) < _ENOUGH else ""
        return f"the reward model scores {different} different answers alike; {few}lower --lr"


@dataclass
class Spread:
    """Watches the first rewards of a run, and tells once where they do not tell responses apart."""

    source: str  # what gives them, with its flag
    remedy: str
    alike: int = 0  # so many so far, in batches of which each was alike
    settled: bool = False  # told, or they differ

    def watch(self, scores: Tensor) -> None:
        """Take the scores [B] of a batch into account.

        Alike is what rounding may cause, a millionth of their size: PPO whitens advantages, and what it would then
        learn from is noise. Batches may differ from each other, for PPO compares within one.
        """
        if self.settled or len(scores) < 2:
            return
        scores = scores.double()
        size = float(scores.abs().max())
        self.settled = not float(scores.max() - scores.min()) <= 1e-6 * max(1.0, size)
        self.alike += len(scores)
        if not self.settled and self.alike >= _ENOUGH:
            self.settled = True
            tqdm.write(
                f"warning: the first {self.alike} rewards of {self.source} are alike (the last is {scores[-1]:.6g}); "
                f"PPO learns from their differences alone: {self.remedy}"
            )
