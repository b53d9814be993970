"""What makes a language-model trunk a critic or a reward model, written once for every model family.

A role is a mixin put before the family's class (`class GPTCritic(CriticRole, GPT)`); it needs `config` and `hidden()`
from it. Both roles hold the same tensors, a trunk and one scalar head with a fixed affine, so a critic can start as a
copy of a reward model.

Shapes: B rows, L columns, d channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """gain * (w . h + b) + bias in fp32. w and b train; gain and bias, the reward's normalisation, are measured."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, n_embd))
        self.bias = nn.Parameter(torch.empty(1))
        self.register_buffer("norm_gain", torch.empty(()))
        self.register_buffer("norm_bias", torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random w, b 0, no normalisation."""
        # std 1 / sqrt(d + 1): lm_human_preferences/language/model.py, the reward head of Ziegler et al. 2019.
        self.weight.normal_(std=1 / math.sqrt(self.weight.shape[1] + 1))
        self.bias.zero_()
        self.norm_gain.fill_(1.0)
        self.norm_bias.fill_(0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> [...] fp32; bf16 could not tell 6.86 from 6.87."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)
            return self.norm_gain * raw + self.norm_bias


class ScalarRole(nn.Module):
    """A trunk with a scalar head."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.head = ScalarHead(config.n_embd)

    def set_normalisation(self, gain: float, bias: float) -> None:
        """Store the affine that gives SFT samples mean 0 and deviation 1 (lm_human_preferences/rewards.py:77-89).

        Raises:
            ValueError: it would turn scores around, make them all equal, or NaN.
        """
        if not (0 < gain < math.inf and math.isfinite(bias)):
            raise ValueError(f"a normalisation needs a positive gain and a finite bias, not {gain} and {bias}")
        self.head.norm_gain.fill_(gain)
        self.head.norm_bias.fill_(bias)

    @property
    def normalisation(self) -> tuple[float, float]:
        """(gain, bias)."""
        return self.head.norm_gain.item(), self.head.norm_bias.item()


class RewardRole(ScalarRole):
    """One score per row, read at the last real token (the EOS, when there is one)."""

    role = "reward"

    def forward(self, ids: Tensor, att: Tensor, right_padded: bool = False) -> Tensor:
        """Scores [B] fp32 of rows ids, att [B, L] with padding on either side."""
        B, L = att.shape
        last = (att * torch.arange(L, device=att.device)).argmax(1)  # (B,)
        at = last + L * torch.arange(B, device=att.device)
        return self.head(self.hidden(ids, att, right_padded=right_padded, at=at))


class CriticRole(ScalarRole):
    """The value of the state before each next token is chosen."""

    role = "critic"

    def forward(self, ids: Tensor, att: Tensor, right_padded: bool = False, at: Tensor | None = None) -> Tensor:
        """Values [B, L] fp32, or [N] with `at`: see `CausalLM.hidden`.

        Column j is the value after reading columns 0..j, before token j + 1 is chosen.
        """
        return self.head(self.hidden(ids, att, right_padded=right_padded, at=at))
