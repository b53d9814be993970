"""The packed copies of weights: made when asked for, dropped when the weight changes, the bits of the plain product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config.model_configs import get_configs
from models import kernels
from models.cpu.packing import serves
from models.decoding import DecodingLinear
from models.gpt import GPT
from models.lora import freeze_weights, round_frozen
from models.weight_copies import kept_with

packs = pytest.mark.skipif(
    not serves(torch.device("cpu"), torch.bfloat16), reason="oneDNN has no packed bf16 layout on this processor"
)


def test_kept_until_the_parameter_or_the_key_changes():
    parameter, made = nn.Parameter(torch.zeros(3)), []

    def take(key):
        return kept_with(parameter, "made", key, lambda: made.append(key) or len(made))

    assert [take("a"), take("a"), take("b")] == [1, 1, 2]
    with torch.no_grad():
        parameter.add_(1)
    assert take("b") == 3
    parameter.data = torch.ones(3)
    assert take("b") == 4


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_step_is_a_change(fused):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, fused=fused)
    for _ in range(2):
        kept = kept_with(parameter, "made", None, lambda: parameter.detach().clone())
        assert torch.equal(kept, parameter)
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert not torch.equal(kept, parameter)


def decoded(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A frozen layer that decoding has used in bf16."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.requires_grad_(False)
    DecodingLinear(layer, torch.bfloat16)
    return layer


@packs
@pytest.mark.parametrize("rows", [1, 5, 128, 333])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 96), (768, 3072), (3072, 768)])
def test_the_packed_product_has_the_bits_of_the_plain_one(rows, n_in, n_out):
    """PPO's ratio rests on it: scores may be taken from packed weights and the loss from plain ones."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n_out, n_in, generator=generator), torch.randn(n_out, generator=generator)
    layer = decoded(weight, bias)
    x = torch.randn(rows, n_in, generator=generator).bfloat16().requires_grad_()
    ours, plain = kernels.linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)
    assert torch.equal(ours, plain)
    g = torch.randn(rows, n_out, generator=generator).bfloat16()
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (ours, plain)))


@packs
def test_no_stale_or_trained_weight_is_taken_from_its_copy():
    layer, x = decoded(torch.randn(8, 8), torch.randn(8)), torch.randn(2, 8).bfloat16()
    assert kernels._packed(x, layer.weight, layer.bias) is not None
    assert kernels._packed(x.float(), layer.weight, layer.bias) is None
    layer.weight.requires_grad_(True)
    assert kernels._packed(x, layer.weight, layer.bias) is None
    with torch.no_grad():
        assert kernels._packed(x, layer.weight, layer.bias) is not None
    layer.weight.requires_grad_(False).add_(1)
    assert kernels._packed(x, layer.weight, layer.bias) is None
    assert kernels._packed(x, nn.Parameter(torch.randn(8, 8).bfloat16(), False), layer.bias) is None


@packs
@torch.no_grad()
@pytest.mark.parametrize("trains", [False, True])
def test_a_plain_model_reads_prompts_by_what_decoding_packed(trains):
    torch.manual_seed(0)
    model = GPT(get_configs("gpt2-nano")).requires_grad_(trains).eval()
    ids = torch.randint(0, 1024, (3, 20))
    with torch.autocast("cpu", torch.bfloat16):
        before = model.hidden(ids)
        model.batch_generate([ids[0]], 2, 1023)
        layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(4, 128)
        assert kernels._packed(x.bfloat16(), layer.weight, layer.bias) is not None
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert torch.equal(model.hidden(ids), before)


@packs
def test_a_model_with_adapters_computes_the_same_before_and_after_decoding():
    torch.manual_seed(0)
    model = GPT(get_configs("gpt2-nano/lora"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.02)
    freeze_weights(model, "lora")
    round_frozen(model, torch.bfloat16)
    ids = torch.randint(0, 1024, (3, 20))

    def logits_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, at=torch.arange(50), targets=torch.randint(0, 1024, (50,), generator=torch.Generator()))
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = logits_and_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        model.eval().batch_generate([ids[0]], 2, 1023)
    assert all(getattr(b.attn.c_attn.weight, "packed_weight", None) is not None for b in model.transformer.h)
    after = logits_and_gradients()
    # A run that is resumed may take its first forward pass before it decodes: the bits must not tell.
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
