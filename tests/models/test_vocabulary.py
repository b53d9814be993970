"""Block-wise log-probabilities against the plain ones, and the digits that half precision keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import vocabulary
from models.vocabulary import OutputTable, logits, token_logprobs, token_logprobs_and_entropy, token_loss_sum
from utils.loss import entropy_from_logits, gather_logprobs

N, D, V, ROWS = 37, 16, 100, 103  # three rows of the table are padding without logits


@pytest.fixture
def setup(monkeypatch):
    """Hidden states, table, tokens and weights in float64; a block holds seven positions, so that six are needed."""
    monkeypatch.setattr(vocabulary, "BLOCK", 7 * V)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    table = nn.Parameter(torch.randn(ROWS, D, dtype=torch.float64, generator=generator))
    tokens = torch.randint(0, V, (N,), generator=generator)
    return hidden, table, tokens, torch.randn(N, dtype=torch.float64, generator=generator)


def plain(hidden, table, tokens, tau=1.0):
    return gather_logprobs(hidden @ table[:V].t(), tokens, tau)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_logprobs_and_gradients_are_the_plain_ones(setup, tau):
    hidden, table, tokens, weights = setup
    ours, theirs = token_logprobs(hidden, table, V, tokens, tau), plain(hidden, table, tokens, tau)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (hidden, table)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gradcheck(setup):
    hidden, table, tokens, _ = setup
    hidden, tokens = hidden.detach()[:5].requires_grad_(), tokens[:5]
    assert torch.autograd.gradcheck(lambda h, t: token_logprobs(h, t, V, tokens, 0.7), (hidden, table))
    assert torch.autograd.gradcheck(lambda h, t: token_loss_sum(h, t, V, tokens), (hidden, table))


@pytest.mark.parametrize("trains", ["hidden", "table"])
def test_a_frozen_side_gets_no_gradient(setup, trains):
    hidden, table, tokens, weights = setup
    frozen = table if trains == "hidden" else hidden
    frozen.requires_grad_(False)
    (token_logprobs(hidden, table, V, tokens) * weights).sum().backward()
    token_loss_sum(hidden, table, V, tokens).backward()
    assert frozen.grad is None and {"hidden": hidden, "table": table}[trains].grad.abs().sum() > 0


def test_the_loss_of_fine_tuning_and_its_gradients(setup):
    hidden, table, tokens, _ = setup
    ours, theirs = token_loss_sum(hidden, table, V, tokens), -plain(hidden, table, tokens).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    for a, b in zip(*(torch.autograd.grad(0.3 * x, (hidden, table)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_entropy_and_logprobs_without_gradients(setup, tau):
    hidden, table, tokens, _ = setup
    logp, entropy = token_logprobs_and_entropy(hidden, table, V, tokens, tau)
    torch.testing.assert_close(logp, plain(hidden, table, tokens, tau), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, entropy_from_logits(hidden @ table[:V].t(), tau), atol=1e-12, rtol=0)
    assert not logp.requires_grad


def test_the_number_of_blocks_changes_no_bit_of_the_logprobs(setup, monkeypatch):
    hidden, table, tokens, _ = setup
    several = token_logprobs(hidden.float(), table.float(), V, tokens)
    monkeypatch.setattr(vocabulary, "BLOCK", N * V)
    torch.testing.assert_close(token_logprobs(hidden.float(), table.float(), V, tokens), several, atol=1e-6, rtol=0)


def test_no_block_is_larger_than_stated(setup, monkeypatch):
    hidden, table, tokens, weights = setup
    seen = []
    original = OutputTable.logits
    monkeypatch.setattr(OutputTable, "logits", lambda self, h: seen.append(len(h)) or original(self, h))
    (token_logprobs(hidden, table, V, tokens) * weights).sum().backward()
    assert (
        max(seen) == 8 and len(seen) == 2 * 6
    )  # seven and one of filling; forward, and again for the table's gradient


def gpt2_like(rows: int) -> tuple[torch.Tensor, nn.Parameter, torch.Tensor]:
    """Final states and a token table as GPT-2's: logits that differ by a few units and share an offset of -100."""
    generator = torch.Generator().manual_seed(1)
    table = 0.14 * torch.randn(5000, 256, generator=generator)
    hidden = torch.randn(rows, 256, generator=generator)
    table[:, :4] -= 2.5  # channels whose weight is the same for every token ...
    hidden[:, :4] = 10.0  # ... and whose activation is large and nearly constant
    return hidden, nn.Parameter(table), torch.randint(0, 5000, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_digits_that_matter(dtype):
    """PPO's clip range is 0.2; a projection rounded to bf16 is off by more than that, this one by a tenth of it."""
    hidden, table, tokens = gpt2_like(64)
    exact = gather_logprobs(hidden.double() @ table.double().t(), tokens)
    assert (hidden @ table.t()).mean() < -90
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype):
        ours = token_logprobs(hidden, table, 5000, tokens)
        rounded = gather_logprobs(F.linear(hidden, table), tokens)
        everywhere = logits(hidden.detach(), table.detach(), 5000)
    assert ours.dtype == everywhere.dtype == torch.float32
    assert (ours - exact).abs().max() < 2e-2
    assert (gather_logprobs(everywhere, tokens) - exact).abs().max() < 5e-2  # the sampler's
    if dtype == torch.bfloat16:
        assert (rounded - exact).abs().max() > 0.1
    (slope,) = torch.autograd.grad(ours.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(gather_logprobs(wide @ table.double().t(), tokens).sum(), wide)
    assert (slope - expected).norm() < 1e-2 * expected.norm()


def test_the_second_pass_returns_what_rounding_lost():
    hidden, table, _ = gpt2_like(16)
    output = OutputTable.of(table, 5000, torch.bfloat16)
    exact = hidden.bfloat16().double() @ output.weight.double().t()
    assert (output.logits(hidden) - exact).abs().max() < 1e-3
    assert (F.linear(hidden.bfloat16(), output.weight).double() - exact).abs().max() > 1e-2


def test_a_kept_table_follows_the_parameter():
    hidden, table, _ = gpt2_like(2)
    first = OutputTable.of(table, 5000, torch.bfloat16)
    assert OutputTable.of(table, 5000, torch.bfloat16) is first
    with torch.no_grad():
        table[7] += 1.0
    second = OutputTable.of(table, 5000, torch.bfloat16)
    assert second is not first
    moved = second.logits(hidden)[:, 7] - first.logits(hidden)[:, 7]
    torch.testing.assert_close(moved, hidden.sum(1), atol=0.1, rtol=0.02)


def test_without_packed_weights_the_logits_are_the_same(monkeypatch):
    hidden, table, _ = gpt2_like(8)
    packed = OutputTable.of(table, 5000, torch.bfloat16)
    plain_table = OutputTable(packed.weight)
    torch.testing.assert_close(plain_table.logits(hidden), packed.logits(hidden), atol=2e-3, rtol=0)
