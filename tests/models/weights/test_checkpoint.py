"""Model folders: what each stage starts from, and every way in which a folder can be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_family import EVERY, GPT2_ALONE
from safetensors.torch import load_file, save_file

from config.model_configs import ModelConfig, get_configs
from config.user_error import UserError
from models.families import FAMILIES as MODELS
from models.families import load_checkpoint
from models.lora import is_adapter, merge_lora
from models.weights.checkpoint import describe, save_model

FAMILIES = EVERY
LORA_OPTIONS = dict(lora_rank=16, lora_alpha=32.0)


@pytest.fixture
def presets(family) -> dict[str, ModelConfig]:
    """The family's smallest by variant; with /lora it has the adapters of LORA_OPTIONS."""
    variants = {"plain": "", "lora": "/lora"} | ({"dropout": "/dropout"} if family == "gpt2" else {})
    return {variant: get_configs(f"{family}-nano{ending}") for variant, ending in variants.items()}


@pytest.fixture
def batch(padded, random_rows):
    return padded(random_rows([9, 4, 12]), 2, "left")


def without_adapters(model):
    """The same module with B = 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What starts from what
# ---------------------------------------------------------------------------------------------------------------------


def test_who_may_read_the_description_may_read_the_weights(make_model, tmp_path):
    save_model(make_model(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "model.json").stat().st_mode


@pytest.mark.parametrize("role", ["lm", "actor", "critic", "reward"])
@pytest.mark.parametrize("rank", [0, 3])
def test_saved_and_loaded_is_the_same(make_model, batch, tmp_path, family, role, rank):
    options = dict(dropout=0.1) if family == "gpt2" else dict(attention_bias=True, rope_type="linear", rope_factor=2.0)
    model = make_model(
        role, lora_rank=rank, activation_checkpointing=True, vocab_size=40, embedding_rows=50, **options
    )
    if role in ("critic", "reward"):
        model.set_normalisation(2.5, -0.25)
    save_model(model, tmp_path / "a" / "b", {"stage": "sft", "template": {"human": "\n\nHuman: "}})
    loaded = load_checkpoint(tmp_path / "a" / "b", role)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    ids, att = batch
    assert torch.equal(loaded.eval()(ids.clamp(max=39), att), model(ids.clamp(max=39), att))
    assert describe(tmp_path / "a" / "b")["stage"] == "sft"


def test_the_folder_is_enough_to_rebuild_the_model(make_model, family, tmp_path):
    save_model(make_model("reward"), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    assert (description["role"], description["format"]) == ("reward", 1)
    assert (description["model"]["family"], description["model"]["n_embd"]) == (family, 16)
    assert set(load_file(tmp_path / "model.safetensors")) == set(make_model("reward").state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("role", ["reward", "critic"])
@pytest.mark.parametrize("variant", ["plain", "lora", "dropout"])
@pytest.mark.parametrize("sft_rank", [0, 16])
def test_sft_to_scalar_role(make_model, batch, tmp_path, presets, role, variant, sft_rank):
    """Only the head is new; the trunk is the SFT model, adapters of the SFT stage merged, new ones at zero."""
    if variant not in presets:
        pytest.skip("a LLaMA has no dropout")
    options, preset = LORA_OPTIONS if sft_rank else {}, presets[variant]
    sft = make_model("lm", **options)
    save_model(sft, tmp_path)
    torch.manual_seed(0)
    model = load_checkpoint(tmp_path, role, preset, adapters="fresh").eval()
    assert model.role == role and model.config.lora_rank == preset.lora_rank and model.config.dropout == preset.dropout
    expected = merge_lora(sft)
    assert torch.equal(model.hidden(*batch), expected.hidden(*batch))
    for key, value in expected.state_dict().items():
        assert key in expected.only_for_language or torch.equal(model.state_dict()[key], value), key
    assert not model.state_dict().keys() & set(expected.only_for_language)
    new = set(model.state_dict()) - set(expected.state_dict())
    assert {key for key in new if not is_adapter(key)} == {
        f"head.{k}" for k in ("weight", "bias", "norm_gain", "norm_bias")
    }
    assert any(is_adapter(key) for key in new) == bool(preset.lora_rank)
    assert 0.05 < model.head.weight.std() < 0.5 and not model.head.bias.any() and model.normalisation == (1.0, 0.0)


def test_sft_with_adapters_to_actor(make_model, batch, tmp_path, presets):
    sft = make_model("lm", **LORA_OPTIONS)
    save_model(sft, tmp_path)
    reference = load_checkpoint(tmp_path, config=replace(presets["lora"], lora_rank=0)).eval()
    actor, kept = (load_checkpoint(tmp_path, "actor", presets["lora"], how).eval() for how in ("fresh", "keep"))
    assert torch.equal(actor(*batch), reference(*batch))  # bitwise: the KL of the first step is 0
    torch.testing.assert_close(reference(*batch), sft(*batch), atol=1e-4, rtol=1e-5)
    assert torch.equal(kept(*batch), sft(*batch))
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if is_adapter(name):
                parameter.add_(0.1)
    assert not torch.equal(actor(*batch), reference(*batch))
    assert torch.equal(without_adapters(actor)(*batch), reference(*batch))


def test_fresh_adapters_off_are_the_saved_model(make_model, batch, tmp_path, presets):
    for role in ("lm", "reward"):
        saved = make_model(role)
        save_model(saved, tmp_path / role)
        fresh = load_checkpoint(tmp_path / role, role, presets["lora"], adapters="fresh").eval()
        assert torch.equal(without_adapters(fresh)(*batch), saved(*batch))


@pytest.mark.parametrize("rm_options", [{}, LORA_OPTIONS], ids=["plain", "lora"])
@pytest.mark.parametrize("variant", ["plain", "lora"])
def test_reward_model_to_critic(make_model, batch, tmp_path, presets, rm_options, variant):
    """Head and normalisation come along; nothing is new but adapters that the reward model did not have."""
    preset = presets[variant]
    reward = make_model("reward", **rm_options)
    reward.set_normalisation(2.0, 0.5)
    save_model(reward, tmp_path)
    critic = load_checkpoint(tmp_path, "critic", preset, adapters="keep").eval()
    last = torch.tensor([len(row) - 1 for row in batch[1]])
    values = critic(*batch)[range(3), last]  # left-padded: the last column
    torch.testing.assert_close(values, reward(*batch), atol=1e-5, rtol=1e-5)
    assert critic.normalisation == (2.0, 0.5)
    assert critic.config.lora_rank == preset.lora_rank
    assert torch.equal(critic.head.weight, reward.head.weight)
    kept = bool(rm_options) and bool(preset.lora_rank)
    adapters = {key: value for key, value in critic.state_dict().items() if is_adapter(key)}
    assert bool(adapters) == bool(preset.lora_rank)
    if adapters:
        found = [torch.equal(value, reward.state_dict().get(key, torch.empty(0))) for key, value in adapters.items()]
        assert all(found) if kept else not any(found)


def test_adapters_of_another_rank_or_alpha_are_merged(make_model, batch, tmp_path, presets):
    saved = make_model("lm", lora_rank=4, lora_alpha=8.0)
    save_model(saved, tmp_path)
    for preset in (presets["lora"], replace(presets["lora"], lora_rank=4, lora_alpha=16.0), presets["plain"]):
        loaded = load_checkpoint(tmp_path, config=preset, adapters="keep").eval()
        assert loaded.config.lora_rank == preset.lora_rank
        assert torch.equal(loaded(*batch), merge_lora(saved)(*batch))
    with pytest.raises(ValueError, match="adapters"):
        load_checkpoint(tmp_path, config=presets["lora"], adapters="merge")


def test_memory_and_dropout_options_are_the_presets(make_model, tmp_path, presets):
    save_model(make_model(lora_rank=2, lora_dropout=0.2, activation_checkpointing=False), tmp_path)
    assert load_checkpoint(tmp_path).config.lora_dropout == 0.2
    loaded = load_checkpoint(tmp_path, config=replace(presets["plain"], activation_checkpointing=True))
    assert (loaded.config.lora_dropout, loaded.config.activation_checkpointing) == (0.0, True)
    assert (loaded.config.n_embd, loaded.config.vocab_size) == (16, 50)  # sizes stay the folder's


@pytest.mark.slow
def test_a_compiled_model_is_saved_plain(make_model, batch, tmp_path):
    model = make_model()
    save_model(torch.compile(model), tmp_path)
    assert torch.equal(load_checkpoint(tmp_path).eval()(*batch), model(*batch))


def test_a_model_of_foreign_sizes_takes_any_preset(make_model, family, tmp_path):
    """Read from a Hugging Face folder without a preset, a model carries the folder's name."""
    save_model(make_model(name="/data/tiny"), tmp_path)
    preset = get_configs({"gpt2": "gpt2/lora", "llama": "smollm2-135m/lora"}[family])
    assert load_checkpoint(tmp_path, config=preset).config.lora_rank == 8


# ---------------------------------------------------------------------------------------------------------------------
# Wrong folders
# ---------------------------------------------------------------------------------------------------------------------


def edit_json(folder: Path, **values) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_config(folder: Path, **values) -> None:
    edit_json(folder, model=json.loads((folder / "model.json").read_text())["model"] | values)


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def put(key: str, value: torch.Tensor):
    return lambda folder: edit_weights(folder, lambda state: state.update({key: value}))


def drop(*keys: str):
    return lambda folder: edit_weights(folder, lambda state: [state.pop(key) for key in keys])


NAN, INF = torch.full((16,), float("nan")), torch.full((16,), float("inf"))
SPOILED = {
    "no description": (lambda f: (f / "model.json").unlink(), "no model.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "description is not JSON": (lambda f: (f / "model.json").write_text("{"), "model.json: not a model description"),
    "description is not text": (lambda f: (f / "model.json").write_bytes(b"\xff\xfe\x00"), "not a model description"),
    "description is a list": (lambda f: (f / "model.json").write_text("[]"), "not a model description"),
    "no model config": (lambda f: edit_json(f, model=None), "no model config"),
    "no role": (lambda f: edit_json(f, role=None), "role None"),
    "role is a list": (lambda f: edit_json(f, role=["lm"]), "role"),
    "format of the future": (lambda f: edit_json(f, format=2), "format 2, this code reads 1"),
    "unknown key in the config": (lambda f: edit_config(f, rope=True), "unknown keys .'rope'"),
    "wrong type in the config": (lambda f: edit_config(f, n_layer="2"), "n_layer is '2', expected int"),
    "impossible config": (lambda f: edit_config(f, n_head=3), "model.json: model config: n_embd 16"),
    "more layers than weights": (lambda f: edit_config(f, n_layer=3), "missing transformer.h.2"),
    "fewer layers than weights": (lambda f: edit_config(f, n_layer=1), "unexpected transformer.h.1"),
    "adapters without weights": (lambda f: edit_config(f, lora_rank=2), "missing .*lora_A"),
    "other sizes": (lambda f: edit_config(f, n_embd=32), "wrong shape or type head.weight"),
    "missing tensor": (drop("transformer.h.1.attn.c_attn.weight"), "missing transformer.h.1.attn.c_attn.weight"),
    "missing head": (drop("head.weight", "head.bias"), "missing head.bias, head.weight"),
    "missing normalisation": (drop("head.norm_gain"), "missing head.norm_gain"),
    "left-over tensor": (
        put("transformer.lm_head.weight", torch.zeros(3)),
        "unexpected transformer.lm_head",
    ),
    "prefix of a wrapper": (put("module.head.weight", torch.zeros(1, 16)), "unexpected module.head.weight"),
    "wrong shape": (put("transformer.ln_f.bias", torch.zeros(17)), "wrong shape or type transformer.ln_f.bias"),
    "whole numbers": (
        put("transformer.ln_f.bias", torch.zeros(16).long()),
        "wrong shape or type transformer.ln_f.bias",
    ),
    "NaN": (put("transformer.ln_f.bias", NAN), "holds NaN or infinity.*transformer.ln_f.bias"),
    "infinity": (put("transformer.ln_f.weight", INF), "holds NaN or infinity"),
    "cut weights": (cut_file, "model.safetensors: cannot be read"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
}


@GPT2_ALONE
@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_in_one_line(make_model, tmp_path, what):
    save_model(make_model("reward"), tmp_path)
    spoil, expected = SPOILED[what]
    spoil(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        load_checkpoint(tmp_path, "critic")
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "saved, wanted, needed",
    [
        ("reward", "lm", "holds a reward model; an SFT or PPO model is needed"),
        ("reward", "actor", "holds a reward model; an SFT or PPO model is needed"),
        ("critic", "lm", "holds a critic; an SFT or PPO model is needed"),
        ("critic", "reward", "holds a critic; a reward model or an SFT or PPO model is needed"),
    ],
)
def test_a_role_that_cannot_start_from_the_folder(make_model, tmp_path, saved, wanted, needed):
    save_model(make_model(saved), tmp_path)
    with pytest.raises(UserError, match=needed):
        load_checkpoint(tmp_path, wanted)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium/lora", "smollm2-135m", "tinyllama-1.1b/lora"])
def test_a_preset_of_another_model(make_model, family, tmp_path, preset):
    save_model(make_model(**LORA_OPTIONS), tmp_path)
    told = f"holds a {family}-nano, not a {preset.split('/')[0]}; give --config {family}-nano"
    with pytest.raises(UserError, match=told):
        load_checkpoint(tmp_path, config=get_configs(preset))


def test_a_class_of_another_family(make_model, family, tmp_path):
    save_model(make_model(), tmp_path)
    other = next(name for name in EVERY if name != family)
    with pytest.raises(UserError, match=f"holds a model of family {family}; one of {other} is needed here"):
        MODELS[other]["lm"].from_checkpoint(tmp_path)


def test_a_new_head_excuses_nothing_else(make_model, family, tmp_path):
    """A reward model starts from an SFT folder that lacks all of its head and nothing more."""
    key = {"gpt2": "transformer.ln_f.bias", "llama": "model.norm.weight"}[family]
    save_model(make_model(), tmp_path)
    drop(key)(tmp_path)
    with pytest.raises(UserError, match=f"missing {key}"):
        load_checkpoint(tmp_path, "reward")
    save_model(make_model(), tmp_path)
    put("head.weight", torch.zeros(1, 16))(tmp_path)
    for role in ("lm", "reward"):
        with pytest.raises(UserError, match="unexpected head.weight"):
            load_checkpoint(tmp_path, role)


def test_adapters_that_the_config_does_not_know_are_refused(make_model, tmp_path, presets):
    save_model(make_model(**LORA_OPTIONS), tmp_path)
    edit_config(tmp_path, lora_rank=0)
    for preset in (presets["plain"], presets["lora"]):
        with pytest.raises(UserError, match="unexpected .*lora_A"):
            load_checkpoint(tmp_path, config=preset)


def test_half_of_an_adapter_is_refused(make_model, tmp_path, presets):
    model = make_model(**LORA_OPTIONS)
    save_model(model, tmp_path)
    half = next(key for key in model.state_dict() if key.endswith("lora_B"))
    drop(half)(tmp_path)
    for preset in (presets["lora"], presets["plain"], None):
        for adapters in ("keep", "fresh"):
            with pytest.raises(UserError, match=f"missing {half}"):
                load_checkpoint(tmp_path, config=preset, adapters=adapters)
