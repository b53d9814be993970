"""Block-wise log-probabilities against the plain ones, and the digits that half precision keeps."""

import pytest
import torch
import torch.nn.functional as F
from gpu_marks import DEVICES
from plain_formulas import entropy_from_logits, gather_logprobs
from torch import nn

from models import kernels, vocabulary
from models.vocabulary import (
    OutputTable,
    logits,
    plain_token_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
    token_loss_sum,
)

N, D, V, ROWS = 37, 16, 100, 103  # three rows of the table are padding without logits


@pytest.fixture
def setup(monkeypatch):
    """Hidden states, table, tokens and weights in float64; a block holds seven positions, so that six are needed."""
    monkeypatch.setattr(vocabulary, "BLOCK", 7 * V * 8)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=generator).requires_grad_()
    table = nn.Parameter(torch.randn(ROWS, D, dtype=torch.float64, generator=generator))
    tokens = torch.randint(0, V, (N,), generator=generator)
    return hidden, table, tokens, torch.randn(N, dtype=torch.float64, generator=generator)


def plain(hidden, table, tokens, tau=1.0):
    return plain_token_logprobs(hidden, table, V, tokens, tau)[0]


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_the_definition_is_that_of_the_losses(setup, tau):
    hidden, table, tokens, _ = setup
    logp, entropy = plain_token_logprobs(hidden, table, V, tokens, tau)
    torch.testing.assert_close(logp, gather_logprobs(hidden @ table[:V].t(), tokens, tau), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, entropy_from_logits(hidden @ table[:V].t(), tau), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_logprobs_and_gradients_are_the_plain_ones(setup, tau):
    hidden, table, tokens, weights = setup
    ours, theirs = token_logprobs(hidden, table, V, tokens, tau), plain(hidden, table, tokens, tau)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (hidden, table)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.slow
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


def test_an_evaluation_makes_no_gradients(setup, monkeypatch):
    hidden, table, tokens, _ = setup
    sweep, asked = vocabulary._sweep, []

    def watch(*args, slope, weights, **kwargs):
        asked.append((slope, weights is not None))
        return sweep(*args, slope=slope, weights=weights, **kwargs)

    monkeypatch.setattr(vocabulary, "_sweep", watch)
    trained = token_loss_sum(hidden, table, V, tokens)
    with torch.no_grad():
        assert torch.equal(token_loss_sum(hidden, table, V, tokens), trained)
    assert asked == [(True, True), (False, False)]


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_entropy_and_logprobs_without_gradients(setup, tau):
    hidden, table, tokens, _ = setup
    logp, entropy = token_logprobs_and_entropy(hidden, table, V, tokens, tau)
    for ours, theirs in zip((logp, entropy), plain_token_logprobs(hidden, table, V, tokens, tau), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert not logp.requires_grad


def test_the_number_of_blocks_changes_no_bit_of_the_logprobs(setup, monkeypatch):
    hidden, table, tokens, _ = setup
    several = token_logprobs(hidden.float(), table.float(), V, tokens)
    monkeypatch.setattr(vocabulary, "BLOCK", N * V * 4)
    torch.testing.assert_close(token_logprobs(hidden.float(), table.float(), V, tokens), several, atol=1e-6, rtol=0)


def test_no_block_is_larger_than_stated(setup, monkeypatch):
    hidden, table, tokens, weights = setup
    seen = []
    original = OutputTable.rounded
    monkeypatch.setattr(OutputTable, "rounded", lambda self, h, *rest: seen.append(len(h)) or original(self, h, *rest))
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_digits_that_matter(dtype, device):
    """PPO's clip range is 0.2; a projection rounded to bf16 is off by more than that, this one by a tenth of it."""
    hidden, table, tokens = (x.to(device) for x in gpt2_like(64))
    exact = gather_logprobs(hidden.double() @ table.double().t(), tokens)
    assert (hidden @ table.t()).mean() < -90
    hidden.requires_grad_()
    with torch.autocast(device, dtype):
        ours = token_logprobs(hidden, table, 5000, tokens)
        rounded = gather_logprobs(F.linear(hidden, table), tokens)
        everywhere = logits(hidden.detach(), table.detach(), 5000)
    assert ours.dtype == everywhere.dtype == torch.float32
    # Without the second product it would be 1.8e-2 in bf16 and 2.8e-3 in fp16 on a CPU.
    assert (ours - exact).abs().max() < {torch.bfloat16: 1.3e-2, torch.float16: 2e-3}[dtype]
    assert (gather_logprobs(everywhere, tokens) - exact).abs().max() < 5e-2  # the sampler's
    if dtype == torch.bfloat16:
        assert (rounded - exact).abs().max() > 0.1
    (slope,) = torch.autograd.grad(ours.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(gather_logprobs(wide @ table.double().t(), tokens).sum(), wide)
    assert (slope - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_the_second_pass_returns_what_rounding_lost(device):
    hidden, table, _ = (x.to(device) for x in gpt2_like(16))
    output = OutputTable.of(table, 5000, torch.bfloat16)
    exact = hidden.bfloat16().double() @ output.weight.double().t()
    assert (output.logits(hidden) - exact).abs().max() < 1e-3
    assert (F.linear(hidden.bfloat16(), output.weight).double() - exact).abs().max() > 1e-2


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_large_logits_do_not_overflow(tau):
    hidden = 40 * torch.ones(3, 4, requires_grad=True)
    table = nn.Parameter(torch.linspace(0, 2, 24).view(6, 4))
    tokens = torch.tensor([0, 3, 5])
    ours = token_logprobs(hidden, table, 6, tokens, tau)
    torch.testing.assert_close(ours, gather_logprobs(hidden @ table.t(), tokens, tau), atol=1e-3, rtol=1e-4)
    assert (hidden @ table.t()).max() > 250


def test_states_in_half_precision_give_logprobs_in_fp32():
    hidden, table, tokens = gpt2_like(8)
    assert token_logprobs(hidden.bfloat16(), nn.Parameter(table.bfloat16()), 5000, tokens).dtype == torch.float32


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
    output, hidden = OutputTable.of(table, 5000, torch.bfloat16), hidden.bfloat16()
    packed = output.sampling_logits(hidden)
    monkeypatch.setattr(kernels, "PLAIN", {"packing"})
    torch.testing.assert_close(output.sampling_logits(hidden), packed, atol=2e-3, rtol=0)


def sharp(rows: int) -> tuple[torch.Tensor, nn.Parameter]:
    """States that each point at one token, whose logit stands some 20 above the mean, as where GPT-2 is sure."""
    hidden, table, tokens = gpt2_like(rows)
    towards = table.detach()[tokens] - table.detach().mean(0)
    return hidden + 20 * towards / (towards * towards).sum(-1, keepdim=True), table


@pytest.mark.parametrize("made", [lambda n: gpt2_like(n)[:2], sharp])
def test_the_sampler_reads_the_weights_once_and_loses_no_more(made):
    """What PPO samples from has to be what its log-probabilities are of: to within what rounding one logit costs."""
    hidden, table = made(64)
    exact = (hidden.double() @ table.detach().double().t()).log_softmax(-1)
    output = OutputTable.of(table, 5000, torch.bfloat16)
    once, twice = (f(hidden.bfloat16()).double().log_softmax(-1) for f in (output.sampling_logits, output.logits))
    likely = exact > -12
    worst = (twice - exact)[likely].abs().max()
    assert worst < 7e-2 and (once - exact)[likely].abs().max() < worst + 1 / 64
    assert (once.exp() - exact.exp()).abs().sum(-1).max() / 2 < 1e-2  # total variation
    rounded = F.linear(hidden.bfloat16(), table.detach().bfloat16()).double().log_softmax(-1)
    assert (rounded - exact)[likely].abs().max() > 0.1


def test_with_many_large_logits_the_sampler_takes_the_product_twice():
    hidden, table, _ = gpt2_like(4)
    output = OutputTable.of(table, 5000, torch.bfloat16)
    large = (10 * hidden).bfloat16()
    assert (output.logits(large) > vocabulary.SURE).sum() > 4 * 128
    assert torch.equal(output.sampling_logits(large), output.logits(large))


@pytest.mark.parametrize("rows", [5, 40])
def test_the_loss_in_half_precision_and_its_gradients(rows, monkeypatch):
    """One product is enough for fine-tuning: the loss to 1e-3 of a nat per token, the gradients to 1 %."""
    monkeypatch.setattr(vocabulary, "BLOCK", 17 * 5000 * 2)  # one block, or three
    hidden, table, tokens = gpt2_like(rows)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_loss_sum(hidden, table, 5000, tokens)
    wide, wide_table = hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    exact = F.cross_entropy(wide @ wide_table.t(), tokens, reduction="sum")
    assert (ours - exact).abs() < 1e-3 * rows
    grads = torch.autograd.grad(0.5 * ours, (hidden, table))
    for a, b in zip(grads, torch.autograd.grad(0.5 * exact, (wide, wide_table)), strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("loss", ["fine-tuning", "log-probabilities"])
def test_a_gradient_beyond_the_range_of_fp16(loss):
    """200 times the same token after states of size 600: its row of the table gets sums of 120,000."""
    generator = torch.Generator().manual_seed(0)
    hidden = 600 + torch.randn(200, 8, generator=generator)
    table = nn.Parameter(1e-3 * torch.randn(40, 8, generator=generator))
    tokens = torch.full((200,), 7)
    with torch.autocast("cpu", torch.float16):
        if loss == "fine-tuning":
            token_loss_sum(hidden, table, 40, tokens).backward()
        else:
            token_logprobs(hidden, table, 40, tokens).sum().neg().backward()
    wide = table.detach().double().requires_grad_()
    gather_logprobs(hidden.double() @ wide.t(), tokens).sum().neg().backward()
    assert wide.grad.abs().max() > 100_000
    assert (table.grad - wide.grad).norm() < 1e-2 * wide.grad.norm()


def test_a_row_s_logprob_does_not_depend_on_the_slices(setup, monkeypatch):
    hidden, table, tokens, _ = setup
    whole = token_logprobs(hidden.float(), table.float(), V, tokens)
    monkeypatch.setattr(vocabulary, "slice_size", lambda device: 3 * V)
    assert torch.equal(token_logprobs(hidden.float(), table.float(), V, tokens), whole)
