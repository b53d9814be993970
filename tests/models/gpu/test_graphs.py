"""Decoding at fixed places, as a GPU replays it, against decoding that grows; on a CPU a stand-in is the graph.

The stand-in runs what would be recorded, and counts; `pytest -m gpu` runs the same with real graphs.
"""

import pytest
import torch
from gpu_marks import DEVICES

from config.model_configs import GPTConfig, LlamaConfig
from models.families import new_model
from models.generation import generate
from models.gpu import graphs

EOS, T = 49, 24
SIZES = dict(n_layer=2, block_size=64, vocab_size=50, init_std=0.5)
MODELS = {
    "gpt2": GPTConfig(n_head=2, n_embd=16, **SIZES),
    "gpt2 with adapters": GPTConfig(n_head=2, n_embd=16, lora_rank=2, **SIZES),
    "llama": LlamaConfig(n_head=4, n_kv_head=2, head_dim=8, n_embd=24, tied=False, **SIZES),
}


@pytest.fixture
def recorded(monkeypatch):
    """Steps at fixed places on any device; what was recorded, one entry a recording: its number of replays."""
    replays = []
    record = graphs.record

    def stand_in(work):
        run, at = record(work) if torch.cuda.is_available() else work, len(replays)
        replays.append(0)

        def replay():
            replays[at] += 1
            return run()

        return replay

    monkeypatch.setattr(graphs, "serves", lambda device: True)
    monkeypatch.setattr(graphs, "record", stand_in)
    return replays


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = new_model(MODELS[request.param])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.token_table[EOS] *= 1.5  # rows end at different steps
    return model


def sampled(model, lengths, **options):
    prompts = [torch.randint(EOS, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    seeds = range(len(lengths))
    return generate(model, prompts, max_new_tokens=T, eos_id=EOS, seeds=seeds, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[5, 9, 2, 7, 7, 1], [6] * 4, [3]], ids=["mixed", "of one length", "one row"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_steps_are_those_of_a_growing_cache(model, device, lengths, temperature, request):
    expected = sampled(model, lengths, temperature=temperature)
    request.getfixturevalue("recorded")
    found = sampled(model.to(device), lengths, temperature=temperature)
    assert torch.equal(found.responses.cpu(), expected.responses) and torch.equal(found.n.cpu(), expected.n)
    torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs, atol=1e-4, rtol=0)


def test_every_number_of_rows_is_recorded_once(model, recorded):
    """The first step at each number of rows runs as it is, the second is recorded, all others are replays."""
    generation = sampled(model, [4] * 8, temperature=1.0)
    steps = int(generation.n.max()) - 1
    assert 1 <= len(recorded) <= 8 and sum(recorded) >= steps - 2 * len(recorded) - 8
    assert len(set(generation.n.tolist())) > 1  # rows left the batch on the way


def test_what_is_not_filled_yet_is_never_read(model, recorded, monkeypatch):
    """Fresh memory holds anything: NaN there must not reach a row."""
    expected = sampled(model, [5, 2], temperature=0.0)
    empty = torch.empty

    def dirty(*sizes, **options):
        x = empty(*sizes, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", dirty)
    found = sampled(model, [5, 2], temperature=0.0)
    assert torch.equal(found.responses, expected.responses) and found.logprobs.isfinite().all()


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"])
def test_a_recording_that_fails_is_told_and_left_out(model, device, monkeypatch, capsys):
    model = model.to(device)
    expected = sampled(model, [5, 2], temperature=0.0)

    def refused(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "serves", lambda device: True)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refused)
    graphs._tell.cache_clear()
    assert torch.equal(sampled(model, [5, 2], temperature=0.0).responses, expected.responses)
    assert "without a CUDA graph" in capsys.readouterr().err
