"""Sampling: from the right distribution, reproducible row by row, ended at EOS, and no more work than needed."""

import math

import numpy as np
import pytest
import torch
from every_family import EVERY

from models import generation
from models.causal_lm import CausalLM
from models.decoding import Decoder
from models.families import new_model
from models.generation import Generation, _row_uniforms, generate, sample

FAMILIES = EVERY
EOS, VOCAB, PAD = 49, 50, 50
LENGTHS = [9, 4, 1, 12, 6, 6, 2, 15, 3, 8]
T = 16


@pytest.fixture(scope="module")
def model(make_model):
    """An EOS about once in ten tokens, so that rows end at different steps and some never."""
    model = make_model(n_embd=32)
    with torch.no_grad():
        model.output_table[EOS] = 1.5 * common_direction(model)
    return model


def common_direction(model) -> torch.Tensor:
    """A direction [d], of length 1, in which all final states lie: that of GPT-2's last bias; RMSNorm has none."""
    mean = model.hidden(torch.arange(20)[None])[0].mean(0)
    return torch.nn.functional.normalize(getattr(model.final_norm, "bias", mean), dim=0)


@pytest.fixture
def prompts(random_rows):
    return random_rows(LENGTHS, vocab_size=EOS)


SEEDS = list(range(100, 100 + len(LENGTHS)))


def by_hand(model: CausalLM, prompt: torch.Tensor, seed: int, T: int, **options) -> tuple[list[int], list[float]]:
    """One row alone, the whole sequence anew for every token: no cache, no batch, no padding."""
    uniforms = _row_uniforms([seed], 1, T, torch.device("cpu"))
    ids, logprobs = prompt.tolist(), []
    for t in range(T):
        logits = model(torch.tensor([ids]))[:, -1]
        token, logp = sample(logits, options.get("temperature", 1.0), uniform=uniforms[:, t])
        ids.append(int(token))
        logprobs.append(float(logp))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :], logprobs


# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_batch_with_cache_is_each_row_by_hand(model, prompts, temperature):
    generation = generate(model, prompts, max_new_tokens=T, eos_id=EOS, temperature=temperature, seeds=SEEDS)
    for b, (prompt, seed) in enumerate(zip(prompts, SEEDS, strict=True)):
        response, logprobs = by_hand(model, prompt, seed, T, temperature=temperature)
        n = len(response)
        assert generation.row(b).tolist() == response
        assert generation.n[b] == n and generation.ended[b] == (response[-1] == EOS)
        torch.testing.assert_close(generation.logprobs[b, :n], torch.tensor(logprobs), atol=1e-4, rtol=0)
    if temperature == 1.0:  # or the test would show little
        assert int(generation.ended.sum()) >= 3 and len(set(generation.n.tolist())) > 3


@pytest.mark.parametrize(
    ("row", "n", "ended", "padded"),
    [
        ([11, 12, EOS, 13, 14], 3, True, [11, 12, EOS, PAD, PAD]),
        ([11, 12, 13, 14, 15], 5, False, [11, 12, 13, 14, 15]),
        ([11, 12, 13, 14, EOS], 5, True, [11, 12, 13, 14, EOS]),
        ([EOS, 12, 13, 14, 15], 1, True, [EOS, PAD, PAD, PAD, PAD]),
        ([11, EOS, 13, EOS, 15], 2, True, [11, EOS, PAD, PAD, PAD]),
    ],
)
def test_a_row_ends_at_its_first_eos(model, monkeypatch, row, n, ended, padded):
    """`row` would be sampled beside one that never ends; behind its EOS it leaves the batch."""
    wanted = iter(zip(row, [1, 2, 3, 4, 5]))

    def scripted(logits, *_):
        return torch.tensor(next(wanted)[-len(logits) :]), torch.full((len(logits),), -1.0)

    monkeypatch.setattr("models.generation.sample", scripted)
    g = generate(model, [torch.tensor([7, 8]), torch.tensor([9])], max_new_tokens=5, eos_id=EOS)
    assert g.responses.tolist() == [padded, [1, 2, 3, 4, 5]] and g.ended.tolist() == [ended, False]
    assert g.n.tolist() == [n, 5] and g.logprobs[0].tolist() == [-1.0] * n + [0.0] * (5 - n)


@torch.no_grad()
def test_a_rows_sample_does_not_depend_on_its_batch(model, prompts):
    whole = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS)
    order = np.random.default_rng(0).permutation(len(prompts))
    for part in (order[:1], order[1:4], order):
        some = generate(model, [prompts[b] for b in part], max_new_tokens=T, eos_id=EOS, seeds=[SEEDS[b] for b in part])
        for i, b in enumerate(part):
            assert some.row(i).tolist() == whole.row(b).tolist()
            assert some.prompts[i, -len(prompts[b]) :].tolist() == prompts[b].tolist()


def test_layout_of_a_generation(model, prompts):
    g = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS)
    assert isinstance(g, Generation)
    width = int(g.n.max())
    assert g.responses.shape == g.logprobs.shape == (len(prompts), width) and g.logprobs.dtype == torch.float32
    assert g.prompts.shape == (len(prompts), max(LENGTHS)) and g.prompt_len.tolist() == LENGTHS
    for b, n in enumerate(g.n.tolist()):
        response = g.responses[b].tolist()
        assert PAD not in response[:n] and response[n:] == [PAD] * (width - n)
        assert EOS not in response[: n - 1]
        assert bool(g.ended[b]) == (response[n - 1] == EOS)
        assert g.ended[b] or n == T
        assert (g.logprobs[b, :n] < 0).all() and not g.logprobs[b, n:].any()
        assert g.prompts[b, : -LENGTHS[b]].tolist() == [PAD] * (max(LENGTHS) - LENGTHS[b])
    assert generate(model, prompts, max_new_tokens=T, eos_id=EOS, pad_id=77, seeds=SEEDS).responses.max() == 77


def test_seeds_decide_everything(model, prompts):
    options = dict(max_new_tokens=T, eos_id=EOS)
    first = generate(model, prompts, seeds=SEEDS, **options)
    assert torch.equal(generate(model, prompts, seeds=SEEDS, **options).responses, first.responses)
    other = generate(model, prompts, seeds=[seed + 1000 for seed in SEEDS], **options)
    assert sum(other.row(b).tolist() != first.row(b).tolist() for b in range(len(prompts))) >= 8
    same = generate(model, [prompts[3]] * 2, seeds=[5, 5], **options)
    assert same.row(0).tolist() == same.row(1).tolist()
    torch.manual_seed(3)
    unseeded = generate(model, prompts, **options)
    again = generate(model, prompts, **options)
    torch.manual_seed(3)
    assert torch.equal(generate(model, prompts, **options).responses, unseeded.responses)
    assert any(unseeded.row(b).tolist() != again.row(b).tolist() for b in range(len(prompts)))


def test_a_longer_limit_goes_on_where_a_shorter_one_stopped(model, prompts):
    short, long = (generate(model, prompts, max_new_tokens=t, eos_id=EOS, seeds=SEEDS) for t in (5, 30))
    for b in range(len(prompts)):
        assert long.row(b).tolist()[:5] == short.row(b).tolist()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampler_logprobs_are_those_of_a_full_forward(model, prompts, temperature):
    g = generate(model, prompts, max_new_tokens=T, eos_id=EOS, temperature=temperature, seeds=SEEDS)
    ids = torch.cat([g.prompts, g.responses], 1)
    P, width = g.prompts.shape[1], g.responses.shape[1]
    columns = torch.arange(P + width)
    att = (columns >= (P - g.prompt_len)[:, None]) & (columns < (P + g.n)[:, None])
    rmask = att[:, P:]
    logp = (model(ids, att)[:, P - 1 : P - 1 + width] / temperature).log_softmax(-1)
    logp = logp.gather(-1, g.responses.masked_fill(~rmask, 0)[..., None]).squeeze(-1)
    torch.testing.assert_close(logp[rmask], g.logprobs[rmask], atol=1e-4, rtol=0)


def test_ids_outside_the_vocabulary_are_never_sampled(make_model, random_rows):
    """The rows of the table behind the vocabulary are made by far the most likely; they have no logits."""
    model = make_model(vocab_size=20, embedding_rows=32)
    with torch.no_grad():
        model.output_table[20:] = 100 * common_direction(model)
    prompts = random_rows([5] * 50, vocab_size=20)
    for temperature in (0, 1.0, 5.0):
        g = generate(model, prompts, max_new_tokens=8, eos_id=19, temperature=temperature)
        assert g.responses[g.responses != 20].max() < 20  # 20 is PAD here
        assert all(int(g.row(b).max()) < 20 for b in range(50))


# ---------------------------------------------------------------------------------------------------------------------
# Work
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(model, monkeypatch):
    """Rows of every forward pass of the model."""
    rows = []
    prompts, one_token = model.hidden, Decoder.step

    def hidden(ids, *args, **kwargs):
        rows.append(len(ids))
        return prompts(ids, *args, **kwargs)

    def step(self, token):
        rows.append(len(token))
        return one_token(self, token)

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(Decoder, "step", step)
    return rows


def test_the_loop_ends_when_all_rows_have(model, random_rows, watched):
    g = generate(model, random_rows([2, 3, 4], EOS, seed=5), max_new_tokens=60, eos_id=EOS, seeds=[1, 2, 3])
    assert g.ended.all() and g.n.max() < 60
    assert len(watched) == g.n.max() == g.responses.shape[1]  # one pass for the prompt, none for the last token


def test_an_eos_at_once_costs_one_forward(model, random_rows, watched):
    prompts = random_rows([4, 6])
    first = generate(model, prompts[:1], max_new_tokens=1, eos_id=VOCAB, temperature=0).row(0)
    watched.clear()
    g = generate(model, prompts[:1], max_new_tokens=10, eos_id=int(first), temperature=0)
    assert g.n.tolist() == [1] and g.ended.all() and watched == [1]


def test_ended_rows_leave_the_batch(model, random_rows, watched):
    """At most a quarter of the rows of any pass have ended."""
    g = generate(model, random_rows([4] * 64), max_new_tokens=T, eos_id=EOS, seeds=range(64))
    assert len(watched) == int(g.n.max())
    for t, rows in enumerate(watched):
        alive = int((g.n > t).sum())
        assert alive <= rows and (rows - alive) <= 0.25 * rows, t
    assert watched[-1] < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_cell_of_the_cache_is_read_before_it_is_written(make_model, prompts, dtype):
    """torch fills new memory with NaN in its deterministic mode: what is read unwritten would show."""
    model, options = make_model(n_embd=32).to(dtype), {"max_new_tokens": T, "eos_id": EOS, "seeds": SEEDS}
    expected = generate(model, prompts, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = generate(model, prompts, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.responses, expected.responses) and torch.equal(found.logprobs, expected.logprobs)


@torch.no_grad()
def test_mode_and_gradients_are_left_as_they_were(make_model, random_rows):
    model = make_model(lora_rank=2, lora_dropout=0.5)
    prompts = random_rows([3, 4], vocab_size=EOS)
    expected = generate(model, prompts, max_new_tokens=5, eos_id=EOS, seeds=[0, 1]).responses
    assert not model.training and not model.blocks[0].training
    model.train()
    assert torch.equal(generate(model, prompts, max_new_tokens=5, eos_id=EOS, seeds=[0, 1]).responses, expected)
    assert model.training and model.blocks[0].training
    model.hidden = None  # whatever goes wrong in the middle
    with pytest.raises(TypeError):
        generate(model, prompts, max_new_tokens=5, eos_id=EOS)
    assert model.training


def test_nothing_requires_a_gradient(model, prompts):
    g = generate(model, prompts, max_new_tokens=3, eos_id=EOS, seeds=SEEDS)
    assert not g.logprobs.requires_grad


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_in_bf16(make_model, prompts, rank, temperature):
    model = make_model(lora_rank=rank)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (
            generate(model, prompts, max_new_tokens=T, eos_id=EOS, temperature=temperature, seeds=SEEDS)
            for _ in range(2)
        )
    assert torch.equal(first.responses, second.responses)
    assert first.logprobs.dtype == torch.float32 and torch.isfinite(first.logprobs).all()


@pytest.mark.parametrize("as_what", [list, np.asarray, lambda ids: np.asarray(ids, dtype=np.int32), torch.tensor])
def test_prompts_may_be_lists_arrays_or_tensors(model, as_what):
    expected = generate(model, [torch.tensor([1, 2, 3])], max_new_tokens=4, eos_id=EOS, seeds=[0]).responses
    assert torch.equal(
        generate(model, [as_what([1, 2, 3])], max_new_tokens=4, eos_id=EOS, seeds=[0]).responses, expected
    )


def test_methods_of_the_model(model, prompts):
    batch = model.batch_generate(prompts, T, EOS, seeds=SEEDS)
    assert torch.equal(batch.responses, generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS).responses)
    assert torch.equal(model.generate(prompts[2], T, EOS, seeds=SEEDS[2:3]), batch.row(2))
    actor = new_model(model.config, "actor")
    actor.load_state_dict(model.state_dict())
    assert torch.equal(actor.generate(prompts[2], T, EOS, seeds=SEEDS[2:3]), batch.row(2))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1] * 60], {}, "prompt of 60 tokens and 5 new ones do not fit the context of 64"),
        ([[1], [1] * 64], {}, "do not fit"),
        ([], {}, "no prompt"),
        ([[1], []], {}, "at least one token"),
        ([[[1, 2]]], {}, "one dimension"),
        ([[1, 50]], {}, r"\[0, 50\)"),
        ([[-1]], {}, r"\[0, 50\)"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": math.inf}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_impossible_requests(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 5, "eos_id": EOS, **options})


def test_the_whole_context_can_be_used(model):
    g = generate(model, [[1] * 59], max_new_tokens=5, eos_id=VOCAB)
    assert g.n.tolist() == [5]


# ---------------------------------------------------------------------------------------------------------------------
# The distribution
# ---------------------------------------------------------------------------------------------------------------------


def chi_square(drawn: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic of drawn ids against probabilities p."""
    expected = p * len(drawn)
    return float(((torch.bincount(drawn, minlength=len(p)) - expected).square() / expected).sum())


CHI_SQUARE_7 = 24.3  # exceeded once in a thousand times at 7 degrees of freedom


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_frequencies_are_the_tempered_softmax(tau):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -0.5, 0.0])
    N = 20_000
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn, logp = sample(logits.expand(N, -1), tau, uniform=uniform)
    p = (logits / tau).softmax(-1)
    assert chi_square(drawn, p) < CHI_SQUARE_7
    torch.testing.assert_close(logp, p.log()[drawn])
    wrong = (logits / (1.1 * tau)).softmax(-1)
    assert chi_square(drawn, wrong) > 2 * CHI_SQUARE_7  # the test can tell


@torch.no_grad()
def test_frequencies_of_generated_tokens(make_model):
    """4,000 rows with seeds 0, 1, 2, ...: the rows' streams do not resemble one another."""
    model = make_model(vocab_size=8)
    prompt = [3, 1, 4]
    g = generate(model, [prompt] * 4000, max_new_tokens=2, eos_id=8, seeds=range(4000))
    p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert chi_square(g.responses[:, 0], p) < CHI_SQUARE_7
    first = int(p.argmax())
    after = model(torch.tensor([prompt + [first]]))[0, -1].softmax(-1)
    assert chi_square(g.responses[g.responses[:, 0] == first, 1], after) < CHI_SQUARE_7


def test_greedy_takes_the_most_likely_and_never_divides_by_zero():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1e4, 4.9]])
    token, logp = sample(logits, 0)
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logp, logits.log_softmax(-1)[[0, 1], [1, 0]])
    token, _ = sample(logits, 1e-6, uniform=torch.tensor([0.999999, 0.0], dtype=torch.float64))
    assert token.tolist() == [1, 0]


def test_a_uniform_of_zero_passes_over_ids_without_weight():
    """Ids come in slices of 128; here the first has no weight at all."""
    logits = torch.full((1, 300), float("-inf"))
    logits[0, 200] = 0.0
    token, logp = sample(logits, 1.0, uniform=torch.zeros(1, dtype=torch.float64))
    assert token.item() == 200 and logp.item() == 0


def test_greedy_decoding_draws_no_random_number(make_model):
    model, before = make_model(), torch.random.get_rng_state()
    generate(model, [[1, 2, 3]], max_new_tokens=3, eos_id=49, temperature=0.0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seeds", [None, range(4)])
def test_uniforms_are_fine_enough_for_rare_ids(seeds):
    """In fp32 they would be multiples of 2^-24, which never reach an id of less than 6e-8."""
    uniforms = _row_uniforms(seeds, 4, 50, torch.device("cpu"))
    assert uniforms.dtype == torch.float64
    assert ((uniforms * 2**24) % 1 != 0).all()


def test_every_uniform_gives_an_id_with_probability():
    """The ends of [0, 1), and ids of probability zero at both ends and between."""
    minus = float("-inf")
    logits = torch.tensor([minus, 0.0, minus, 1.0, minus, minus])
    uniform = torch.tensor([0.0, 1e-300, 0.2689, 0.2690, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    token, logp = sample(logits.expand(7, -1), 1.0, uniform=uniform)
    assert token.tolist() == [1, 1, 1, 3, 3, 3, 3]
    assert torch.isfinite(logp).all()


def test_the_tail_of_a_large_vocabulary_is_reachable():
    """Behind an id of probability almost 1 each of 50,256 others has 2e-9: a sum in fp32 would skip 29 of 30."""
    V, tail, N = 50_257, 1e-4, 2000
    p = torch.full((V,), tail / (V - 1))
    p[0] = 1 - tail
    uniform = 1 - tail / 2 + torch.arange(N, dtype=torch.float64) * 4 * tail / V  # every fourth id of the tail
    token = torch.cat([sample(p.log().expand(len(u), -1), 1.0, uniform=u)[0] for u in uniform.split(100)])
    assert token.min() > 20_000
    assert (token.diff() - 4).abs().max() <= 1


def test_nan_logits_do_not_crash_the_sampler():
    """They come out as NaN log-probabilities, which the checks on the experience name; a GPU would die of the index."""
    token, logp = sample(torch.full((2, 5), float("nan")), 1.0, uniform=torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert ((token >= 0) & (token < 5)).all() and logp.isnan().all()


def grid(n: int = 4000) -> torch.Tensor:
    """Evenly spaced uniforms: frequencies come out exact to 1 / n."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("k", [1, 3, 5, 8, 100])
def test_top_k_keeps_the_k_most_likely(k):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, -3.0, 0.0, 1.7])
    u = grid()
    token, logp = sample(logits.expand(len(u), -1), 1.0, top_k=k, uniform=u)
    kept = logits.argsort(descending=True)[:k]
    p = torch.zeros(8).index_copy(0, kept, logits[kept].softmax(0))
    torch.testing.assert_close(torch.bincount(token, minlength=8) / len(u), p, atol=2 / len(u), rtol=0)
    torch.testing.assert_close(logp, p[token].log())


@pytest.mark.parametrize("top_p, kept", [(0.1, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (0.999, 5)])
def test_top_p_keeps_the_smallest_set_with_the_mass(top_p, kept):
    """The id that crosses top_p is in the set: probabilities 0.5, 0.3, 0.15, 0.04, 0.01 in shuffled order."""
    p = torch.tensor([0.04, 0.5, 0.01, 0.3, 0.15])
    u = grid()
    token, logp = sample(p.log().expand(len(u), -1), 1.0, top_p=top_p, uniform=u)
    order = p.argsort(descending=True)[:kept]
    q = torch.zeros(5).index_copy(0, order, p[order] / p[order].sum())
    torch.testing.assert_close(torch.bincount(token, minlength=5) / len(u), q, atol=2 / len(u), rtol=0)
    torch.testing.assert_close(logp, q[token].log(), atol=1e-5, rtol=0)


def test_top_k_then_top_p_then_temperature():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    u = grid(400)
    token, _ = sample((p.log() * 0.7).expand(400, -1), 0.7, top_k=3, top_p=0.7, uniform=u)
    assert set(token.tolist()) == {0, 1}  # of 4/9, 3/9, 2/9 the first two have 0.78
    assert (token == 0).float().mean().item() == pytest.approx(4 / 7, abs=0.01)


def test_restricted_sampling_through_generate(model, prompts):
    greedy = generate(model, prompts, max_new_tokens=T, eos_id=EOS, temperature=0)
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        g = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS, **option)
        assert torch.equal(g.responses, greedy.responses)
        assert not g.logprobs.any()  # one candidate: certainty


def test_any_of_several_ends_ends_a_row(model, prompts):
    """As a row goes on where only one of them ends it, it is cut where any of them first stands."""
    one = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS)
    other = int(one.row(0)[len(one.row(0)) // 2])  # in the middle of a response
    both = generate(model, prompts, max_new_tokens=T, eos_id=[EOS, other], seeds=SEEDS)
    for b in range(len(prompts)):
        ids = one.row(b).tolist()
        cut = next((i + 1 for i, token in enumerate(ids) if token in (EOS, other)), len(ids))
        assert both.row(b).tolist() == ids[:cut] and both.ended[b] == (ids[cut - 1] in (EOS, other))
    assert both.n[0] < one.n[0]


@pytest.mark.parametrize("every", [3, 8, 100])
def test_rows_that_are_seldom_asked_say_the_same(model, prompts, monkeypatch, every):
    """As on a GPU, where to ask is to wait: a row that has ended is worked on for nothing, and says no more."""
    expected = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS)
    monkeypatch.setattr(generation, "_asked_every", lambda device: every)
    found = generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=SEEDS)
    for field in ("responses", "n", "ended"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)  # batches of other sizes round
