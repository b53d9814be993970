"""Every way of attending against the definition."""

import pytest
import torch
import torch.nn.functional as F

from models.cpu import attention as module
from models.kernels import attention, attention_of_one


def made(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def by_definition(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 2, 33, 64, 65, 129, 300])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_causal_attention_and_its_gradients(length, dtype, bound):
    tensors = made(length, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    ours, exact = attention(*tensors, None, causal=length > 1), by_definition(*wide)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() < bound
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(ours, tensors, g.to(dtype))
    for a, b in zip(grads, torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert (a - b).norm() <= bound * b.norm() + bound


def test_blocks_are_for_causal_rows_in_bf16(monkeypatch):
    used = []

    class Watched(module._CausalByBlocks):
        @classmethod
        def apply(cls, q, k, v):
            used.append(q.shape[2])
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(module, "_CausalByBlocks", Watched)
    for length in (1, 2, 256, 257):
        attention(*made(length, torch.bfloat16), None, causal=length > 1)
        attention(*made(length, torch.float32), None, causal=length > 1)
    attention(*made(8, torch.bfloat16), torch.ones(2, 1, 8, 8, dtype=torch.bool), causal=False)
    attention(*made(8, torch.bfloat16), None, causal=True, dropout=0.5)
    assert used == [2, 256, 257]


@pytest.mark.parametrize("length", [65, 300])
def test_no_query_sees_a_later_key(length):
    q, k, v = (x.detach() for x in made(length, torch.bfloat16))
    before = attention(q, k, v, None, causal=True)
    k[:, :, 40:], v[:, :, 40:] = 7.0, -7.0
    after = attention(q, k, v, None, causal=True)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_blocks_keep_no_weights_for_the_backward_pass():
    """Memory grows with the length and not with its square."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x.numel()) or x, lambda x: x):
        attention(*made(200, torch.bfloat16), None, causal=True)
    assert found == 3 * [2 * 3 * 200 * 16]


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_per_row_against_the_definition(dtype, bound, masked):
    q, k, v = (t.detach() for t in made(9, dtype))
    q = q[:, :, -1:]
    kept_transposed = k.transpose(2, 3).contiguous().transpose(2, 3)
    bias = torch.zeros(2, 1, 1, 9, dtype=dtype)
    if masked:
        bias[0, :, :, :4] = float("-inf")
    scores = q.double() @ k.double().transpose(-1, -2) / 16**0.5 + bias.double()
    exact = scores.softmax(-1) @ v.double()
    for keys in (k, kept_transposed):
        ours = attention_of_one(q, keys, v, bias if masked else None)
        assert ours.dtype == dtype and ours.shape == (2, 3, 1, 16)
        assert (ours - exact).abs().max() < bound
