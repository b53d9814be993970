"""Scaled dot-product attention, by whichever of torch's ways is fastest for the shapes at hand.

Shapes: B rows, nh heads, L queries, S keys, hd channels per head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length torch's fused CPU kernel in bf16 is slower than three plain operations: forward and backward of
# 8 x 128 tokens of GPT-2 124M took 34 ms against 9 ms on one core (torch 2.13); of 4 x 512 tokens 151 against 233 ms.
SHORT = 256


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v [B, nh, L, hd] (Vaswani et al. 2017, equation 1).

    Args:
        q: [B, nh, L, hd]. k, v: [B, nh, S, hd].
        mask: bool [B, 1, L, S], true where a query may look; None: everywhere, or with `causal` not ahead.
        causal: query i sees keys 0 .. i; needs L = S. dropout: on the attention weights.
    """
    half_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if half_on_cpu and causal and mask is None and dropout == 0.0 and 1 < q.shape[2] <= SHORT:
        return _plain_causal(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two batched products with a softmax in fp32 between them."""
    B, nh, L, hd = q.shape
    q, k, v = (x.reshape(B * nh, L, hd) for x in (q, k, v))
    scores = torch.baddbmm(_ahead(L, q.dtype).expand(B * nh, L, L), q, k.transpose(1, 2), alpha=hd**-0.5)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, v).view(B, nh, L, hd)


@lru_cache(maxsize=64)
def _ahead(length: int, dtype: torch.dtype) -> Tensor:
    """[L, L], minus infinity where the key lies ahead of the query and 0 elsewhere."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
