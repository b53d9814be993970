"""What people give as a model: each kind of folder and file is loaded, or told in one line with its remedy."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from config.user_error import UserError
from models.gpt import GPT
from models.weights.huggingface import describe_pretrained
from models.weights.pretrained import our_checkpoint
from utils.tokenizer import get_tokenizer

pytestmark = pytest.mark.slow

SIZES = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=60, bos_token_id=59, eos_token_id=59)
OTHER = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 548105171\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "model"
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(folder)
    return folder


def config(**changes):
    """config.json with changes."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, data: str | bytes, instead: bool = False):
    """A file more; or one in place of the weights."""

    def change(folder: Path) -> None:
        if instead:
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def other(model):
    """The folder of another model."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        model.save_pretrained(folder)

    return change


def parts(missing: bool):
    def change(folder: Path) -> None:
        model = GPT2LMHeadModel.from_pretrained(folder)
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size="10KB")
        if missing:
            next(folder.glob("model-00002-*")).unlink()

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def halves(folder: Path) -> None:
    state = {key: value.half() for key, value in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def link_to_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")


def moved_in(place: str):
    """The model lies below the folder that is given."""

    def change(folder: Path) -> None:
        shutil.move(folder, folder.with_name("moved"))
        (folder / place).parent.mkdir(parents=True)
        shutil.move(folder.with_name("moved"), folder / place)

    return change


def only(*names: str):
    """Files of a folder without config.json; no name: an empty folder."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"GGUF" + bytes(100))

    return change


def runs(folder: Path) -> None:
    shutil.rmtree(folder)
    for name in ("sft_a_20260101000000", "rm_a_20260101000000"):
        (folder / name).mkdir(parents=True)
        (folder / name / "hyperparams.json").write_text("{}")


# What is given -> how it is made of a plain folder, and what is told: "" is loaded without a word, "note: ..." with.
KINDS = {
    "a plain folder": (lambda folder: None, ""),
    "weights in parts": (parts(missing=False), ""),
    "a pickled file": (pickled, ""),
    "half precision": (halves, ""),
    "a classifier": (
        other(GPT2ForSequenceClassification(GPT2Config(**SIZES, pad_token_id=0))),
        "note: .* is a GPT2ForSequenceClassification: its head is left out, and its trunk was trained for that head",
    ),
    "one part missing": (parts(missing=True), r"model-00002-of-\d+.safetensors is missing \(\d of \d parts are there"),
    "a damaged list of parts": (
        write("model.safetensors.index.json", "[]", instead=True), "index.json is damaged; copy it again",
    ),
    "one part alone": (
        write("model-00001-of-00002.safetensors", "x", instead=True),
        "model-00001-of-00002.safetensors is one of several parts, and their index .* is missing; copy it too",
    ),
    "what is left of pickled weights": (write("pytorch_model.bin", LFS), ""),
    "what is left of a list of parts": (write("pytorch_model.bin.index.json", '{"weight_map": {"a": "b.bin"}}'), ""),
    "weights of another name": (write("foo.safetensors", "x", instead=True), "foo.safetensors is .* not read; copy"),
    "a link to weights that are gone": (link_to_nothing, "model.safetensors is a link to nothing, .*; copy the file"),
    "a llama": (other(LlamaForCausalLM(LlamaConfig(**OTHER))), "holds a LLaMA; a GPT-2 is needed"),
    "a bert": (other(BertModel(BertConfig(**OTHER))), "holds a bert model; a GPT-2 or a LLaMA is needed"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors or .*; copy the weights too"),
    "a broken download": (
        lambda folder: (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete"),
        "model.safetensors.incomplete is a download that was broken off; start it again",
    ),
    "weights for TensorFlow": (write("tf_model.h5", "x", instead=True), "tf_model.h5 is weights for TensorFlow"),
    "weights for Flax": (write("flax_model.msgpack", "x", instead=True), "flax_model.msgpack is weights for Flax"),
    "a GGUF file beside config.json": (write("a.gguf", "GGUF", instead=True), "a.gguf is a GGUF file .*give that file"),
    "a pointer for the weights": (write(WEIGHTS, LFS), "model.safetensors is a pointer of Git LFS.*git lfs pull"),
    "a pointer for pickled weights": (
        write("pytorch_model.bin", LFS, instead=True), "pytorch_model.bin is a pointer of Git LFS",
    ),
    "a pointer for config.json": (write("config.json", LFS), "config.json is a pointer of Git LFS"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"weights are quantised \(bitsandbytes\); give the model that it was made from",
    ),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"weights are quantised \(gptq\)"),
    "quantised somehow": (config(quantization_config={"bits": 4}), r"weights are quantised \(by some method\)"),
    "untied by config.json alone": (
        config(tie_word_embeddings=False),
        '"tie_word_embeddings": false, but its weights have no lm_head.weight; where .* that should be true',
    ),
    "an output projection of its own": (
        other(GPT2LMHeadModel(GPT2Config(**SIZES, tie_word_embeddings=False))), "has an output projection of its own",
    ),
    "no heads": (config(n_head=0), "its config.json has 0 as n_head; copy it again"),
    "a size as a text": (config(n_layer="2"), "cannot be read .*expected int, got str.*; give a whole config.json"),
    "a type that torch does not have": (config(dtype="floaty"), "cannot be read .*floaty.*; give a whole config.json"),
    "an architecture that is a number": (config(architectures=[3]), "note: is a 3: its head is left out"),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(), "has weights but no config.json, which says their sizes",
    ),
    "a folder with a GGUF file": (only("a.Q4_K_M.gguf"), "is damaged"),
    "a folder with a file of torch": (only("model.pt"), "model.pt is a file of torch; .*`save_pretrained`"),
    "an empty folder": (only(), "no checkpoint in"),
    "the folder around it": (moved_in("gpt2"), r"holds no model itself; give \S+/model/gpt2$"),
    "a folder of the hub's cache": (moved_in("snapshots/abc"), r"holds no model itself; give \S+/snapshots/abc$"),
    "the folder of runs": (runs, "is a folder of runs; give one of them: rm_a_20260101000000, sft_a_20260101000000"),
}  # fmt: skip


def load(argument: str, runs_dir: Path) -> tuple[GPT, str]:
    """As -p does it: the model and what is told."""
    assert our_checkpoint(argument, str(runs_dir), "-p") is None
    return GPT.from_pretrained(argument), describe_pretrained(argument).note


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder(kind, plain, tmp_path):
    change, told = KINDS[kind]
    folder = shutil.copytree(plain, tmp_path / "model")
    change(folder)
    if told and not told.startswith("note: "):
        with pytest.raises(UserError, match=told) as error:
            load(str(folder), tmp_path / "runs")
        assert str(error.value).startswith(f"-p {folder}: ") and "\n" not in str(error.value)
        return
    model, note = load(str(folder), tmp_path / "runs")
    assert bool(note) == bool(told) and re.search(told.removeprefix("note: "), note)
    if not told:
        expected = GPT.from_pretrained(plain).transformer.wpe.weight
        torch.testing.assert_close(model.transformer.wpe.weight, expected, atol=1e-3, rtol=1e-2)


def test_a_good_folder_is_loaded_without_a_word(plain, capfd):
    """transformers has bars, and warnings on ids beyond the table, which come from its defaults and not the folder."""
    logging.set_verbosity_warning()
    GPT.from_pretrained(plain)
    assert "".join(capfd.readouterr()) == ""


FILES = {
    "model.safetensors": "is a file; give its folder, ",
    "config.json": "is a file; give its folder, ",
    "pytorch_model.bin": "is a file; give its folder, ",
    "a.Q4_0.gguf": "is no GGUF file|is damaged",
    "alone/model.safetensors": "is a file; give a folder with config.json and model.safetensors",
    "alone/model.pt": "is a file of torch; save the model in Hugging Face's form",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name, plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "alone").mkdir()
    (folder / name).touch()
    with pytest.raises(UserError, match=f"^-p {folder / name}: {FILES[name]}"):
        load(str(folder / name), tmp_path / "runs")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

PLACES = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}


def adapter(base: str | Path, folder: Path, prefix: str = "transformer.", **settings) -> dict[str, torch.Tensor]:
    """A LoRA adapter as PEFT saves it, of rank 3 on all projections of the second block; returns its factors."""
    torch.manual_seed(1)
    factors = {}
    for place, (inside, out) in PLACES.items():
        factors[f"base_model.model.{prefix}h.1.{place}.lora_A.weight"] = torch.randn(3, inside)
        factors[f"base_model.model.{prefix}h.1.{place}.lora_B.weight"] = torch.randn(out, 3)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    description = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 12, "fan_in_fan_out": True,
        "target_modules": ["c_attn"], "bias": "none", "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(description | settings))
    return factors


@pytest.mark.parametrize(
    "settings,scale,prefix",
    [
        ({}, 4.0, "transformer."),
        ({"use_rslora": True}, 12 / 3**0.5, "transformer."),
        ({"fan_in_fan_out": False}, 4.0, ""),
    ],
)
@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(plain, tmp_path, settings, scale, prefix):
    """The logits are those of transformers' model with the products added where its projections run."""
    factors = adapter(plain, tmp_path / "adapter", prefix, **settings)
    theirs = GPT2LMHeadModel.from_pretrained(plain).eval()
    for place in PLACES:
        a, b = (factors[f"base_model.model.{prefix}h.1.{place}.lora_{x}.weight"] for x in "AB")
        module = theirs.transformer.h[1].get_submodule(place)
        module.register_forward_hook(lambda _, x, y, a=a, b=b: y + scale * (x[0] @ a.T @ b.T))
    ids = torch.randint(0, 60, (1, 20))
    model, note = load(str(tmp_path / "adapter"), tmp_path / "runs")
    assert note == f"{tmp_path / 'adapter'} is a LoRA adapter: merged into {plain}"
    torch.testing.assert_close(model.eval()(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids), GPT.from_pretrained(plain).eval()(ids), atol=0.1)


MERGE = r"; merge it with PEFT, merge_and_unload\(\).save_pretrained\(FOLDER\), and give that folder"


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"peft_type": "IA3"}, "is an adapter with peft_type 'IA3'"),
        ({"use_dora": True}, "is an adapter with use_dora True"),
        ({"bias": "all"}, "is an adapter with bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"is an adapter with modules_to_save \['lm_head'\]"),
        ({"rank_pattern": {"c_fc": 8}}, "is an adapter with rank_pattern"),
        ({"alpha_pattern": {"c_fc": 8}}, "is an adapter with alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "is an adapter with init_lora_weights 'pissa'"),
        ({"r": 0}, "adapter_config.json is not that of a LoRA adapter"),
        ({"lora_alpha": None}, "adapter_config.json is not that of a LoRA adapter"),
        ({"r": 4}, r"its factors of transformer.h.1.attn.c_attn.weight do not fit its base model"),
    ],
)
def test_adapters_that_cannot_be_merged(plain, tmp_path, settings, told):
    adapter(plain, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=f"^-p {tmp_path / 'adapter'}: .*{told}.*{MERGE}$"):
        load(str(tmp_path / "adapter"), tmp_path / "runs")


def test_an_adapter_whose_weights_are_others(plain, tmp_path):
    factors = adapter(plain, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    for change, told in (
        (
            {"base_model.model.transformer.wte.lora_embedding_A": torch.zeros(3, 60)},
            "lora_embedding_A, which is no",
        ),
        ({"base_model.model.transformer.h.7.mlp.c_fc.lora_A.weight": torch.zeros(3, 16)}, "do not fit its base"),
    ):
        save_file(factors | change, file)
        with pytest.raises(UserError, match=told + ".*" + MERGE):
            load(str(tmp_path / "adapter"), tmp_path / "runs")
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="adapter_model.safetensors is missing or damaged" + MERGE):
        load(str(tmp_path / "adapter"), tmp_path / "runs")


@pytest.mark.parametrize("base", ["/nowhere/gpt2", "", "nobody/gpt2"])
def test_an_adapter_whose_base_is_not_there(tmp_path, base):
    adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter, and its base model cannot be read: ") as error:
        load(str(tmp_path / "adapter"), tmp_path / "runs")
    assert str(error.value).startswith(f"-p {tmp_path / 'adapter'}: ") and "\n" not in str(error.value)


def test_the_tokenizer_of_an_adapter_is_its_own_or_that_of_its_base(tmp_path):
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(**SIZES | {"vocab_size": 1024})).save_pretrained(base)
    adapter(base, tmp_path / "adapter")
    found = describe_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        UserError, match="^-p it: .*base has no tokenizer for it, and its token table of 1024 rows is not"
    ):
        found.tokenizer("-p it")
    for place in (base, tmp_path / "adapter"):
        get_tokenizer("demo").export_huggingface(place)
        tokenizer, note = found.tokenizer("-p it")
        assert (tokenizer.name, tokenizer.vocab_size, note) == (place.name, 1024, "")
