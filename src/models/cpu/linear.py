"""Linear layers whose fp32 products go through oneDNN on an AMD processor with AVX-512.

torch takes fp32 matrix products from MKL, which keeps to AVX2 there: on a Zen 5 core oneDNN's products with AVX-512 are
2.3 times faster (225 against 97 GFLOP/s, torch 2.13; `python src/experiments/main.py -t bench --kernels` measures it
again). On an Intel processor MKL uses AVX-512 itself, and torch's own way took 0.53 to 0.92 of the time at the demo's
sizes (Xeon of family 6, model 207); on an AMD processor without AVX-512 (family 25, model 1), 0.67 to 1.05, forward and
backward. In half precision torch goes to oneDNN by itself. The operator is the one to which torch.compile lowers a
linear layer (torch/_inductor/fx_passes/mkldnn_fusion.py); where it is missing everything falls back to `F.linear`.

oneDNN makes code for every shape it meets and keeps it, up to a megabyte each. Rows are therefore filled up with zeros
to one of eight sizes between a power of two and the next; 3,000 batches of different sizes took 2 GB otherwise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# Below this many rows the call itself takes most of the time, and torch's own has less to do.
_FEW_ROWS = 32


def _leaves_avx512_unused() -> bool:
    """Whether this is an AMD processor with AVX-512; False where the system does not say."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in facts and "avx512f" in facts


_MKL_IS_SLOW = _leaves_avx512_unused()


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster than torch's own way for x [..., in] and weight [out, in]."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _FEW_ROWS * x.shape[-1]
        and torch.backends.mkldnn.is_available()
        and _MKL_IS_SLOW
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b [N, out], differentiable; x [N, in], weight [out, in], bias [out]."""
    return _Linear.apply(x, weight, bias)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias [N, M] of a [N, K] and b [M, K], without gradients."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def fill_rows(x: Tensor) -> Tensor:
    """x [N, ...] with rows of zeros behind it up to the next of few sizes; at most an eighth more."""
    n = len(x)
    missing = -n % max(8, 1 << max(0, n.bit_length() - 4))
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


class _Linear(torch.autograd.Function):
    """x [N, in], weight [out, in], bias [out]; the gradients are linear layers of transposed views."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        filled = fill_rows(x)
        ctx.save_for_backward(filled if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(filled, weight, bias)[: len(x)]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        filled = fill_rows(grad)
        to_x = None if weight is None else product(filled, weight.t())[: len(grad)]
        to_weight = None if x is None else product(filled.t(), x.t())  # rows of zeros add nothing
        return to_x, to_weight, grad.sum(0) if ctx.needs_input_grad[2] else None
