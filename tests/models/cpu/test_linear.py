"""fp32 products by way of oneDNN against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from models.cpu import linear as module
from models.kernels import fill_rows, linear, product
from models.lora import PlainLinear


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    shapes = ((140, 48), (96, 48), (96,))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.fixture(autouse=True)
def on_amd(monkeypatch):
    """As on an AMD processor, whatever this one is."""
    monkeypatch.setattr(module, "_MKL_IS_SLOW", True)


@pytest.fixture
def calls(monkeypatch):
    """Products that went by way of oneDNN."""
    found = []
    original = module.product
    monkeypatch.setattr(module, "product", lambda *args: found.append(1) or original(*args))
    return found


def test_values_and_gradients_are_those_of_torch(made, calls):
    ours, theirs = linear(*made), F.linear(*made)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, made, g), torch.autograd.grad(theirs, made, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert len(calls) == 3  # forward, and one for each of the two matrices


@pytest.mark.parametrize("trains", [0, 1, 2])
def test_only_what_trains_gets_a_gradient(made, calls, trains):
    for i, tensor in enumerate(made):
        tensor.requires_grad_(i == trains)
    linear(*made).sum().backward()
    assert [t.grad is not None for t in made] == [i == trains for i in range(3)]
    assert len(calls) == 1 + (trains < 2)


def test_everything_else_is_left_to_torch(made, calls):
    x, weight, bias = (t.detach() for t in made)
    assert torch.equal(linear(x[:31], weight, bias), F.linear(x[:31], weight, bias))  # a few rows
    wide = [t.double() for t in (x, weight, bias)]
    assert torch.equal(linear(*wide), F.linear(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert not calls


def test_other_processors_keep_to_torch(made, calls, monkeypatch):
    monkeypatch.setattr(module, "_MKL_IS_SLOW", False)
    assert torch.equal(linear(*made), F.linear(*made))
    assert not calls


@pytest.mark.parametrize(
    ("vendor", "flags", "slow"),
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False),
    ],
)
def test_the_processor_decides(vendor, flags, slow, monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda path: f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    assert module._leaves_avx512_unused() is slow


def test_the_layer_and_products_of_views(made, calls):
    layer = PlainLinear(48, 96)
    x = made[0].detach().view(7, 20, 48)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=0)
    a, b = x[0], x[1]
    torch.testing.assert_close(product(a.t(), b.t()), a.t() @ b, atol=1e-4, rtol=0)
    assert len(calls) == 2


def test_rows_are_filled_up_to_few_sizes():
    sizes = {len(fill_rows(torch.ones(n, 2))) for n in range(1, 4097)}
    assert len(sizes) < 60
    for n in range(1, 4097, 37):
        filled = fill_rows(torch.ones(n, 2))
        assert len(filled) - n < max(8, n / 8) and filled.sum() == 2 * n and filled[:n].all()
