"""The operations that have a second, faster form on a processor, each beside the line of torch that says what it is.

On a GPU these lines are all there is, and nobody needs to read further. The faster forms are in `models.cpu`; each says
when it serves, what it gains and how that was measured. RLHF_PLAIN=attention,linear,gelu,packing (any of them, or
`all`) in the environment leaves a form out, to compare: `python src/experiments/main.py -t bench --kernels` does.

Shapes: B rows, nh heads, nkv heads of keys and values, L queries, S keys, hd channels per head, N rows of a product.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.user_error import UserError
from models.cpu import activation, packing
from models.cpu import attention as cpu_attention
from models.cpu import linear as onednn
from models.weight_copies import find_kept, kept_with

KERNELS = ("attention", "linear", "gelu", "packing")


def plain_kernels(setting: str) -> set[str]:
    """The kernels that a value of RLHF_PLAIN leaves out."""
    names = {name.strip() for name in setting.split(",")} - {""}
    return names - {"all"} | set(KERNELS) if "all" in names else names


PLAIN = plain_kernels(os.environ.get("RLHF_PLAIN", ""))


def check_plain() -> None:
    """Called when a model is built, and not on import, where no script could tell it in one line.

    Raises:
        UserError: RLHF_PLAIN names a kernel that is not there.
    """
    if unknown := sorted(PLAIN - set(KERNELS)):
        raise UserError(f"RLHF_PLAIN={','.join(unknown)}: choose from {', '.join(KERNELS)}, or all")


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products of x are taken here: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v [B, nh, L, hd] (Vaswani et al. 2017, equation 1).

    Args:
        q: [B, nh, L, hd]. k, v: [B, nkv, S, hd]; where nkv is less, each head of theirs serves nh / nkv neighbours of q
            (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245).
        mask: bool [B, 1, L, S], true where a query may look; None: everywhere, or with `causal` not ahead.
        causal: query i sees keys 0 .. i; needs L = S. dropout: on the attention weights.
    """
    grouped = k.shape[1] != q.shape[1]
    if grouped and not (q.device.type != "cpu" and q.dtype == torch.bfloat16 and mask is None):
        # Only flash attention spares these copies: in half precision, without a mask, on a GPU that has bf16. torch's
        # other kernels either refuse shared heads or write out all weights [B, nh, L, S].
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    if "attention" in PLAIN or not cpu_attention.serves(q, mask, causal, dropout):
        options = {"dropout_p": dropout, "is_causal": causal, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return cpu_attention.causal_by_blocks(q, k, v)


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What one token per row attends to, without gradients.

    Args:
        q: [B, nkv, g, hd], the g queries that share a head of keys and values. k, v: [B, nkv, S, hd].
        bias: [B, 1, 1, S], added to the scores.
    """
    if "attention" in PLAIN or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return cpu_attention.one_query(q, k, v, bias)


def empty_keys(B: int, nh: int, S: int, hd: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for keys [B, nh, S, hd], as `attention_of_one` reads them fastest."""
    if "attention" in PLAIN or device.type != "cpu":
        return torch.empty(B, nh, S, hd, device=device, dtype=dtype)
    return torch.empty(B, nh, hd, S, device=device, dtype=dtype).transpose(2, 3)


def cache_dtype(device: str, product: torch.dtype) -> torch.dtype:
    """Type of cached keys and values where matrix products are taken in `product`: the same, but fp32 on a CPU.

    Reading half as many bytes gains nothing there: with keys in bf16 sampling of 8 rows was a few percent slower, of 32
    rows as fast (torch 2.13, GPT-2 124M, 2 cores of an AMD EPYC).
    """
    return product if "attention" in PLAIN or device != "cpu" else torch.promote_types(product, torch.float32)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh form, of x of any shape."""
    if "gelu" in PLAIN or not activation.serves(x):
        return F.gelu(x, approximate="tanh")
    return activation.gelu(x)


def linear(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
    """x W^T + b [N, out] of x [N, in]."""
    packed = _packed(x, weight, bias)
    if packed is None and ("linear" in PLAIN or not onednn.serves(x, weight)):
        return F.linear(x, weight, bias)
    if packed is None:
        return onednn.linear(x, weight, bias)
    return packing.frozen_linear(x, weight, bias, packed)


def adapted_linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, narrow: Tensor, up: Tensor, scale: float
) -> Tensor:
    """x W^T + b + scale narrow up [N, out]; narrow [N, r], up [r, out]."""
    packed = _packed(x, weight, bias)
    if packed is None:
        return torch.addmm(linear(x, weight, bias), narrow, up, alpha=scale)
    return packing.frozen_linear(x, weight, bias, packed).addmm_(narrow, up.to(x.dtype), alpha=scale)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T [N, M] of a [N, K] and b [M, K], without gradients."""
    if "linear" in PLAIN or not onednn.serves(a, b):
        return F.linear(a, b)
    return onednn.product(a, b)


def fill_rows(x: Tensor) -> Tensor:
    """x [N, ...], where oneDNN multiplies it with rows of zeros behind it: see `models.cpu.linear`."""
    return x if "linear" in PLAIN or x.device.type != "cpu" else onednn.fill_rows(x)


def decoding_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] for `decoding_linear`: in the product's type, and where there is one in a packed layout."""
    if "packing" not in PLAIN and packing.serves(weight.device, dtype):
        return kept_with(weight, "packed_weight", dtype, lambda: packing.pack(weight.detach().to(dtype)))
    if weight.dtype == dtype:
        return weight.detach()
    return kept_with(weight, "decoding_weight", dtype, lambda: weight.detach().to(dtype))


def decoding_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x W^T + b [N, out] of a few rows x [N, in], then GPT-2's GELU if asked for; without gradients."""
    if weight.is_mkldnn:  # packed
        return packing.packed_linear(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _packed(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor | None:
    """The packed copy of a weight that decoding has left, where the product needs no gradient of it."""
    trains = torch.is_grad_enabled() and (weight.requires_grad or bias is not None and bias.requires_grad)
    if trains or torch.compiler.is_compiling():  # torch.compile cannot look into a packed tensor
        return None
    return find_kept(weight, "packed_weight", x.dtype)
