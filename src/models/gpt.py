"""GPT-2 by hand, with LoRA, a KV cache and padding on either side (Radford et al. 2019).

Shapes: B rows, L tokens in this call, S tokens seen so far (S = L without a cache), nh heads, hd channels per head,
d = nh * hd channels, V vocabulary. Parameter names are GPT-2's own (`wte`, `wpe`, `h.0.attn.c_attn`, ...).

Padding: `att[b, s]` says which tokens are real. Position ids count real tokens only (`clamp(cumsum(att) - 1, 0)`), so a
row means the same with any amount of padding on either side; GPT-2's positions are absolute, and without this a
left-padded row is silently wrong. PAD is an id outside the token table: it is replaced by 0 before the lookup and
hidden by the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.configs import GPTConfig
from models import vocabulary
from models.cpu.activation import gelu
from models.cpu.attention import attend
from models.decoding import Decoder
from models.lora import freeze_weights, projection
from models.roles import CriticRole, RewardRole
from models.weights import checkpoint as model_checkpoint
from models.weights import huggingface

if TYPE_CHECKING:
    from models.generation import Generation


@dataclass
class KVCache:
    """Keys and values of everything seen so far, preallocated.

    keys, values: one [B, nh, S_max, hd] tensor per layer; in a CPU's memory the keys of a head lie as [hd, S_max], as a
    query meets them (`models.cpu.attention.attend_one`). length: columns filled; the others hold anything.
    att: [B, S_max] bool, which are real.
    """

    keys: list[Tensor]
    values: list[Tensor]
    att: Tensor
    length: int = 0

    @staticmethod
    def dtype_on(device: str, product: torch.dtype) -> torch.dtype:
        """Type of keys and values where matrix products are taken in `product`: the same, but fp32 on a CPU.

        Reading half as many bytes gains nothing there: with keys in bf16 sampling of 8 rows was a few percent slower,
        of 32 rows as fast (torch 2.13, GPT-2 124M, 2 cores of an AMD EPYC).
        """
        return torch.promote_types(product, torch.float32) if device == "cpu" else product

    @classmethod
    def allocate(cls, config: GPTConfig, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `rows` sequences of at most `columns` tokens."""
        shape = (rows, config.n_head, columns, config.head_dim)
        keys, values = (
            [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        if device.type == "cpu":  # the same shape, but the other order in memory
            keys = [k.view(rows, config.n_head, config.head_dim, columns).transpose(2, 3) for k in keys]
        return cls(keys, values, torch.zeros(rows, columns, device=device, dtype=torch.bool))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, nh, L, hd] behind what layer `layer` holds; returns all its keys and values [B, nh, S, hd]."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        if self.length == 0:  # these are all, and in the order in which attention reads them fastest
            return k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64 indices), so that finished sequences cost nothing more."""
        for i, (k, v) in enumerate(zip(self.keys, self.values)):  # one layer's old and new ones at a time
            self.keys[i] = k[rows] if k.is_contiguous() else k.transpose(2, 3)[rows].transpose(2, 3)
            self.values[i] = v[rows]
        self.att = self.att[rows]


def pick(x: Tensor, at: Tensor | None) -> Tensor:
    """The columns `at` [N] of x [B, L, d] as [N, d]; all of x without `at`."""
    return x if at is None else x.flatten(0, 1)[at]


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
        """x [B, L, d] -> [B, L, d], or [N, d] at the flattened columns `at`.

        mask: bool [B, 1, L, S], true where a query may look, or None for plain causal attention.
        """
        B, L, d = x.shape
        qkv = self.c_attn(x).view(B, L, 3, self.n_head, d // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, L, hd)
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))  # (B, nh, S, hd)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, causal=mask is None and L > 1, dropout=dropout)  # (B, nh, L, hd)
        y = y.transpose(1, 2).reshape(B, L, d)
        return self.resid_dropout(self.c_proj(pick(y, at)))


class FeedForwardNetworks(nn.Module):
    """Two projections with the tanh approximation of GELU between them, as in the released GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = projection(config, config.n_embd, 4 * config.n_embd)
        self.c_proj = projection(config, 4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, d] -> [B, L, d]."""
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
        """x [B, L, d] -> [B, L, d], or [N, d] at the flattened columns `at`."""
        x = pick(x, at) + self.attn(self.ln_1(x), mask, cache, layer, at)
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
        """ids, att [B, L] -> final hidden states [B, L, d], or [N, d] at the flattened columns `at`."""
        ids, positions, mask = self._inputs(ids, None if att is None else att.bool(), cache, right_padded)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, L, d)
        recompute = self.config.activation_checkpointing and self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            # Behind the last attention no column looks at another: the rest is computed where it is asked for.
            wanted = at if layer == len(self.h) - 1 else None
            if recompute:
                # Non-reentrant: the reentrant form gives adapters no gradient when the embeddings are frozen.
                x = checkpoint(block, x, mask, None, 0, wanted, use_reentrant=False)
            elif cache is None:
                x = block(x, mask, None, 0, wanted)  # the number is the cache's; torch.compile tells blocks apart by it
            else:
                # Never compiled (`training.engine.compiling`): a cache has another shape at every call.
                x = block.forward(x, mask, cache, layer, wanted)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.ln_f(x)

    def _inputs(
        self, ids: Tensor, att: Tensor | None, cache: KVCache | None, right_padded: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids safe to look up [B, L], position ids [B, L] or [L], mask [B, 1, L, S] (None: plain causal)."""
        B, L = ids.shape
        seen = cache.length if cache is not None else 0
        if seen + L > self.config.block_size:
            raise ValueError(f"{seen + L} tokens do not fit the context of {self.config.block_size}")
        if seen == 0 and (att is None or right_padded):
            # Rows start at column 0: causal attention hides the padding behind each row without a mask.
            if cache is not None:
                cache.att[:, :L] = True if att is None else att
            positions = torch.arange(L, device=ids.device)
            return ids if att is None else ids.masked_fill(~att, 0), positions, None
        if att is None:
            att = torch.ones(B, L, dtype=torch.bool, device=ids.device)
        all_att = att
        if cache is not None:
            cache.att[:, seen : seen + L] = att
            all_att = cache.att[:, : seen + L]
        positions = (all_att.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        causal = torch.ones(L, seen + L, dtype=torch.bool, device=ids.device).tril(seen)
        mask = all_att[:, None, None, :] & causal  # (B, 1, L, S)
        # A padding query that may look at nothing would be a softmax over nothing: let each query see itself.
        own = torch.eye(L, dtype=torch.bool, device=ids.device)
        mask[:, :, :, seen:] |= own
        return ids.masked_fill(~att, 0), positions, mask


class GPT(nn.Module):
    """A GPT-2 language model. The output projection is the token table itself (tied by construction)."""

    role = "lm"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TransformerDecoder(config)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """GPT-2's: N(0, init_std), residual projections divided by sqrt(2 * n_layer). Adapters are loralib's."""
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

    def hidden(
        self, ids: Tensor, att: Tensor | None = None, cache: KVCache | None = None, right_padded: bool = False,
        at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Final hidden states.

        Args:
            ids: [B, L] int64; anything may stand where att is false.
            att: [B, L] bool (or 0 and 1), true on real tokens; None when all are. Padding may be on either side.
            cache: keys and values of the tokens before these; this call's are appended.
            right_padded: promise that every row starts at column 0, which saves building a mask (with a cache as long
                as that is empty).
            at: [N] int64 indices into the B * L flattened columns; the last block's second half and the final LayerNorm
                are computed only there.

        Returns:
            [B, L, d], or [N, d] with `at`; the states at padding are meaningless but finite.

        Raises:
            ValueError: more tokens than the context holds.
        """
        return self.transformer(ids, att, cache, right_padded, at)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 from hidden states [..., d].

        Under bf16 or fp16 autocast they are right up to a constant per position: see `models.vocabulary`.
        """
        return vocabulary.logits(hidden, self.transformer.wte.weight, self.config.vocab_size)

    def token_logprobs(self, hidden: Tensor, tokens: Tensor, tau: float = 1.0) -> Tensor:
        """Log-probabilities [N] of tokens [N] chosen in states [N, d]. See `models.vocabulary.token_logprobs`."""
        return vocabulary.token_logprobs(hidden, self.transformer.wte.weight, self.config.vocab_size, tokens, tau)

    def token_logprobs_and_entropy(self, hidden: Tensor, tokens: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
        """`token_logprobs` and the entropy [N] of each distribution, without gradients."""
        return vocabulary.token_logprobs_and_entropy(
            hidden, self.transformer.wte.weight, self.config.vocab_size, tokens, tau
        )

    def token_loss_sum(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Sum of the cross-entropies of tokens [N] after states [N, d], in nats."""
        return vocabulary.token_loss_sum(hidden, self.transformer.wte.weight, self.config.vocab_size, tokens)

    def decoder(self, cache: KVCache) -> Decoder:
        """Steps of one token per row behind what the cache holds. See `models.decoding`."""
        return Decoder(self, cache)

    def forward(
        self, ids: Tensor, att: Tensor | None = None, right_padded: bool = False, at: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits in fp32; those of column j predict column j + 1. With `targets` the loss of predicting these.

        Args:
            ids, att, right_padded: see `hidden`.
            at: [N] int64 indices into the B * L flattened columns; only those are projected onto the vocabulary, which
                is most of the memory of a language model's loss.
            targets: [N] int64, the tokens behind the columns `at`. (A prepared module is called through its forward
                pass, where precision and ranks are dealt with; so the loss of supervised fine-tuning is made here.)

        Returns:
            [B, L, V], or [N, V] with `at`; with `targets` the sum of their cross-entropies in nats [].
        """
        h = self.hidden(ids, att, right_padded=right_padded, at=at)
        return self.lm_head(h) if targets is None else self.token_loss_sum(h, targets)

    def freeze_weights(self, method: str) -> None:
        """Choose what trains: "lora", "last_block" or "none"; heads always do. See `models.lora.freeze_weights`."""
        freeze_weights(self, method)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, config: GPTConfig | None = None, adapters: str = "keep") -> Self:
        """Load one of our checkpoint folders into this role. See `models.weights.checkpoint.load_model`."""
        return model_checkpoint.load_model(cls, Path(folder), config, adapters)

    @classmethod
    def from_pretrained(cls, name_or_path: str, config: GPTConfig | None = None, vocab_size: int | None = None) -> Self:
        """Load GPT-2 weights in Hugging Face's form. See `models.weights.huggingface.load_pretrained`."""
        return huggingface.load_pretrained(cls, name_or_path, config, vocab_size)

    def save_pretrained(self, folder: str | Path, eos_id: int | None = None) -> None:
        """Write a folder that `transformers.GPT2LMHeadModel` loads: `models.weights.huggingface`."""
        huggingface.save_pretrained(self, Path(folder), eos_id)

    def generate(self, prompt: Tensor, max_new_tokens: int, eos_id: int, **sampling) -> Tensor:
        """Continue one prompt [P] of token ids; returns the new ids [n], EOS included. See `batch_generate`."""
        return self.batch_generate([prompt], max_new_tokens, eos_id, **sampling).row(0)

    def batch_generate(self, prompts: list, max_new_tokens: int, eos_id: int, **sampling) -> Generation:
        """Continue prompts of mixed length. See `models.generation.generate`."""
        # Imported here, because inference is built on models and not the other way round.
        from models.generation import generate

        return generate(self, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, **sampling)


class GPTActor(GPT):
    """The policy: a language model under its name in PPO."""


class GPTCritic(CriticRole, GPT):
    """State values from a GPT-2 trunk with a scalar head."""


class GPTRewardModel(RewardRole, GPT):
    """One score per sequence from a GPT-2 trunk with a scalar head."""
