"""Parity with transformers' GPT-2, and folders that transformers reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from config.model_configs import get_configs
from config.user_error import UserError
from models.cache import KVCache
from models.generation import generate
from models.gpt import GPT, GPTActor, GPTCritic, GPTRewardModel
from models.weights.checkpoint import save_model
from utils.tokenizer import get_tokenizer

pytestmark = pytest.mark.slow

# (layers, heads, channels, context, vocabulary)
SHAPES = [(2, 3, 24, 40, 61), (1, 5, 40, 32, 50), (3, 4, 32, 48, 97), (2, 1, 16, 33, 30)]
LENGTHS = [11, 4, 17, 1]


def reference(shape: tuple, seed: int = 0, **options) -> GPT2LMHeadModel:
    """transformers' model with random numbers in every parameter."""
    layers, heads, channels, context, vocab = shape
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=channels, n_positions=context, vocab_size=vocab,
        bos_token_id=vocab - 1, eos_token_id=vocab - 1, **options,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[1]}heads")
def pair(request, tmp_path_factory):
    """(transformers' model, ours from its folder, the folder)."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = reference(request.param)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(str(folder)).eval(), folder


@pytest.fixture
def folder(tmp_path):
    """A good folder to spoil."""
    reference(SHAPES[0]).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def their_logits(model: GPT2LMHeadModel, ids: torch.Tensor, att: torch.Tensor) -> torch.Tensor:
    """Logits with mask-derived positions, which `generate` passes and a plain forward does not."""
    positions = (att.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids.masked_fill(~att, 0), attention_mask=att.long(), position_ids=positions).logits


# ---------------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sizes_come_from_the_folder(pair):
    theirs, ours, _ = pair
    c = theirs.config
    assert (ours.config.n_layer, ours.config.n_head, ours.config.n_embd) == (c.n_layer, c.n_head, c.n_embd)
    assert (ours.config.block_size, ours.config.vocab_size) == (c.n_positions, c.vocab_size)


@torch.no_grad()
def test_logits_without_padding(pair, random_rows):
    theirs, ours, _ = pair
    ids = torch.stack(random_rows([20, 20, 20], ours.config.vocab_size))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(pair, padded, random_rows, side):
    theirs, ours, _ = pair
    ids, att = padded(random_rows(LENGTHS, ours.config.vocab_size), 3, side, ours.config.vocab_size)
    expected = their_logits(theirs, ids, att)[att]
    torch.testing.assert_close(ours(ids, att)[att], expected, atol=1e-4, rtol=0)
    if side == "right":
        torch.testing.assert_close(ours(ids, att, right_padded=True)[att], expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_cache(pair, padded, random_rows, side):
    theirs, ours, _ = pair
    ids, att = padded(random_rows(LENGTHS, ours.config.vocab_size), 0, side, ours.config.vocab_size)
    cache = KVCache.allocate(ours.config, *ids.shape, ids.device, torch.float32)
    parts = [ours.hidden(i, a, cache) for i, a in zip(ids.split([10, 1, 6], 1), att.split([10, 1, 6], 1), strict=True)]
    logits = ours.lm_head(torch.cat(parts, 1))
    torch.testing.assert_close(logits[att], their_logits(theirs, ids, att)[att], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_generation(pair, padded, random_rows):
    """Left-padded prompts of mixed length, rows that end at EOS and rows that do not."""
    theirs, ours, _ = pair
    T, vocab = 14, ours.config.vocab_size
    prompts = random_rows(LENGTHS, vocab)
    free = generate(ours, prompts, max_new_tokens=T, eos_id=vocab, temperature=0)  # an id that never comes
    eos = int(free.responses[0, 4])
    ids, att = padded(prompts, 0, "left", pad_id=0)
    options = dict(max_new_tokens=T, do_sample=False, pad_token_id=0)
    sequences = theirs.generate(ids, attention_mask=att.long(), eos_token_id=eos, **options)[:, ids.shape[1] :]
    ours_ended = ours.batch_generate(prompts, T, eos, temperature=0)
    assert ours_ended.ended[0]
    for b, response in enumerate(sequences.tolist()):
        end = response.index(eos) + 1 if eos in response else T
        assert ours_ended.row(b).tolist() == response[:end]
        assert ours_ended.ended[b] == (eos in response)
        assert ours.generate(prompts[b], T, eos, temperature=0).tolist() == response[:end]


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.3])
def test_the_layer_norms_take_the_epsilon_of_the_folder(tmp_path, padded, random_rows, eps):
    """In training, in generation and on the way back; at GPT-2's own 1e-5 a constant in its place would not show."""
    theirs = reference(SHAPES[0], layer_norm_epsilon=eps)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    assert ours.config.layer_norm_eps == eps
    ids, att = padded(random_rows(LENGTHS, ours.config.vocab_size), 0, "left", ours.config.vocab_size)
    expected = their_logits(theirs, ids, att)[att]
    torch.testing.assert_close(ours(ids, att)[att], expected, atol=1e-4, rtol=0)
    cache = KVCache.allocate(ours.config, *ids.shape, ids.device, torch.float32)
    parts = [ours.hidden(i, a, cache) for i, a in zip(ids.split([16, 1], 1), att.split([16, 1], 1), strict=True)]
    torch.testing.assert_close(ours.lm_head(torch.cat(parts, 1))[att], expected, atol=1e-4, rtol=0)
    prompts = random_rows(LENGTHS, ours.config.vocab_size)
    generated = generate(ours, prompts, max_new_tokens=6, eos_id=ours.config.vocab_size, temperature=0)
    for b, prompt in enumerate(prompts):
        row = torch.cat([prompt, generated.responses[b]])[None]
        choices = theirs(row).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert choices.tolist() == generated.responses[b].tolist()
    ours.save_pretrained(tmp_path / "ours")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert back.config.layer_norm_epsilon == eps
    save_model(ours, tmp_path / "checkpoint")
    for model in (back, GPT.from_checkpoint(tmp_path / "checkpoint").eval()):
        logits = model(ids[:1][att[:1]][None])
        torch.testing.assert_close(getattr(logits, "logits", logits)[0], expected[: LENGTHS[0]], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip_is_exact(pair, tmp_path, random_rows):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    back = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    ids = random_rows([20], ours.config.vocab_size)[0][None]
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    again = GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())
    assert back.config.eos_token_id == ours.config.vocab_size - 1


@torch.no_grad()
def test_adapters_are_merged_on_export(make_model, tmp_path, random_rows):
    model, ids = make_model(lora_rank=4), random_rows([12])[0][None]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_export_beside_its_tokenizer(make_model, tmp_path):
    """One folder holds both: transformers generates from it, with our ids and our EOS."""
    tokenizer = get_tokenizer("demo")
    model = make_model(vocab_size=tokenizer.vocab_size, embedding_rows=tokenizer.vocab_size + 23)
    model.save_pretrained(tmp_path, eos_id=tokenizer.eos_id)
    tokenizer.export_huggingface(tmp_path)
    text = "\n\nHuman: What is red?\n\nAssistant:"
    theirs, their_tokenizer = GPT2LMHeadModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = their_tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode(text)
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_id
    sampled = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert sampled[0, ids.shape[1] :].tolist() == model.generate(ids[0], 12, tokenizer.eos_id, temperature=0).tolist()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("pad_id", [0, 50, 53])
def test_a_reward_model_is_a_classifier(make_model, padded, random_rows, tmp_path, dtype, tolerance, pad_id):
    """Gain and constants of the head are folded in; padding may be a token of the vocabulary or lie behind it."""
    ours = make_model(GPTRewardModel, lora_rank=4, embedding_rows=64)
    ours.head.bias.fill_(0.7)
    ours.set_normalisation(1.3, -4.0)
    ours.save_pretrained(tmp_path, eos_id=49, pad_id=pad_id, dtype=dtype)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, att = padded([row.clamp(min=1) for row in random_rows(LENGTHS)], 3, "right", pad_id)
    assert theirs.config.vocab_size == max(50, pad_id + 1)
    wanted = ours(ids.clamp(max=49), att)
    assert wanted.std() > 0.5
    found = theirs(input_ids=ids, attention_mask=att.long()).logits[:, 0]
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@torch.no_grad()
def test_padded_token_table(tmp_path, random_rows):
    """A table of 64 rows for 50 ids: 14 logits are never computed, and an export does not bring them back."""
    theirs = reference((2, 3, 24, 40, 64))
    theirs.save_pretrained(tmp_path / "in")
    ours = GPT.from_pretrained(tmp_path / "in", vocab_size=50)
    assert (ours.config.vocab_size, ours.config.embedding_rows) == (50, 64)
    ids = random_rows([12], 50)[0][None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits[..., :50], atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "out")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(ids).logits, ours(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cls", [GPTActor, GPTCritic, GPTRewardModel])
@torch.no_grad()
def test_every_role_and_preset_starts_from_a_folder(folder, cls, random_rows):
    """The sizes are the folder's; dropout, adapters and memory options the preset's."""
    plain = GPT.from_pretrained(folder)
    ids = random_rows([9], 61)[0][None]
    model = cls.from_pretrained(folder, get_configs("gpt2-medium/lora")).eval()
    assert type(model) is cls
    assert (model.config.n_layer, model.config.lora_rank, model.config.name) == (2, 8, "gpt2-medium/lora")
    assert torch.equal(model.hidden(ids), plain.hidden(ids))
    assert cls.from_pretrained(folder, get_configs("gpt2/dropout")).config.dropout == 0.2
    if cls is not GPTActor:
        assert model.normalisation == (1.0, 0.0)
        assert 0 < float(model.head.weight.std()) < 1
        with pytest.raises(ValueError, match="head would be lost|a padding id that is not EOS"):
            model.save_pretrained(folder / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Folders that do not fit
# ---------------------------------------------------------------------------------------------------------------------


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def poison(state):
    state["transformer.h.0.mlp.c_fc.bias"][3] = float("nan")


SPOILED = {
    "another architecture": (lambda f: BertConfig().save_pretrained(f), "bert"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10\x20"), "damaged"),
    "missing tensor": (
        lambda f: change_weights(f, lambda s: s.pop("transformer.h.1.attn.c_attn.weight")),
        "missing transformer.h.1.attn.c_attn.weight",
    ),
    "left-over layer": (lambda f: change_config(f, n_layer=1), "unexpected transformer.h.1"),
    "wrong shape": (lambda f: change_config(f, n_embd=48), "shapes"),
    "heads do not divide": (lambda f: change_config(f, n_head=5), "divisible"),
    "NaN": (lambda f: change_weights(f, poison), "NaN"),
    "activation": (lambda f: change_config(f, activation_function="relu"), "relu"),
    "attention scale": (lambda f: change_config(f, scale_attn_by_inverse_layer_idx=True), "attention"),
    "feed-forward width": (lambda f: change_config(f, n_inner=50), "50"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_folder_that_does_not_fit(folder, what):
    spoil, expected = SPOILED[what]
    spoil(folder)
    with pytest.raises(UserError, match=expected) as caught:
        GPT.from_pretrained(folder)
    assert str(caught.value).startswith(f"-p {folder}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "gpt2-of-nobody", "nobody/gpt2"])
def test_a_name_that_is_not_there(name):
    with pytest.raises(UserError, match="-p .*cannot be loaded"):
        GPT.from_pretrained(name)


def test_untied_output_projection(tmp_path):
    reference(SHAPES[0], tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tied"):
        GPT.from_pretrained(tmp_path)


def test_tokenizer_larger_than_the_table(folder):
    with pytest.raises(UserError, match="61 rows, the tokenizer 62 ids"):
        GPT.from_pretrained(folder, vocab_size=62)


def test_forms_in_which_older_versions_saved(folder, tmp_path):
    """Names without "transformer.", causal masks among the tensors (the hub's gpt2 has both), a pickled .bin file."""
    expected = GPT.from_pretrained(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    masks = {"attn.bias": torch.ones(1, 1, 40, 40).tril(), "attn.masked_bias": torch.tensor(-1e4)}
    masks = {f"h.{layer}.{key}": value.clone() for layer in range(2) for key, value in masks.items()}
    for prefix in ("", "transformer."):
        old = {prefix + key.removeprefix("transformer."): value for key, value in state.items()}
        save_file(
            old | {prefix + key: value for key, value in masks.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        loaded = GPT.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    pickled = shutil.copytree(folder, tmp_path / "bin")
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    assert torch.equal(GPT.from_pretrained(pickled).transformer.wpe.weight, expected["transformer.wpe.weight"])
    (pickled / "pytorch_model.bin").write_bytes(b"not a pickle" * 100)
    with pytest.raises(UserError, match="damaged"):
        GPT.from_pretrained(pickled)


def test_heads_of_other_tasks_are_left_out(tmp_path):
    source = GPT2ForSequenceClassification(reference(SHAPES[0]).config)
    source.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, source.transformer.wte.weight)
