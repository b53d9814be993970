"""Every way of attending against the definition."""

import pytest
import torch

from models import attention
from models.attention import attend


def made(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def by_definition(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 2, 33, 256, 257])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_causal_attention_and_its_gradients(length, dtype, bound):
    tensors = made(length, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    ours, exact = attend(*tensors, None, causal=length > 1), by_definition(*wide)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() < bound
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(ours, tensors, g.to(dtype))
    for a, b in zip(grads, torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert (a - b).norm() <= bound * b.norm() + bound


def test_the_plain_way_is_for_short_rows_in_bf16(monkeypatch):
    used = []
    original = attention._plain_causal
    monkeypatch.setattr(attention, "_plain_causal", lambda *args: used.append(args[0].shape[2]) or original(*args))
    for length in (1, 2, 256, 257):
        attend(*made(length, torch.bfloat16), None, causal=length > 1)
        attend(*made(length, torch.float32), None, causal=length > 1)
    attend(*made(8, torch.bfloat16), torch.ones(2, 1, 8, 8, dtype=torch.bool), causal=False)
    attend(*made(8, torch.bfloat16), None, causal=True, dropout=0.5)
    assert used == [2, 256]
