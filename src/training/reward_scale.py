"""The scale of a reward model: the affine that gives its scores of SFT samples mean 0 and deviation 1.

Without it beta, the value clip and the penalty for a missing EOS would mean something else for every reward model.
Source: lm_human_preferences rewards.py:77-89 and train_reward.py:207-219, which measure on samples of the policy, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from training.sampling import SampledRows, Sampler
from utils.data.batching import micro_batches
from utils.loss import reward_affine


class RewardScale:
    """Measures gain and bias of a reward model, always on the same samples, drawn exactly as PPO draws its rollouts."""

    def __init__(self, sft: nn.Module, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampler: Sampler) -> None:
        """Args: `sft` is what PPO starts from; `prompts` leave room for a response in its context."""
        self.sft = sft
        self.prompts = prompts
        self.seeds = seeds
        self.sampler = sampler

    @cached_property
    def samples(self) -> SampledRows:
        """One response of the SFT model to each prompt; sampled when first asked for, because it takes a while."""
        return self.sampler.sample(self.sft, self.prompts, self.seeds)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """Set the affine of `model` and return the raw scores [N] of the samples, taken with gain 1 and bias 0.

        Raises:
            ValueError: the scores do not vary, or are not finite.
        """
        was_training = model.training
        model.eval()
        model.set_normalisation(1.0, 0.0)
        assert model.normalisation == (1.0, 0.0)
        rows = np.argsort(self.samples.lengths, kind="stable")
        raw = torch.zeros(len(rows), device=self.sampler.runtime.device)
        sizes = (self.sampler.batch_size, self.sampler.max_tokens)
        for part in micro_batches(rows, self.samples.lengths, *sizes):
            batch = self.samples.micro_batch(part)
            with self.sampler.runtime.autocast():
                raw[batch.rows] = model(batch.ids, batch.att, right_padded=True)
        gain, bias = reward_affine(raw)
        model.set_normalisation(float(gain), float(bias))
        model.train(was_training)
        return raw
