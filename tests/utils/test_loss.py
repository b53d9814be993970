"""Masked reductions, masks, log-probabilities, SFT loss, explained variance and schedules of utils/loss.py.

The ranking loss and the rewards are tested in test_loss_reward.py, GAE and the PPO losses in test_loss_ppo.py.
Shapes: B rows, L columns, P prompt, T response, V vocabulary.
"""

import ast
import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from plain_formulas import entropy_from_logits, gather_logprobs
from torch import Tensor, tensor

from models.vocabulary import token_loss_sum
from training.loop import cosine_with_warmup, linear_to_zero
from utils import loss
from utils.loss import (
    Moments,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    masked_whiten,
    response_mask,
    target_mask,
    temper,
)

EOS = 50256
PAD = 50257
GARBAGE = [1e3, -1e3, math.inf, -math.inf, math.nan]


def close(actual: Tensor, expected: Tensor | list | float, tol: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=tol)


def prefix_mask(rng: random.Random, rows: int, width: int) -> Tensor:
    return response_mask(tensor([rng.randint(1, width) for _ in range(rows)]), width)


# --- the module ------------------------------------------------------------------------------------------------------


def test_loss_imports_torch_and_the_standard_library_only() -> None:
    with open(loss.__file__) as file:
        tree = ast.parse(file.read())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert "torch" in roots
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"torch"}


# --- masked reductions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_reductions_match_loops(seed: int) -> None:
    rng = random.Random(seed)
    rows, width = rng.randint(1, 5), rng.randint(1, 7)
    x = [[rng.gauss(1, 3) for _ in range(width)] for _ in range(rows)]
    mask = [[rng.random() < 0.6 for _ in range(width)] for _ in range(rows)]
    mask[0][0] = True
    kept = [x[b][t] for b in range(rows) for t in range(width) if mask[b][t]]
    mean = sum(kept) / len(kept)
    var = sum((v - mean) ** 2 for v in kept) / len(kept)
    x64, m = tensor(x, dtype=torch.float64), tensor(mask)
    close(masked_sum(x64, m), sum(kept), 1e-12)
    close(masked_mean(x64, m), mean, 1e-12)
    close(masked_var(x64, m), var, 1e-12)
    close(masked_sum(x64, m, dim=1), [sum(v for v, k in zip(r, q, strict=True) if k) for r, q in zip(x, mask)], 1e-12)
    moments = masked_moments(x64, m)
    close(moments.mean, mean, 1e-12)
    close(moments.var, var, 1e-12)
    assert int(moments.count) == len(kept)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_garbage_in_masked_places_reaches_neither_value_nor_gradient(reduce, garbage: float) -> None:
    mask = tensor([[True, True, False], [True, False, False]])
    results = []
    for fill in (0.0, garbage):
        x = torch.where(mask, tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]]), tensor(fill)).requires_grad_()
        value = reduce(x, mask)
        value.square().sum().backward()
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert bool((results[1][1][~mask] == 0).all())


def test_an_empty_mask_gives_zero() -> None:
    x, mask = tensor([[math.nan, 1.0]]), tensor([[False, False]])
    for value in (masked_sum(x, mask), masked_mean(x, mask), masked_var(x, mask), *masked_moments(x, mask)):
        assert float(value) == 0.0
    assert masked_mean(x, mask, dim=1).tolist() == [0.0]
    assert masked_whiten(x, mask).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)]
)
def test_a_mask_of_another_type_or_shape_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        masked_mean(torch.zeros(2, 3), mask)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_reductions_compute_in_float32_or_wider(given: torch.dtype, expected: torch.dtype) -> None:
    x, mask = torch.ones(1, 3000, dtype=given), torch.ones(1, 3000, dtype=torch.bool)
    for function in (masked_sum, masked_mean, masked_var, masked_whiten):
        assert function(x, mask).dtype == expected
    assert float(masked_sum(x, mask)) == 3000.0  # bfloat16 alone would stop at 256


# --- whitening -------------------------------------------------------------------------------------------------------

ADVANTAGES = tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
ADVANTAGE_MASK = response_mask(tensor([3, 1]), 4)


def test_whitening_vector() -> None:
    close(masked_mean(ADVANTAGES, ADVANTAGE_MASK), 2.5)
    close(masked_var(ADVANTAGES, ADVANTAGE_MASK), 1.25)  # the unbiased 5/3 would give +-1.161895, +-.387298
    white = masked_whiten(ADVANTAGES, ADVANTAGE_MASK)
    close(white, [[-1.341641, -0.447214, 0.447214, 0], [1.341641, 0, 0, 0]])
    shifted = masked_whiten(ADVANTAGES, ADVANTAGE_MASK, shift_mean=False)
    close(shifted, [[1.158359, 2.052786, 2.947214, 0], [3.841641, 0, 0, 0]])
    close(masked_sum(shifted, ADVANTAGE_MASK), 10.0, 1e-5)  # the sum survives
    unmasked = masked_whiten(ADVANTAGES, torch.ones_like(ADVANTAGE_MASK))
    close(unmasked[0, 0], -0.169, 1e-3)  # what counting the padding would make of it


@pytest.mark.parametrize("seed", range(5))
def test_whitening_matches_loop_and_has_mean_0_and_variance_1(seed: int) -> None:
    rng = random.Random(seed)
    rows, width = rng.randint(2, 6), rng.randint(2, 9)
    mask = prefix_mask(rng, rows, width)
    x = tensor([[rng.gauss(-3, 5) for _ in range(width)] for _ in range(rows)], dtype=torch.float64)
    kept = [float(x[b, t]) for b in range(rows) for t in range(width) if mask[b, t]]
    mean = sum(kept) / len(kept)
    var = sum((v - mean) ** 2 for v in kept) / len(kept)
    white = masked_whiten(x, mask)
    for b in range(rows):
        for t in range(width):
            expected = (float(x[b, t]) - mean) / math.sqrt(var + 1e-8) if mask[b, t] else 0.0
            assert float(white[b, t]) == pytest.approx(expected, abs=1e-9)
    white32 = masked_whiten(x.float(), mask)
    assert white32.dtype == torch.float32
    close(masked_mean(white32, mask), 0.0, 1e-5)
    close(masked_var(white32, mask), 1.0, 1e-5)


def test_whitening_with_the_moments_of_all_processes_equals_whitening_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator)
    mask = response_mask(tensor([5, 1, 3, 2, 4, 5]), 5)
    shards = [slice(0, 1), slice(1, 4), slice(4, 6)]  # unequal counts: a mean of means would differ
    reduced = Moments(*sum(torch.stack(masked_moments(x[s], mask[s])) for s in shards))
    parts = torch.cat([masked_whiten(x[s], mask[s], stats=reduced) for s in shards])
    close(parts, masked_whiten(x, mask), 1e-7)


def test_whitening_survives_a_large_offset_and_a_single_token() -> None:
    x, mask = tensor([[10_000.0, 10_000.5, 10_001.0]]), torch.ones(1, 3, dtype=torch.bool)
    close(masked_whiten(x, mask), [[-1.2247449, 0.0, 1.2247449]], 1e-4)  # float32 sums of squares give noise here
    assert masked_whiten(tensor([[7.0]]), tensor([[True]])).tolist() == [[0.0]]


# --- lengths and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "mask"), [(3, [1, 1, 1, 0, 0]), (5, [1, 1, 1, 1, 1]), (1, [1, 0, 0, 0, 0]), (0, [0, 0, 0, 0, 0])]
)
def test_the_response_mask_counts_the_eos_and_nothing_behind_it(n: int, mask: list) -> None:
    assert response_mask(tensor([n]), 5).tolist() == [[bool(m) for m in mask]]


def test_the_eos_is_trained_even_when_it_is_the_only_token() -> None:
    logits = torch.zeros(1, 5, 7, requires_grad=True)
    tokens = tensor([[6, 7, 7, 7, 7]])  # EOS = 6, PAD = 7 lies outside the vocabulary
    gather_logprobs(logits, tokens, mask=response_mask(tensor([1]), 5)).sum().backward()
    assert bool((logits.grad[0, 0] != 0).all())
    assert bool((logits.grad[0, 1:] == 0).all())


def test_target_mask_covers_the_response_and_its_eos() -> None:
    # p0 p1 r0 r1 E PAD PAD: targets r0, r1, E, predicted by logit columns 1, 2, 3
    mask = target_mask(tensor([2]), tensor([5]), 7)
    assert mask.tolist() == [[False, True, True, True, False, False]]
    whole_text = target_mask(tensor([0]), tensor([4]), 5)  # an empty prompt: all but the first token, and no padding
    assert whole_text.tolist() == [[True, True, True, False]]


# --- log-probabilities -----------------------------------------------------------------------------------------------

LOGITS = tensor([2.0, 1.0, 0.0])


def all_logprobs(logits: Tensor, tau: float) -> Tensor:
    vocabulary = logits.shape[-1]
    return gather_logprobs(logits.expand(vocabulary, vocabulary), torch.arange(vocabulary), tau)


def test_tempered_logprobs_vector() -> None:
    close(all_logprobs(LOGITS, 1.0), [-0.407606, -1.407606, -2.407606])
    close(all_logprobs(LOGITS, 0.7), [-0.260118, -1.688690, -3.117261])


def test_mixed_temperatures_give_a_spurious_kl() -> None:
    policy, reference = all_logprobs(LOGITS, 0.7), all_logprobs(LOGITS, 1.0)
    close((policy.exp() * (policy - reference)).sum(), 0.030351)
    close((policy.exp() * (policy - all_logprobs(LOGITS, 0.7))).sum(), 0.0)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        temper(LOGITS, tau)


def test_logprobs_match_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, generator=generator, dtype=torch.float64) * 5
    tokens = torch.randint(0, 11, (3, 4), generator=generator)
    for tau in (0.3, 0.7, 1.0, 2.0):
        reference = torch.distributions.Categorical(logits=logits / tau)
        close(gather_logprobs(logits, tokens, tau), reference.log_prob(tokens), 1e-12)
        close(entropy_from_logits(logits, tau), reference.entropy(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_cast_before_anything_else(dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 4 - 60).to(dtype)
    tokens = tensor([3, 5])
    logp = gather_logprobs(logits, tokens, 0.7)
    assert logp.dtype == temper(logits, 0.7).dtype == entropy_from_logits(logits).dtype == torch.float32
    assert torch.equal(logp, gather_logprobs(logits.float(), tokens, 0.7))


def test_a_common_offset_of_the_logits_costs_no_precision() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    tokens = tensor([1, 2, 3, 4])
    shifted = (logits.double() - 96).float()  # GPT-2's logits sit tens of units below zero
    exact = torch.log_softmax(shifted.double(), dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    close(gather_logprobs(shifted, tokens).double(), exact, 2e-6)


def test_masked_tokens_may_lie_outside_the_vocabulary() -> None:
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = tensor([[True, True, False]])
    results = []
    for pad in (0, 5, -100, 50257):
        logits.grad = None
        logp = gather_logprobs(logits, tensor([[1, 4, pad]]), 0.7, mask)
        logp.sum().backward()
        assert float(logp[0, 2].detach()) == 0.0
        results.append((logp.detach(), logits.grad))
    assert all(torch.equal(r[0], results[0][0]) and torch.equal(r[1], results[0][1]) for r in results)
    with pytest.raises((RuntimeError, IndexError)):
        gather_logprobs(logits, tensor([[1, 4, 5]]))


def test_changing_a_token_changes_its_own_logprob_only() -> None:
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    before, after = gather_logprobs(logits, tensor([[0, 1, 2, 3]])), gather_logprobs(logits, tensor([[0, 1, 4, 3]]))
    assert (before != after).tolist() == [[False, False, True, False]]


# --- entropy ---------------------------------------------------------------------------------------------------------


def test_entropy_vector() -> None:
    close(entropy_from_logits(LOGITS), 0.8323956)
    close(entropy_from_logits(LOGITS, 0.7), 0.6505726)
    close(entropy_from_logits(torch.zeros(50257)), math.log(50257), 1e-4)


def test_entropy_of_forbidden_ids_is_finite_with_a_finite_gradient() -> None:
    logits = tensor([2.0, 1.0, 0.0, -math.inf], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.backward()
    close(entropy.detach(), 0.8323956)
    assert bool(torch.isfinite(logits.grad).all())


def test_entropy_gradient() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entropy_from_logits(z, 0.7), logits)


def test_row_entropy_counts_no_padding() -> None:
    logp = torch.cat([tensor([[-1.0, -2.0, -1.0]]), torch.ones(1, 50)], dim=1)  # a sentinel of +1 over 50 pads
    assert masked_sum(-logp, response_mask(tensor([3]), 53), dim=-1).tolist() == [4.0]
    assert float((-logp).sum()) == -46.0  # the bug


# --- supervised fine-tuning ------------------------------------------------------------------------------------------


def sft_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss that train_sft.py sums and the tokens it counts: a token table of unit vectors hands logits through."""
    vocabulary = logits.shape[-1]
    table = torch.eye(vocabulary, dtype=logits.dtype)
    return token_loss_sum(logits[mask], table, vocabulary, targets[mask]), mask.sum()


def test_response_logprobs_sum_to_minus_the_sft_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, prompt, response = 13, 4, 5
    ids = torch.randint(0, vocabulary, (1, prompt + response), generator=generator)
    logits = torch.randn(1, prompt + response, vocabulary, generator=generator)
    n = 4  # one padded column
    logp = gather_logprobs(logits[:, prompt - 1 : prompt - 1 + response], ids[:, prompt:])
    total = masked_sum(logp, response_mask(tensor([n]), response))
    mask = target_mask(tensor([prompt]), tensor([prompt + n]), prompt + response)
    loss_sum, count = sft_loss(logits[:, :-1], ids[:, 1:], mask)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[:, prompt + n :] = -100
    mean = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert int(count) == n
    close(total, -float(loss_sum), 1e-5)
    close(total, -n * float(mean), 1e-5)


@pytest.mark.parametrize("pad", [99, 100, 0, -100])
def test_sft_loss_does_not_depend_on_the_pad_id(pad: int) -> None:
    logits = torch.randn(1, 6, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = tensor([[5, 6, 7, 8, 99, pad, pad]])
    loss_sum, count = sft_loss(logits, ids[:, 1:], target_mask(tensor([2]), tensor([5]), 7))
    loss_sum.backward()
    expected = -sum(float(torch.log_softmax(logits[0, j].detach(), -1)[ids[0, j + 1]]) for j in (1, 2, 3))
    assert int(count) == 3
    close(loss_sum.detach(), expected, 1e-5)
    assert logits.grad.abs().sum(dim=-1).ne(0).tolist() == [[False, True, True, True, False, False]]


def losses_to_logits(losses: list[float]) -> Tensor:
    """Two-way logits [1, S, 2] for which class 0 has exactly these cross-entropies."""
    return tensor([[[0.0, math.log(math.expm1(x))] for x in losses]])


def test_token_weighted_accumulation_vector() -> None:
    sums = []
    for losses in ([4.0], [1.0, 1.0, 1.0]):
        targets = torch.zeros(1, len(losses), dtype=torch.long)
        sums.append(sft_loss(losses_to_logits(losses), targets, torch.ones_like(targets, dtype=torch.bool)))
    total, count = (sum(part) for part in zip(*sums, strict=True))
    close(total / count, 1.75)
    close(sum(s / c for s, c in sums) / 2, 2.5)  # the mean of means


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [5, 1], [1, 2, 3]])
def test_accumulated_gradient_equals_that_of_one_big_batch(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (6, 5), generator=generator)
    mask = response_mask(tensor([5, 1, 2, 4, 3, 1]), 5)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = F.cross_entropy((features @ weight)[mask], targets[mask])
    (expected,) = torch.autograd.grad(reference, weight)
    for f, t, m in zip(features.split(sizes), targets.split(sizes), mask.split(sizes), strict=True):
        loss_sum, _ = sft_loss(f @ weight, t, m)
        (loss_sum / mask.sum()).backward()
    close(weight.grad, expected, 1e-12)


def test_token_mean_and_sequence_mean_differ() -> None:
    losses = tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask = response_mask(tensor([4, 1]), 4)
    close(masked_mean(losses, mask), 1.8)  # what every loss here does
    close(masked_mean(losses, mask, dim=1).mean(), 3.0)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 1e-5), (9, 1e-4), (10, 1e-4), (35, 8.68198e-5), (60, 5.5e-5), (110, 1e-5), (500, 1e-5)]
)
def test_cosine_with_warmup_vector(step: int, rate: float) -> None:
    assert cosine_with_warmup(step, 1e-4, 1e-5, 10, 110) == pytest.approx(rate, rel=1e-6)


def test_cosine_with_warmup_rises_then_falls_and_has_no_singular_case() -> None:
    rates = [cosine_with_warmup(s, 1.0, 0.1, 7, 40) for s in range(45)]
    assert rates[:7] == sorted(rates[:7]) and rates[7:] == sorted(rates[7:], reverse=True)
    assert min(rates) > 0 and max(rates) == 1.0
    assert cosine_with_warmup(0, 1.0, 0.0, 0, 10) == 1.0  # no warm-up starts at the peak
    assert cosine_with_warmup(10, 1.0, 0.0, 0, 10) == 0.0
    assert cosine_with_warmup(3, 1.0, 0.1, 3, 3) == 0.1  # all warm-up


def test_linear_to_zero_vector() -> None:
    assert [3e-6 * linear_to_zero(u, 4) for u in (1, 2, 3, 4)] == pytest.approx([3e-6, 2.25e-6, 1.5e-6, 7.5e-7])
    assert linear_to_zero(5, 4) == linear_to_zero(6, 4) == 0.0


def test_adam_with_eps_1e_5_damps_tiny_gradients() -> None:
    """The reason for eps = 1e-5: with 1e-8 the first step of a gradient of 1e-6 has the full size."""
    steps = {}
    for eps in (1e-5, 1e-8):
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        parameter.grad = torch.full_like(parameter, 1e-6)
        torch.optim.Adam([parameter], lr=1.0, eps=eps).step()
        steps[eps] = -float(parameter.detach())
    assert steps[1e-5] == pytest.approx(0.0909, abs=1e-4)  # torch: eps inside the bias correction (TF: 0.00315)
    assert steps[1e-8] == pytest.approx(0.990, abs=1e-3)
