"""LLaMA by hand (Touvron et al. 2023, arXiv 2302.13971), with what its successors added: the trunk of a language model.

It differs from GPT-2 in its norm (RMSNorm), its positions (rotations of queries and keys, no table), heads of keys and
values that several heads of queries share, a gated feed-forward network, and no biases. SmolLM2, TinyLlama and
Llama 3.2 are LLaMAs.

Shapes: B rows, L tokens in this call, S tokens seen so far (S = L without a cache), nh heads of queries, nkv of keys
and values, hd channels per head, d channels of the residual stream. With `at` [N], indices into the B * L flattened
columns, only those are wanted.

Parameter names are those of Hugging Face (`model.layers.0.self_attn.q_proj`, ...), and so is the order of channels
that rotations take in pairs: i and i + hd / 2. (In the files of Meta it is 2 i and 2 i + 1.)
"""

from __future__ import annotations

import math
from functools import lru_cache
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.model_configs import LlamaConfig
from models.cache import KVCache, model_inputs
from models.causal_lm import CausalLM
from models.decoding import Decoder
from models.kernels import attention, attention_of_one, product_dtype
from models.lora import is_adapter, projection
from models.roles import CriticRole, RewardRole
from models.trunk import run_blocks, select_columns


class RMSNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d] in x's type. In fp32 inside, since squares overflow fp16.

        Rounded before the weight comes in, as in transformers.
        """
        if x.dtype == torch.float32:  # nothing is rounded, and it is one operation on a GPU
            return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps)
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


def wave_numbers(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Angle [hd / 2] in radians by which each pair of channels turns from one position to the next, fp32.

    Pair i turns by theta^(-2 i / hd) (Su et al. 2021, arXiv 2104.09864, section 3.3). "linear" divides all of them by
    the factor (Chen et al. 2023, arXiv 2306.15595); "llama3" those whose wave is longer than the old context, leaves
    those alone whose wave is much shorter, and blends between (Llama 3.1, models/llama3/reference_impl/model.py).
    """
    pairs = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = 1.0 / config.rope_theta**pairs
    if config.rope_type == "default":
        return angles
    stretched = angles / config.rope_factor
    if config.rope_type == "linear":
        return stretched
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    waves = config.rope_original_context * angles / (2 * math.pi)  # in the old context
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * stretched + kept * angles


# Not a buffer, which `.to(bfloat16)` or a loaded checkpoint could round.
_wave_numbers = lru_cache(maxsize=64)(wave_numbers)


def rotation(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` turns channels by at positions [B, L] (or [L]): (cos, cos) and (-sin, sin) of the angles, each
    [B, 1, L, hd] (or [1, 1, L, hd]) in fp32."""
    angles = positions.float()[..., None] * _wave_numbers(config, positions.device)
    angles = angles.view(-1, 1, *angles.shape[-2:])
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, nh, L, hd] with each pair of channels (i, i + hd / 2) turned, in x's type: see `rotation`.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """A turn's derivative is the turn back, so nothing of x has to be kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class LlamaAttention(nn.Module):
    """Causal self-attention; `n_head / n_kv_head` neighbouring heads of queries share one of keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        d, bias = config.n_embd, config.attention_bias
        queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = projection(config, d, queries, bias)
        self.k_proj = projection(config, d, keys, bias)
        self.v_proj = projection(config, d, keys, bias)
        self.o_proj = projection(config, queries, d, bias)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int,
        at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, L, d] -> [B, L, d] or [N, d]; turn: `rotation`; mask: bool [B, 1, L, S], None: causal."""
        B, L, _ = x.shape
        x = x.to(product_dtype(x))  # once, and not for each of the three products
        q, k, v = (
            p(x).view(B, L, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, nh, L, hd), (B, nkv, L, hd) twice
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))  # (B, nkv, S, hd)
        y = attention(q, k, v, mask, causal=mask is None and L > 1)  # (B, nh, L, hd)
        return self.o_proj(select_columns(y.transpose(1, 2).reshape(B, L, -1), at))


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, inner, bias = config.n_embd, config.n_inner, config.mlp_bias
        self.gate_proj = projection(config, d, inner, bias)
        self.up_proj = projection(config, d, inner, bias)
        self.down_proj = projection(config, inner, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        x = x.to(product_dtype(x))  # once, and not for each of the two products
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """RMSNorm before each of attention and feed-forward, both added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int,
        at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, L, d] -> [B, L, d] or [N, d]; turn and mask as in attention."""
        x = select_columns(x, at) + self.self_attn(self.input_layernorm(x), turn, mask, cache, layer, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaTrunk(nn.Module):
    """Token table, the blocks, the final RMSNorm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.n_embd)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.rms_norm_eps)

    def forward(
        self, ids: Tensor, att: Tensor | None, cache: KVCache | None, right_padded: bool, at: Tensor | None = None
    ) -> Tensor:
        """ids, att [B, L] -> final hidden states [B, L, d] or [N, d]."""
        ids, positions, mask = model_inputs(ids, att, cache, right_padded, self.config.block_size)
        turn = rotation(self.config, positions)
        return self.norm(run_blocks(self, self.layers, self.embed_tokens(ids), (turn, mask), cache, at))


class Llama(CausalLM):
    """A LLaMA language model."""

    family, trunk_name, only_for_language = "llama", "model", ("output.weight",)
    token_table = property(attrgetter("model.embed_tokens.weight"))
    blocks = property(attrgetter("model.layers"))
    final_norm = property(attrgetter("model.norm"))

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaTrunk(config)
        if self.has_output:
            # A table of rows to look up in form, so that it stays in fp32 as the tied one does.
            self.output = nn.Embedding(config.embedding_rows, config.n_embd)
        self._init_weights()

    @property
    def has_output(self) -> bool:
        """Whether it projects onto the vocabulary by a table of its own; critics and reward models never do."""
        return self.role == "lm" and not self.config.tied

    @property
    def output_table(self) -> nn.Parameter:
        """[>= V, d], what hidden states are projected onto the vocabulary with."""
        return self.output.weight if self.has_output else self.token_table

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As in transformers: N(0, init_std) in every matrix, norms 1, biases 0. Adapters are loralib's."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not is_adapter(name) and not name.startswith("head."):
                parameter.normal_(0.0, self.config.init_std)
            elif name.endswith("bias"):
                parameter.zero_()

    def decoder(self, cache: KVCache) -> LlamaDecoder:
        """Steps of one token per row behind what the cache holds."""
        return LlamaDecoder(self, cache)


class LlamaActor(Llama):
    """The policy: a language model under its name in PPO."""


class LlamaCritic(CriticRole, Llama):
    """State values from a LLaMA trunk with a scalar head."""


class LlamaRewardModel(RewardRole, Llama):
    """One score per sequence from a LLaMA trunk with a scalar head."""


class LlamaDecoder(Decoder):
    """`Llama.hidden` for one column, written flat: see `models.decoding`."""

    def hidden(self, token: Tensor, bias: Tensor | None) -> Tensor:
        """Final hidden states [B, d] of one more token [B]; bias [B, 1, 1, S]."""
        B, nkv, hd = len(token), self.config.n_kv_head, self.config.head_dim
        x = F.embedding(token, self.trunk.embed_tokens.weight)  # (B, d)
        turn = rotation(self.config, self.position[:, None])
        for layer, block in enumerate(self.trunk.layers):
            attn, mlp, y = block.self_attn, block.mlp, self.norm(block.input_layernorm, x)
            q, k, v = (
                self.linear(p, y).view(B, nkv, -1, hd) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
            )  # (B, nkv, nh / nkv, hd), (B, nkv, 1, hd) twice
            k, v = self.cache.append(layer, rotate(k, *turn), v)  # (B, nkv, S, hd)
            y = attention_of_one(rotate(q, *turn).to(k.dtype), k, v, bias)  # (B, nkv, nh / nkv, hd)
            x = x + self.linear(attn.o_proj, y.reshape(B, -1).to(self.dtype))
            y = self.norm(block.post_attention_layernorm, x)
            y = F.silu(self.linear(mlp.gate_proj, y)) * self.linear(mlp.up_proj, y)
            x = x + self.linear(mlp.down_proj, y)
        return self.norm(self.trunk.norm, x)
