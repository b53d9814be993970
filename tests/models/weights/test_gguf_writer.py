"""GGUF files, written and read back: by transformers' own reader, and by ours."""

import json

import pytest
import torch
from gguf_files import SHAPES, TEXT, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from config.user_error import UserError
from models.weights.gguf import read_gguf
from models.weights.gguf_writer import KINDS, write_gguf
from utils.tokenizers.huggingface import quiet_transformers

CLOSE = {"f16": 1e-3, "q8_0": 2e-2}  # of the largest number of a tensor


def by_transformers(file):
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def assert_close(state, wanted, kind):
    assert {key for key in wanted if key not in state and not key.endswith("_proj.bias")} <= {"lm_head.weight"}
    for key, value in state.items():
        scale = wanted[key].abs().max().clamp(min=1e-6)
        assert (value - wanted[key]).abs().max() / scale < CLOSE[kind], key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_llama_comes_back_as_it_was(tmp_path, shape, kind):
    model = tiny_model(tmp_path / "hf", **SHAPES[shape])
    file = tmp_path / "m.gguf"
    write_gguf(tmp_path / "hf", file, kind)
    back = read_gguf(file)
    state, theirs = back.state(), by_transformers(file).state_dict()
    assert_close(state, model.state_dict(), kind)
    assert_close(theirs, model.state_dict(), kind)
    no_biases = {key for key in state if not key.endswith(".bias")}  # which transformers' reader leaves out
    assert no_biases <= set(theirs) and all(torch.equal(state[key], theirs[key]) for key in no_biases)
    assert ("lm_head.weight" in state) == (not model.config.tie_word_embeddings)
    ours, was = back.config.to_dict(), model.config.to_dict()
    for key in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        ours.pop(key, None), was.pop(key, None)
    assert ours == was
    assert list(tmp_path.glob("*.writing")) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_that_is_read_computes_the_same(tmp_path, shape):
    """Late positions too: a wrong rotation or a lost scaling of positions shows there first."""
    model = tiny_model(tmp_path / "hf", **SHAPES[shape])
    write_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f16")
    (tmp_path / "back").mkdir()
    read_gguf(tmp_path / "m.gguf").save(tmp_path / "back", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 250), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = model(ids).logits, back(ids).logits
    assert (got - wanted).abs().max() / wanted.std() < 1e-2
    assert torch.equal(model.generate(ids[:, :200], do_sample=False, max_new_tokens=20),
                       back.generate(ids[:, :200], do_sample=False, max_new_tokens=20))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpt2_comes_back_as_it_was(tmp_path, kind):
    model = tiny_model(tmp_path / "hf", "gpt2", tiny_tokenizer("gpt-2"))
    write_gguf(tmp_path / "hf", tmp_path / "m.gguf", kind)
    assert_close(by_transformers(tmp_path / "m.gguf").state_dict(), model.state_dict(), kind)


def test_eight_bits_keep_the_perplexity(tmp_path):
    model, tokenizer = tiny_model(tmp_path / "hf"), tiny_tokenizer()
    write_gguf(tmp_path / "hf", tmp_path / "m.gguf", "q8_0")
    back, ids = by_transformers(tmp_path / "m.gguf"), torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        wanted, got = (m(ids, labels=ids).loss.exp().item() for m in (model, back))
    assert got == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe"])
def test_the_tokenizer_comes_back_to_the_letter(tmp_path, split):
    tokenizer = tiny_tokenizer(split)
    tiny_model(tmp_path, tokenizer=tokenizer)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    back = read_gguf(tmp_path / "m.gguf").tokenizer()
    assert json.loads(back.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
    assert back.special_tokens_map == tokenizer.special_tokens_map
    assert back.chat_template == tokenizer.chat_template and back.model_max_length == 256


def test_rows_behind_the_vocabulary_are_no_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer) + 6)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    back = read_gguf(tmp_path / "m.gguf")
    assert len(back.tokenizer()) == len(tokenizer) and back.config.vocab_size == len(tokenizer) + 6


def test_every_id_that_ends_a_turn_is_kept(tmp_path):
    tiny_model(tmp_path, eos_token_id=[0, 2, 1])
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    assert read_gguf(tmp_path / "m.gguf").config.eos_token_id == [2, 0, 1]


def bad(folder, what):
    """A folder that cannot be written as a GGUF file, and what is told of it."""
    sizes, tokenizer = {}, tiny_tokenizer()
    if what == "rope":
        scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
        sizes["rope_parameters"] = scaling
    if what == "activation":
        sizes["hidden_act"] = "gelu"
    if what == "too many eos":
        sizes["eos_token_id"] = [0, 1, 2, 3]
    model = tiny_model(folder, tokenizer=tokenizer, **sizes)
    description = json.loads((folder / "tokenizer.json").read_text())
    if what == "split":
        description["pre_tokenizer"] = {"type": "Whitespace"}
    if what == "prefix":
        description["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    if what == "normalizer":
        description["normalizer"] = {"type": "NFC"}
    if what == "ignore_merges":
        description["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(description))
    if what == "overflow":
        with torch.no_grad():
            model.model.embed_tokens.weight[5, 5] = 1e5
        model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if what == "family":
        config["model_type"] = "mistral"
    if what == "head":
        config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    if what == "no weights":
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("rope", "scales positions by the method yarn"),
        ("activation", "has the activation gelu"),
        ("too many eos", "has 4 ids of EOS"),
        ("split", "cuts text by Whitespace"),
        ("prefix", "cuts text by ByteLevel"),
        ("normalizer", "without a normalizer"),
        ("ignore_merges", '"ignore_merges": True, unlike smollm'),
        ("overflow", "model.embed_tokens.weight holds numbers beyond fp16"),
        ("family", "holds a mistral model"),
        ("head", "holds a LlamaForSequenceClassification"),
        ("no weights", "cannot be read"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(tmp_path, what, told):
    bad(tmp_path, what)
    file = tmp_path / "m.gguf"
    file.write_text("what stood here before")
    with pytest.raises(UserError, match=told) as error:
        write_gguf(tmp_path, file, "f16")
    assert str(error.value).startswith(str(tmp_path))
    assert file.read_text() == "what stood here before" and list(tmp_path.glob("*.writing")) == []
