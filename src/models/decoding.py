"""One decoding step of a GPT-2 with as few operations as it takes: every row gets one token, from a filled KV cache.

Shapes: B rows, S tokens in the cache, nh heads, hd channels per head, d = nh * hd, V vocabulary.

This is `GPT.hidden` for one column, written flat: no mask is built, weights are in the product's type and layout
already (`models.cpu.packing`), adapters are added and never merged. A test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.attention import attend_one
from models.cpu.packing import decoding_weight, packed_linear
from models.vocabulary import OutputTable, product_dtype

if TYPE_CHECKING:
    from models.gpt import GPT, KVCache


class DecodingLinear:
    """A linear layer with its adapter, for a few rows at a time.

    Args:
        layer: an `nn.Linear`, or a loralib one.
        dtype: type of the product. gelu: apply GPT-2's GELU to the output.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, gelu: bool = False) -> None:
        weight = layer.weight
        if weight.dtype == dtype and weight.device.type != "cpu":
            self.weight, self.packed = weight, None
        else:
            self.weight, self.packed = decoding_weight(weight, dtype)
        self.bias = layer.bias.detach().to(dtype)
        self.gelu = gelu
        self.down = self.up = None
        if getattr(layer, "r", 0):
            self.down = layer.lora_A.detach().to(dtype)  # (r, in)
            self.up = (layer.lora_B.detach() * layer.scaling).to(dtype).t()  # (r, out)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, in] of the product's type -> [B, out]."""
        fused = self.gelu and self.down is None and self.packed is not None
        y = (
            packed_linear(x, self.packed, self.bias, fused)
            if self.packed is not None
            else F.linear(x, self.weight, self.bias)
        )
        if self.down is not None:
            y = torch.addmm(y, F.linear(x, self.down), self.up)
        return F.gelu(y, approximate="tanh") if self.gelu and not fused else y


@dataclass
class _Block:
    ln_1: nn.LayerNorm
    qkv: DecodingLinear
    out: DecodingLinear
    ln_2: nn.LayerNorm
    fc: DecodingLinear
    proj: DecodingLinear


class Decoder:
    """Steps of a GPT whose cache holds the prompts.

    Args:
        model: in eval mode. cache: filled by `model.hidden(prompts, att, cache)`.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        trunk, config = model.transformer, model.config
        self.config, self.cache, self.trunk = config, cache, trunk
        self.dtype = product_dtype(trunk.wpe.weight)
        self.blocks = [
            _Block(
                b.ln_1, DecodingLinear(b.attn.c_attn, self.dtype), DecodingLinear(b.attn.c_proj, self.dtype), b.ln_2,
                DecodingLinear(b.mlp.c_fc, self.dtype, gelu=True), DecodingLinear(b.mlp.c_proj, self.dtype),
            )
            for b in trunk.h
        ]  # fmt: skip
        self.output = OutputTable.of(trunk.wte.weight, config.vocab_size, self.dtype)
        seen = cache.att[:, : cache.length]
        self.position = seen.sum(1)  # (B,) of the next token
        self.bias = None
        if not bool(seen.all()):  # rows of one length need no mask
            B, S = cache.att.shape
            # Fused attention on a GPU wants the mask's rows to begin at multiples of eight.
            self.bias = torch.zeros(B, S + -S % 8, dtype=cache.keys[0].dtype, device=seen.device)
            self.bias[:, : cache.length].masked_fill_(~seen, float("-inf"))

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with `rows` (int64 indices) only."""
        self.cache.keep_rows(rows)
        self.position = self.position[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Logits [B, V] fp32 after one more token [B] per row; in half precision up to a constant per row."""
        with torch.autocast(token.device.type, enabled=False):
            return self.output.sampling_logits(self._hidden(token))

    def _hidden(self, token: Tensor) -> Tensor:
        cache, B, nh = self.cache, len(token), self.config.n_head
        S = cache.length + 1
        cache.att[:, cache.length] = True
        mask = None if self.bias is None else self.bias[:, None, None, :S]
        x = F.embedding(token, self.trunk.wte.weight) + F.embedding(self.position, self.trunk.wpe.weight)  # (B, d)
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(self._normed(block.ln_1, x)).view(B, 3, nh, 1, -1)
            q, k, v = qkv.unbind(1)  # each (B, nh, 1, hd)
            k, v = cache.append(layer, k, v)  # (B, nh, S, hd)
            y = attend_one(q.to(k.dtype), k, v, mask)
            x = x + block.out(y.view(B, -1).to(self.dtype))
            x = x + block.proj(block.fc(self._normed(block.ln_2, x)))
        cache.length = S
        self.position = self.position + 1
        return self._normed(self.trunk.ln_f, x)

    def _normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(self.dtype)
