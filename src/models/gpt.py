"""GPT-2 by hand (Radford et al. 2019): the trunk of a language model.

Shapes: B rows, L tokens in this call, S tokens seen so far (S = L without a cache), nh heads, hd channels per head,
d = nh * hd channels. With `at` [N], indices into the B * L flattened columns, only those are wanted.

Parameter names are GPT-2's own (`wte`, `wpe`, `h.0.attn.c_attn`, ...). Positions and mask of padded rows are made in
`models.cache`; `models.kernels` says attention, GELU and projections in torch's own words. The forward pass with its
logits (the output projection is `wte`), losses and sampling stand on the trunk in `models.causal_lm`.
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.model_configs import GPTConfig
from models.cache import KVCache, model_inputs
from models.causal_lm import CausalLM
from models.decoding import Decoder
from models.kernels import attention, attention_of_one, gelu
from models.lora import projection
from models.roles import CriticRole, RewardRole
from models.trunk import run_blocks, select_columns


class MaskedMultiheadSelfAttention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = projection(config, config.n_embd, 3 * config.n_embd)
        self.c_proj = projection(config, config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int, at: Tensor | None = None
    ) -> Tensor:
        """x [B, L, d] -> [B, L, d] or [N, d]; mask: bool [B, 1, L, S], true where a query may look, None: causal."""
        B, L, d = x.shape
        qkv = self.c_attn(x).view(B, L, 3, self.n_head, d // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, L, hd)
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))  # (B, nh, S, hd)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, causal=mask is None and L > 1, dropout=dropout)  # (B, nh, L, hd)
        y = y.transpose(1, 2).reshape(B, L, d)
        return self.resid_dropout(self.c_proj(select_columns(y, at)))


class FeedForwardNetworks(nn.Module):
    """Two projections with the tanh approximation of GELU between them, as in the released GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = projection(config, config.n_embd, 4 * config.n_embd)
        self.c_proj = projection(config, 4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


class TransformerDecoderBlock(nn.Module):
    """LayerNorm before each of attention and feed-forward, both added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.attn = MaskedMultiheadSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.mlp = FeedForwardNetworks(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int, at: Tensor | None = None
    ) -> Tensor:
        """x [B, L, d] -> [B, L, d] or [N, d]; mask as in attention."""
        x = select_columns(x, at) + self.attn(self.ln_1(x), mask, cache, layer, at)
        return x + self.mlp(self.ln_2(x))


class TransformerDecoder(nn.Module):
    """Token and position tables, the blocks, the final LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.embedding_rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(TransformerDecoderBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)

    def forward(
        self, ids: Tensor, att: Tensor | None, cache: KVCache | None, right_padded: bool, at: Tensor | None = None
    ) -> Tensor:
        """ids, att [B, L] -> final hidden states [B, L, d] or [N, d]."""
        ids, positions, mask = model_inputs(ids, att, cache, right_padded, self.config.block_size)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, L, d)
        return self.ln_f(run_blocks(self, self.h, x, (mask,), cache, at))


class GPT(CausalLM):
    """A GPT-2 language model."""

    family, trunk_name = "gpt2", "transformer"
    token_table = property(attrgetter("transformer.wte.weight"))
    blocks = property(attrgetter("transformer.h"))
    final_norm = property(attrgetter("transformer.ln_f"))

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.transformer = TransformerDecoder(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As in transformers: N(0, init_std), residual projections divided by sqrt(2 * n_layer) as in GPT-2's paper.

        (OpenAI's own code starts `wpe` at 0.01.) Adapters are loralib's.
        """
        std = self.config.init_std
        for name, parameter in self.transformer.named_parameters():
            if name.endswith(("lora_A", "lora_B")) or ".ln_" in name or name.startswith("ln_"):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            else:
                parameter.normal_(0.0, std)

    def decoder(self, cache: KVCache) -> GPTDecoder:
        """Steps of one token per row behind what the cache holds."""
        return GPTDecoder(self, cache)


class GPTActor(GPT):
    """The policy: a language model under its name in PPO."""


class GPTCritic(CriticRole, GPT):
    """State values from a GPT-2 trunk with a scalar head."""


class GPTRewardModel(RewardRole, GPT):
    """One score per sequence from a GPT-2 trunk with a scalar head."""


class GPTDecoder(Decoder):
    """`GPT.hidden` for one column, written flat: see `models.decoding`."""

    def hidden(self, token: Tensor, bias: Tensor | None) -> Tensor:
        """Final hidden states [B, d] of one more token [B]; bias [B, 1, 1, S]."""
        B, nh, trunk = len(token), self.config.n_head, self.trunk
        x = F.embedding(token, trunk.wte.weight) + F.embedding(self.position, trunk.wpe.weight)  # (B, d)
        for layer, block in enumerate(trunk.h):
            qkv = self.linear(block.attn.c_attn, self.norm(block.ln_1, x)).view(B, 3, nh, 1, -1)
            q, k, v = qkv.unbind(1)  # each (B, nh, 1, hd)
            k, v = self.cache.append(layer, k, v)  # (B, nh, S, hd)
            y = attention_of_one(q.to(k.dtype), k, v, bias)  # (B, nh, 1, hd)
            x = x + self.linear(block.attn.c_proj, y.view(B, -1).to(self.dtype))
            y = self.linear(block.mlp.c_fc, self.norm(block.ln_2, x), gelu=True)
            x = x + self.linear(block.mlp.c_proj, y)
        return self.norm(trunk.ln_f, x)
