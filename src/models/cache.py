"""The KV cache, and what a call behind it may look at: position ids and attention mask, for padding on either side.

Shapes: B rows, L tokens in this call, S tokens seen so far (S = L without a cache), nh heads of keys and values, hd
channels per head.

`att[b, s]` says which tokens are real. Position ids count real tokens only (`clamp(cumsum(att) - 1, 0)`), so that a row
means the same with any amount of padding on either side: GPT-2's positions are absolute, and without this a left-padded
row is silently wrong. PAD is an id outside the token table: it is replaced by 0 before the lookup and hidden by the
mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from config.model_configs import ModelConfig
from models import kernels


@dataclass
class KVCache:
    """Keys and values of everything seen so far, preallocated.

    keys, values: one [B, nh, S_max, hd] tensor per layer, of which `length` columns are filled; the others hold
    anything. att: [B, S_max] bool, which are real.
    """

    keys: list[Tensor]
    values: list[Tensor]
    att: Tensor
    length: int = 0

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache for `rows` sequences of at most `columns` tokens."""
        shape, layers = (rows, config.n_kv_head, columns, config.head_dim), range(config.n_layer)
        keys = [kernels.empty_keys(*shape, device, dtype) for _ in layers]
        values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
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
            # In the order in memory that `kernels.empty_keys` chose.
            self.keys[i] = k[rows] if k.is_contiguous() else k.transpose(2, 3)[rows].transpose(2, 3)
            self.values[i] = v[rows]
        self.att = self.att[rows]


def model_inputs(
    ids: Tensor, att: Tensor | None, cache: KVCache | None, right_padded: bool, block_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids safe to look up [B, L], position ids [B, L] or [L], bool mask [B, 1, L, S] (None: plain causal).

    ids, att: [B, L]; att is None where all tokens are real. right_padded: every row starts at column 0.

    Raises:
        ValueError: more tokens than the context of `block_size` holds.
    """
    B, L = ids.shape
    seen = cache.length if cache is not None else 0
    if seen + L > block_size:
        raise ValueError(f"{seen + L} tokens do not fit the context of {block_size}")
    att = None if att is None else att.bool()
    if seen == 0 and (att is None or right_padded):
        # Causal attention hides the padding behind each row without a mask.
        if cache is not None:
            cache.att[:, :L] = True if att is None else att
        return ids if att is None else ids.masked_fill(~att, 0), torch.arange(L, device=ids.device), None
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
    mask[:, :, :, seen:] |= torch.eye(L, dtype=torch.bool, device=ids.device)
    return ids.masked_fill(~att, 0), positions, mask
