"""The tanh form of GELU against torch's."""

import pytest
import torch
import torch.nn.functional as F

from models.cpu import activation
from models.kernels import gelu


def made(shape, dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, 60.0, -60.0, -0.75])
    return x.to(dtype)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [2**20, 1000])
def test_values_and_derivatives_are_torchs(monkeypatch, dtype, bound, size):
    monkeypatch.setattr(activation, "_SLICE", size)  # one slice, and several of which the last is shorter
    x = made((7, 333), dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = F.gelu(wide, approximate="tanh")
    y = gelu(x)
    assert y.dtype == dtype
    assert ((y - exact).abs() / (1 + exact.abs())).max() < bound
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (ours,), (theirs,) = torch.autograd.grad(y, x, g), torch.autograd.grad(exact, wide, g.double())
    assert ((ours - theirs).abs() / (1 + theirs.abs())).max() < bound


def test_bf16_is_as_close_to_the_exact_figure_as_torchs_own():
    x = made((100, 100), torch.bfloat16)
    exact = F.gelu(x.double(), approximate="tanh")
    assert (gelu(x) - exact).abs().mean() <= 1.001 * (F.gelu(x, approximate="tanh") - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_and_without_gradients(dtype):
    x = made((5, 64), dtype)
    assert torch.equal(gelu(x), gelu(x.clone().requires_grad_()))


def test_a_transposed_input_and_an_empty_one():
    x = made((6, 8), torch.float32).t().requires_grad_()
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))
    gelu(x).sum().backward()
    assert gelu(torch.empty(0, 4)).shape == (0, 4)


def test_what_is_not_finite_stays_so():
    assert gelu(torch.tensor([float("nan"), float("inf")])).isfinite().sum() == 0
