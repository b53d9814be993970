"""--compile: the same results, or a word and none of it."""

import pytest
import torch
from every_family import EVERY

from training.engine.compiling import compile_blocks

FAMILIES = EVERY
pytestmark = pytest.mark.slow


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_compiled_blocks_compute_what_they_did(make_model, monkeypatch) -> None:
    # All of torch.compile but the C++ compiler, which takes a minute: its graphs run in eager mode.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    model, ids = make_model().train(), torch.arange(24).view(3, 8)
    names, random = list(model.state_dict()), torch.get_rng_state()
    with bf16():
        plain = model.hidden(ids, right_padded=True)
    (expected,) = torch.autograd.grad(plain.float().square().sum(), model.token_table)
    assert compile_blocks(model, bf16)
    assert torch.equal(torch.get_rng_state(), random) and list(model.state_dict()) == names
    assert all(p.grad is None for p in model.parameters())
    with bf16():
        ours = model.hidden(ids, right_padded=True)
    (found,) = torch.autograd.grad(ours.float().square().sum(), model.token_table)
    torch.testing.assert_close(ours, plain, atol=5e-2, rtol=2e-2)
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_where_it_fails_the_model_stays_as_it_was(make_model, monkeypatch, capsys) -> None:
    model, ids = make_model(), torch.arange(24).view(3, 8)
    plain = model.hidden(ids)

    def fails(*_, **__):
        raise RuntimeError("no compiler found\nmore of it")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    assert compile_blocks(model, bf16) is False
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no compiler found" in told and "going on without" in told
    assert torch.equal(model.hidden(ids), plain)
    assert all(block._compiled_call_impl is None for block in model.blocks)
