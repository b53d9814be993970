"""A flat decoding step against the whole model: any padding, any adapters, after rows have left."""

import pytest
import torch
from every_family import EVERY

from models import kernels
from models.cache import KVCache
from models.cpu import packing
from models.generation import generate
from training.engine.runtime import adamw
from utils.data.batching import right_pad

FAMILIES = EVERY
EOS = 49
CPU = torch.device("cpu")


def filled(model, rows, pads):
    """A cache that holds left-padded rows; returns it with their ids and mask."""
    width = max(len(r) + p for r, p in zip(rows, pads))
    ids, att = torch.full((len(rows), width), 50), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.as_tensor(row)
        att[b, width - len(row) :] = True
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    cache = KVCache.allocate(model.config, len(rows), width + 6, CPU, dtype)
    model.hidden(ids, att, cache)
    return cache, ids, att


@pytest.fixture(params=["plain", "lora"])
def model(request, make_model):
    model = make_model(n_embd=32, lora_rank=4 if request.param == "lora" else 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("lengths", [[5, 3, 9, 1], [6, 6, 6, 6]])
@torch.no_grad()
def test_steps_are_the_whole_model(model, random_rows, lengths):
    rows = random_rows(lengths, vocab_size=EOS)
    cache, ids, att = filled(model, rows, [0] * 4)
    decoder = model.decoder(cache)
    assert (decoder.bias is None) == (len(set(lengths)) == 1)
    for t in range(4):
        token = torch.arange(4) + t
        ids, att = torch.cat([ids, token[:, None]], 1), torch.cat([att, torch.ones(4, 1, dtype=torch.bool)], 1)
        torch.testing.assert_close(decoder.step(token), model(ids, att)[:, -1], atol=1e-5, rtol=0)
        assert torch.equal(cache.att[:, : cache.length], att)


@torch.no_grad()
def test_prompts_may_be_padded_on_the_right(model, random_rows):
    """As sampling reads them: what lies behind a shorter prompt stays in the cache, and no step may see it."""
    rows = random_rows([5, 3, 9, 1], vocab_size=EOS)
    left, _, _ = filled(model, rows, [0] * 4)
    right = KVCache.allocate(model.config, 4, 15, CPU, torch.float32)
    ids, att = right_pad([row.numpy() for row in rows], 50)
    last = torch.arange(4) * 9 + att.sum(1) - 1
    states = model.hidden(ids, att, right, right_padded=True, at=last)
    torch.testing.assert_close(states, model.hidden(ids, att, right_padded=True).flatten(0, 1)[last])
    ours, theirs = model.decoder(right), model.decoder(left)
    assert torch.equal(ours.position, theirs.position) and torch.equal(right.att[:, :9], att)
    for t in range(4):
        token = torch.arange(4) + t
        torch.testing.assert_close(ours.step(token), theirs.step(token), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_leave(model, random_rows):
    cache, ids, att = filled(model, random_rows([5, 3, 9, 1], vocab_size=EOS), [0] * 4)
    decoder, keep, token = model.decoder(cache), torch.tensor([0, 3]), torch.tensor([7, 8])
    decoder.keep_rows(keep)
    whole = torch.cat([ids[keep], token[:, None]], 1), torch.cat([att[keep], torch.ones(2, 1, dtype=torch.bool)], 1)
    torch.testing.assert_close(decoder.step(token), model(*whole)[:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_bf16_stays_near_the_training_forward(model, random_rows):
    """Half precision has about three digits: the step must be as near to fp32 as the training forward is."""
    rows = random_rows([5, 3, 9, 1], vocab_size=EOS)
    token = torch.arange(4)
    exact_cache, ids, att = filled(model, rows, [0] * 4)
    exact = model.decoder(exact_cache).step(token).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        cache, _, _ = filled(model, rows, [0] * 4)
        ours = model.decoder(cache).step(token).log_softmax(-1)
        ids, att = torch.cat([ids, token[:, None]], 1), torch.cat([att, torch.ones(4, 1, dtype=torch.bool)], 1)
        theirs = model(ids, att)[:, -1].log_softmax(-1)
    assert cache.keys[0].dtype == torch.bfloat16
    assert (ours - exact).abs().max() < max(2 * (theirs - exact).abs().max(), torch.tensor(2e-2))


@torch.no_grad()
def halve(model):
    for parameter in model.parameters():
        parameter.mul_(0.5)


def train(model):
    """Steps of the optimizer that training uses."""
    optimizer = adamw([{"name": "policy", "params": list(model.parameters()), "lr": 0.1}], (0.9, 0.95), 1e-8, 0.0, CPU)
    for _ in range(3):
        model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("change", [halve, train])
def test_new_weights_are_used_at_once(model, random_rows, change):
    """What is kept with a parameter must not outlive an optimizer step or a load."""
    prompts, ids = random_rows([4, 6], vocab_size=EOS), torch.arange(20).view(2, 10)

    def outcome(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logprobs = generate(model, prompts, max_new_tokens=4, eos_id=99, temperature=0).logprobs
            return logprobs, model.token_logprobs(model.hidden(ids).flatten(0, 1), ids.flatten())

    before = outcome(model)
    change(model)
    after = outcome(model)
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for old, new, expected in zip(before, after, outcome(fresh), strict=True):
        assert torch.equal(new, expected) and not torch.equal(old, new)


def test_roles_share_what_was_packed(make_model, monkeypatch):
    if not packing.serves(CPU, torch.bfloat16):
        pytest.skip("this CPU has no packed bf16 weights")
    weight = next(layer.weight for layer in make_model().blocks.modules() if isinstance(layer, torch.nn.Linear))
    first = kernels.decoding_weight(weight, torch.bfloat16)
    monkeypatch.setattr(packing, "pack", lambda weight: pytest.fail("packed again"))
    assert kernels.decoding_weight(weight, torch.bfloat16) is first and first.is_mkldnn


@torch.no_grad()
def test_packed_products_are_the_plain_ones():
    if not packing.serves(CPU, torch.bfloat16):
        pytest.skip("this CPU has no packed bf16 weights")
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 64), (96, 64), (96,)))
    plain = x.float() @ w.float().t() + b.float()
    packed = packing.pack(w)
    torch.testing.assert_close(packing.packed_linear(x, packed, b).float(), plain, atol=0.1, rtol=1e-2)
    gelu = torch.nn.functional.gelu(plain, approximate="tanh")
    torch.testing.assert_close(packing.packed_linear(x, packed, b, gelu=True).float(), gelu, atol=0.1, rtol=1e-2)
