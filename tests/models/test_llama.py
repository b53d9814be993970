"""LLaMA against transformers, in all the shapes it comes in; what all families keep is tested where GPT-2 is."""

import json
import math

import pytest
import torch
from conftest import randomise
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from config.model_configs import LlamaConfig, get_configs
from models.families import load_checkpoint, load_pretrained, new_model
from models.llama import RMSNorm, rotate, rotation, wave_numbers
from models.weights.checkpoint import save_model

CONTEXT, VOCAB = 1024, 97
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "every head its own keys, tied": dict(num_key_value_heads=4, head_dim=12, rope_parameters=DEFAULT),
    "two heads share, narrow, biases": dict(
        num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR,
    ),
    "all heads share, untied": dict(
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, rope_parameters=LLAMA3,
    ),
    "wide heads, untied": dict(num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, rope_parameters=DEFAULT),
}  # fmt: skip


def theirs(**changes) -> LlamaForCausalLM:
    sizes = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    model = randomise(LlamaForCausalLM(TheirConfig(**sizes | changes)), seed=1, std=0.25)
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request, tmp_path_factory):
    """transformers' model, and ours read from what it saved."""
    model, folder = theirs(**SHAPES[request.param]), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, load_pretrained(str(folder)).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_are_theirs_up_to_the_end_of_the_context(pair):
    """A wrong pairing of channels, or a missing stretch, shows late: the first tokens would be right."""
    model, ours = pair
    ids = random_ids(2, CONTEXT)
    torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_theirs_with_padding(pair, padded, random_rows, side):
    model, ours = pair
    rows = random_rows([40, 7, 23], vocab_size=VOCAB)
    ids, att = padded(rows, extra=3, side=side)
    found = ours(ids, att)
    for b, row in enumerate(rows):
        torch.testing.assert_close(found[b][att[b].bool()], model(row[None]).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_tokens_are_theirs_far_into_the_context(pair):
    model, ours = pair
    prompt = random_ids(1, 500)
    options = dict(max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 500:]
    assert torch.equal(ours.generate(prompt[0], 60, -1, temperature=0), expected)


@torch.no_grad()
def test_our_files_are_theirs_to_the_bit(pair, tmp_path):
    model, ours = pair
    ours.save_pretrained(tmp_path, 3)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    ids = random_ids(1, CONTEXT)
    assert torch.equal(again(ids).logits, model(ids).logits)  # so config.json says the same of rotations, too


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_and_half_precision_are_read(tmp_path, dtype):
    model = theirs(tie_word_embeddings=False).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, ids = load_pretrained(str(tmp_path)).eval(), random_ids(1, 50)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    # Read anew: `.to(bfloat16)` has rounded their table of angles, which is why ours has none.
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(ours(ids), expected(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("rope", [DEFAULT, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_the_older_form_of_config_json(tmp_path, rope):
    """transformers 4: rope_theta by itself, the stretch under rope_scaling, in the oldest with "type"."""
    model = theirs(rope_parameters=rope)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    stretch = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope is LINEAR:
        stretch = {"type": "linear", "factor": 3.0}
    config["rope_scaling"] = None if rope is DEFAULT else stretch
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = random_ids(1, CONTEXT)
    torch.testing.assert_close(load_pretrained(str(tmp_path)).eval()(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_buffers_of_old_files_are_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "stretched by 'yarn'.*llama3"),
        (dict(hidden_act="gelu"), "activation gelu; a LLaMA with silu is needed"),
        (dict(rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5}), "rotates a part of each head's channels"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, change, message):
    from config.user_error import UserError

    theirs(**change).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path))


def test_angles_are_taken_in_fp32_whatever_becomes_of_the_model():
    """A table rounded to bf16 has positions beyond 256 that are the same."""
    config = LlamaConfig(n_embd=48, n_head=4, block_size=CONTEXT)
    model = new_model(config).to(torch.bfloat16)
    assert not list(model.buffers())
    cos, sin = rotation(model.config, torch.arange(CONTEXT))
    assert cos.dtype == sin.dtype == torch.float32
    exact = torch.arange(CONTEXT).double()[:, None] * 1e4 ** (-torch.arange(0, 12, 2).double() / 12)
    torch.testing.assert_close(cos[0, 0].double(), exact.cos().repeat(1, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, 0, :, 6:].double(), exact.sin(), atol=1e-4, rtol=0)


def test_rotations_follow_their_formula():
    """Pair (i, i + hd / 2) as a complex number times e^(i angle); the scores of two depend on their distance alone."""
    config = LlamaConfig(n_embd=24, n_head=2, block_size=64)
    x, positions = torch.randn(1, 2, 5, 12, dtype=torch.float64), torch.tensor([0, 3, 4, 40, 63])
    cos, sin = (t.double() for t in rotation(config, positions))
    found = rotate(x, cos, sin)
    angles = torch.atan2(sin, cos)[..., 6:]
    pairs = torch.complex(x[..., :6], x[..., 6:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(found, torch.cat((pairs.real, pairs.imag), -1))
    far = [rotate(x, *(t.double() for t in rotation(config, positions + s))) for s in (0, 1)]
    scores = [y @ y.transpose(2, 3) for y in far]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


def test_a_rotation_has_the_gradient_of_its_formula():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 1, 4, 3, dtype=torch.float64)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_llama3_stretches_long_waves_alone():
    config = get_configs("llama-3.2-1b")
    plain = wave_numbers(LlamaConfig(n_embd=2048, n_head=32, rope_theta=5e5))
    ratio = plain / wave_numbers(config)
    length = 2 * math.pi / plain
    torch.testing.assert_close(ratio[length > 8192], torch.full_like(ratio[length > 8192], 32.0))
    torch.testing.assert_close(ratio[length < 2048], torch.ones_like(ratio[length < 2048]))
    between = ratio[(length > 2048) & (length < 8192)]
    assert len(between) and ((between > 1) & (between < 32)).all()


def test_rms_norm_of_large_halves_is_finite():
    """1,000^2 is no fp16 number; the cast back stands before the weight, as in transformers."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.tensor([[1000.0, -2000.0, 500.0, 30.0]], dtype=torch.float16)
    ours, expected = RMSNorm(4, 1e-5).half(), LlamaRMSNorm(4, 1e-5).half()
    for norm in (ours, expected):
        norm.weight.data = torch.tensor([1.1, 0.3, -2.0, 0.7], dtype=torch.float16)
    assert torch.isfinite(ours(x)).all() and torch.equal(ours(x), expected(x))


def test_an_untied_output_is_saved_trained_and_not_in_other_roles(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=50, tied=False)
    model = new_model(config)
    assert model.output_table is model.output.weight is not model.token_table
    model(random_ids(1, 8) % 50).sum().backward()
    assert model.output.weight.grad.any()
    save_model(model, tmp_path)
    assert torch.equal(load_checkpoint(tmp_path).output.weight, model.output.weight)
    for role in ("reward", "critic"):
        started = load_checkpoint(tmp_path, role)
        assert not any("output" in name for name, _ in started.named_parameters())
        assert torch.equal(started.token_table, model.token_table)


def test_adapters_stand_on_the_seven_projections_and_on_no_table():
    config = get_configs("llama-nano/lora")
    model = new_model(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    places = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in shapes}
    attention, mlp = (f"self_attn.{x}_proj" for x in "qkvo"), (f"mlp.{x}_proj" for x in ("gate", "up", "down"))
    assert places == {*attention, *mlp} and len(shapes) == 2 * 7 * config.n_layer
    assert shapes["model.layers.0.self_attn.k_proj.lora_B"] == (config.n_kv_head * config.head_dim, config.lora_rank)
    model.freeze_weights("lora")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(shapes)
