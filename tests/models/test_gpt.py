"""What only GPT-2 has: tied tables, its start, dropout, logits with a large offset."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.gpt import GPT


def test_state_holds_the_parameters_and_nothing_else(make_model):
    """The head is the token table itself, and no causal mask is stored."""
    model = make_model()
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert not any("lm_head" in key or "mask" in key for key in state)
    sizes = model.config
    d, layers = sizes.n_embd, sizes.n_layer
    assert sum(p.numel() for p in model.parameters()) == (50 + 64) * d + layers * (12 * d * d + 13 * d) + 2 * d


def test_output_projection_is_the_token_table(make_model):
    model = make_model()
    h = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    before = model.lm_head(h)
    with torch.no_grad():
        model.transformer.wte.weight[7] *= 2
    after = model.lm_head(h)
    torch.testing.assert_close(after[:, 7], 2 * before[:, 7])
    assert torch.equal(after[:, 8:], before[:, 8:])


def test_initial_weights_are_gpt2s(make_model):
    torch.manual_seed(0)
    config = make_model(n_layer=8, n_embd=64, vocab_size=500, init_std=0.05).config
    state = GPT(config).state_dict()
    for key, value in state.items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "ln_" in key:
            assert (value == 1).all(), key
        else:
            std = 0.05 / math.sqrt(2 * 8) if key.endswith("c_proj.weight") else 0.05
            assert float(value.std()) == pytest.approx(std, rel=0.05), key


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
def test_dropout_acts_in_all_three_places(make_model, random_rows, place):
    model, ids = make_model(dropout=0.2), random_rows([10])[0][None]
    assert torch.equal(model(ids), make_model()(ids))  # eval mode
    transformer = model.transformer
    if place != "embedding":
        transformer.drop.p = 0.0
    for block in transformer.h:
        if place != "attention":
            block.attn.dropout = 0.0
        if place != "residual":
            block.attn.resid_dropout.p = block.mlp.dropout.p = 0.0
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_keep_their_digits_in_any_autocast(make_model, random_rows, dtype):
    """GPT-2's logits share a large offset; rounded to bf16 they would be off by as much as PPO's clip range."""
    model, ids = make_model(n_embd=32, std=0.05), random_rows([40])[0][None]
    h = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    model.transformer.ln_f.bias.fill_(5.0)  # with the next line every logit gets about -60
    model.transformer.wte.weight.sub_(0.4)
    exact, product = model(ids), F.linear(h, model.transformer.wte.weight)
    with torch.autocast("cpu", dtype):
        logits = model(ids)
        assert (model.lm_head(h).log_softmax(-1) - product.log_softmax(-1)).abs().max() < 5e-3
    assert exact.mean() < -50
    assert logits.dtype == torch.float32
    assert (logits.log_softmax(-1) - exact.log_softmax(-1)).abs().max() < 2e-2
    rounded = exact.to(torch.bfloat16).float()
    assert (rounded.log_softmax(-1) - exact.log_softmax(-1)).abs().max() > 5e-2
