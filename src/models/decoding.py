"""One decoding step with as few operations as it takes: every row gets one token, from a filled KV cache.

Shapes: B rows, S tokens in the cache, V vocabulary.

No mask is built, weights are in the product's type and layout already, adapters are added and never merged. What the
blocks compute each family says in its `Decoder`; a test holds it against the family's whole model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import KVCache
from models.gpu import graphs
from models.kernels import decoding_linear, decoding_weight, product_dtype
from models.vocabulary import OutputTable


class DecodingLinear:
    """A linear layer (an `nn.Linear`, or a loralib one) for a few rows at a time."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = decoding_weight(layer.weight, dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.down = None
        if getattr(layer, "r", 0):
            self.down = layer.lora_A.detach().to(dtype)  # (r, in)
            self.up = (layer.lora_B.detach() * layer.scaling).to(dtype).t()  # (r, out)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x [B, in] of the product's type -> [B, out], with GPT-2's GELU behind it when asked for."""
        if self.down is None:
            return decoding_linear(x, self.weight, self.bias, gelu)
        y = torch.addmm(decoding_linear(x, self.weight, self.bias), F.linear(x, self.down), self.up)
        return F.gelu(y, approximate="tanh") if gelu else y


class FixedCache:
    """A KV cache at fixed places: written at the column that a tensor names, read as a whole.

    What is not filled yet is for the bias to hide. Where that is minus infinity its weight is 0, so it must not be NaN.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        for x in (*self.keys, *self.values):
            x[:, :, cache.length :] = 0
        self.column = torch.tensor([cache.length], device=cache.att.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`, for one column; returns all columns, filled or not."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.column, k.to(keys.dtype))
        values.index_copy_(2, self.column, v.to(values.dtype))
        return keys, values


class Decoder(ABC):
    """Steps of a model in eval mode whose cache holds the prompts (`model.hidden(prompts, att, cache)`).

    Where `models.gpu.graphs` serves, a step is recorded once and replayed: all it reads and writes stays in place.
    """

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        self.config, self.trunk, self.filled = model.config, model.trunk, cache
        self.cache: KVCache | FixedCache = cache
        self.dtype = product_dtype(model.token_table)
        self.layers = {m: DecodingLinear(m, self.dtype) for m in model.blocks.modules() if isinstance(m, nn.Linear)}
        self.output = OutputTable.of(model.output_table, model.config.vocab_size, self.dtype)
        seen = cache.att[:, : cache.length]
        self.position = seen.sum(1)  # (B,) of the next token
        self.fixed = graphs.serves(cache.att.device)
        self.bias = None
        if self.fixed or not bool(seen.all()):  # rows of one length need no mask
            B, S = cache.att.shape
            # Fused attention on a GPU wants the mask's rows to begin at multiples of eight.
            self.bias = torch.zeros(B, S + -S % 8, dtype=cache.keys[0].dtype, device=seen.device)
            self.bias[:, : cache.length].masked_fill_(~seen, float("-inf"))
        if self.fixed:
            self.bias[:, cache.length :] = float("-inf")
            self._fix()

    def _fix(self) -> None:
        self.cache, self.token = FixedCache(self.filled), torch.zeros_like(self.position)
        self.run, self.runs = self._fixed_step, 0

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with `rows` (int64 indices) only."""
        self.filled.keep_rows(rows)
        self.position = self.position[rows]
        self.bias = None if self.bias is None else self.bias[rows]
        if self.fixed:
            self._fix()

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Logits [B, V] fp32 after one more token [B] per row; in half precision up to a constant per row.

        Of a recorded step they are valid until the next.
        """
        with torch.autocast(token.device.type, enabled=False):
            if self.fixed:
                return self._replayed_step(token)
            S = self.filled.length + 1
            self.filled.att[:, S - 1] = True
            hidden = self.hidden(token, None if self.bias is None else self.bias[:, None, None, :S])
            self.filled.length = S
            self.position = self.position + 1
            return self.output.sampling_logits(hidden)

    def _replayed_step(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        if self.runs == 1:  # once as it is: what libraries do at their first call cannot be recorded
            self.run = graphs.record(self._fixed_step)
        self.runs += 1
        self.filled.length += 1
        return self.run()

    def _fixed_step(self) -> Tensor:
        """One step from `token` on; nothing in it waits for the device."""
        self.bias.index_fill_(1, self.cache.column, 0.0)
        hidden = self.hidden(self.token, self.bias[:, None, None, : self.filled.att.shape[1]])
        self.position.add_(1)
        self.cache.column.add_(1)
        return self.output.logits(hidden)

    @abstractmethod
    def hidden(self, token: Tensor, bias: Tensor | None) -> Tensor:
        """Final hidden states [B, d] of one more token [B]; bias [B, 1, 1, S], added to the scores, hides padding."""

    def linear(self, layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
        """x [B, in] -> [B, out] through a layer of the blocks: see `DecodingLinear`."""
        return self.layers[layer](x, gelu)

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x after a norm of the model, in the product's type."""
        return norm(x).to(self.dtype)
