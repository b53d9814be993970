"""Responses that end at a text."""

import numpy as np
import pytest
import torch
from every_family import EVERY

from models.generation import generate
from models.stop_strings import StopStrings

FAMILIES = EVERY
VOCAB, EOS, ROWS, T = 12, 11, 24, 40
# Texts of several letters, of one, and single bytes of a letter of two: é is C3 A9.
PIECES = [b"ab", b"a", b"b", b"c", b"\xc3", b"\xa9", b"bc", b"\n", b"\xa9c", b" ", b"abc", b""]


def decode(ids) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab_size=VOCAB, block_size=64)


def sampled(model, **options):
    prompts = [np.array([1, 2, 3][: 1 + i % 3]) for i in range(ROWS)]
    return generate(model, prompts, max_new_tokens=T, eos_id=EOS, temperature=10.0, seeds=range(ROWS), **options)


@pytest.mark.parametrize("strings", [("a",), ("bab",), ("é",), ("c\n", "abab"), (" \n", "cc"), ("zz",)])
def test_rows_end_with_the_token_that_completes_a_string(model, strings):
    stop = StopStrings(strings, decode)
    free, bound = sampled(model), sampled(model, stop=stop)
    ends = 0
    for b in range(ROWS):
        ids = free.row(b).tolist()
        lengths = range(1, len(ids) + 1)
        at = next((n for n in lengths if ids[n - 1] != EOS and any(s in decode(ids[:n]) for s in strings)), None)
        expected = ids[:at] if at else ids
        assert bound.row(b).tolist() == expected
        assert bool(bound.stopped[b]) == (at is not None)
        assert bool(bound.ended[b]) == (expected[-1] == EOS)
        ends += at is not None
        torch.testing.assert_close(bound.logprobs[b, : len(expected)], free.logprobs[b, : len(expected)])
        assert bound.responses[b, len(expected) :].eq(VOCAB).all()
        assert not any(s in stop.cut(decode(expected)) for s in strings)
    assert (ends > 0) == (strings != ("zz",)) and not free.stopped.any()


def test_rows_that_came_to_a_string_cost_nothing_more(model, monkeypatch):
    from models.decoding import Decoder

    rows = []
    original = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, token: rows.append(len(token)) or original(self, token))
    n = sampled(model, stop=StopStrings(("a", "b"), decode)).n
    alive = [int((n > t).sum()) for t in range(1, int(n.max()))]
    assert len(rows) == int(n.max()) - 1
    assert all(0.75 * r < a <= r for r, a in zip(rows, alive, strict=True))


def test_text_is_cut_at_the_first_string():
    stop = StopStrings(("\n\nHuman:", "STOP"), decode)
    assert stop.cut("Sure. STOP it\n\nHuman: no") == "Sure. "
    assert stop.cut("nothing to cut") == "nothing to cut" and stop.cut("") == ""
    assert stop.window == 8 and StopStrings(("é",), decode).window == 2


@pytest.mark.parametrize("strings", [(), ("",), ("a", ""), "abc"])
def test_strings_that_cannot_be_meant(strings):
    with pytest.raises(ValueError, match="stop strings must be"):
        StopStrings(strings, decode)
