"""`-t export` of both families: what it writes is the model, for transformers' own classes and pipelines; what is not
the model is not left."""

import errno
import json
import logging
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import jinja2
import pytest
import torch
from chat_tokenizers import chat_folder
from conftest import randomise
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import logging as their_logging

from config.configs import SFTConfig
from config.model_configs import LlamaConfig
from config.user_error import RunStopped, UserError
from experiments.export import contents, run
from experiments.export import gguf as gguf_file
from experiments.main import Parser
from experiments.quick_looks import look_at_gpt
from models.families import FAMILIES, load_checkpoint
from models.gpt import GPT, GPTCritic, GPTRewardModel
from models.lora import freeze_weights, round_frozen
from models.weights.checkpoint import save_model
from models.weights.huggingface import save_pretrained
from training.start import describe_model, sft_start
from utils.chat_templates import choose_template
from utils.runs.durable import Disk
from utils.template import PromptTemplate
from utils.tokenizer import HuggingFaceTokenizer, get_tokenizer, load_tokenizer

CONTEXT = 96
ROOM = 48  # half of it, as 64 would be more
OTHER = PromptTemplate("\n<|user|> it's \"", "\n{{bot}}\\%}", "\t")
DIALOGUES = {
    "one turn": ("Hi!",),
    "three turns": ("Hi!", " Hello.\n", "  What is 2 + 2?"),
    "five turns": ("a", "b", "c", "d", "e"),
    "an empty turn": ("", "\n", "x"),
    "marks in the text": ("{{ 7 * 7 }} {% x %}", "\n\nHuman: <|endoftext|>", "'\"\\n"),
    "characters": ("Zo\u00eb \u4e2d\u6587 \U0001f600", "\u00a0\u2003 ok \u3000", "\x1f?"),
}


def bos_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """A folder that puts BOS before every text and pads with a token of its own on the right."""
    get_tokenizer("demo").export_huggingface(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<own-pad>", "bos_token": "<s>"})
    around = dict(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**around)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == tokenizer.bos_token_id
    return HuggingFaceTokenizer(folder)


@torch.no_grad()
def lively(model):
    """A random model whose answers differ from prompt to prompt, and from place to place."""
    if model.family == "llama":
        return model
    for table in (model.transformer.wte.weight, model.transformer.wpe.weight):
        table *= 3
    model.transformer.ln_f.bias *= 0.2
    return model


def llama(role, **options):
    """A tiny LLaMA with random numbers everywhere."""
    sizes = dict(name="llama-nano", n_layer=2, n_head=4, n_embd=32, n_inner=64, init_std=0.3)
    return lively(randomise(FAMILIES["llama"][role](LlamaConfig(**sizes | options)), seed=1, std=0.2).eval())


def pieces_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """SentencePiece's BPE, as TinyLlama has it: a space before every text, and bytes for what it does not know."""
    special, space = ["<unk>", "<s>", "</s>"], "\u2581"
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), space])}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzAHIW?.")}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return HuggingFaceTokenizer(folder)


LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, rope_factor=8.0, rope_original_context=32)
# LLaMAs of all shapes: stem -> (options, tokenizer).
LLAMAS = {
    "sft_llama": (dict(n_kv_head=2), "demo"),
    "sft_llama_untied": (dict(n_kv_head=1, head_dim=12, tied=False, **LLAMA3), "demo"),
    "sft_llama_lora": (dict(n_kv_head=2, tied=False, lora_rank=4), "demo"),
    "sft_llama_wide": (dict(n_kv_head=4, tied=False, rope_type="linear", rope_factor=3.0, extra_rows=24), "demo"),
    "sft_llama_own": (dict(n_kv_head=2, head_dim=16, attention_bias=True, mlp_bias=True), "own"),
    "sft_llama_bf16": (dict(n_kv_head=2, lora_rank=4), "demo"),  # its base was frozen in half precision
    "ppo_llama_lora": (dict(n_kv_head=2, lora_rank=4), "demo"),
    "sft_llama_pieces": (dict(n_kv_head=2), "pieces"),
    "rm_llama_pieces": (dict(n_kv_head=4), "pieces"),
    "rm_llama": (dict(n_kv_head=2), "demo"),
    "rm_llama_lora": (dict(n_kv_head=1, tied=False, lora_rank=4, **LLAMA3), "demo"),
    "rm_llama_own": (dict(n_kv_head=2, head_dim=12, extra_rows=3), "own"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_model):
    """Runs of random tiny models: of every role, with adapters, another tokenizer, another template."""
    root, demo = tmp_path_factory.mktemp("runs"), get_tokenizer("demo")
    own = bos_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    kinds = {
        "sft_plain": (GPT, demo, {}),
        "sft_lora": (GPT, demo, {"lora_rank": 4}),
        "sft_wide": (GPT, demo, {"embedding_rows": demo.vocab_size + 24}),
        "sft_own": (GPT, own, {}),
        "sft_other": (GPT, demo, {"template": OTHER}),
        "rm_plain": (GPTRewardModel, demo, {}),
        "rm_lora": (GPTRewardModel, demo, {"lora_rank": 4}),
        "rm_own": (GPTRewardModel, own, {}),
        "ppo_critic": (GPTCritic, demo, {}),
    }
    for name, (cls, tokenizer, options) in kinds.items():
        template = options.pop("template", PromptTemplate())
        sizes = dict(block_size=CONTEXT, vocab_size=tokenizer.vocab_size) | options
        model = lively(make_model(cls, seed=1, **{"embedding_rows": tokenizer.vocab_size, **sizes}))
        if cls is not GPT:
            model.set_normalisation(0.7, -1.9)
        folder = root / f"{name}_20260101000000" / "final"
        stage = name.split("_")[0]
        described = describe_model(stage, tokenizer, template, "/somewhere/sft_x_20250101000000")
        save_model(model, folder, described | {"step": 3})
        tokenizer.save(folder)
    pieces = pieces_tokenizer(tmp_path_factory.mktemp("pieces"))
    for name, (options, tokenizer) in LLAMAS.items():
        tokenizer = {"demo": demo, "own": own, "pieces": pieces}[tokenizer]
        role = "reward" if name.startswith("rm") else "lm"
        options = dict(options)
        rows = tokenizer.vocab_size + options.pop("extra_rows", 0)
        model = llama(role, block_size=CONTEXT, vocab_size=tokenizer.vocab_size, embedding_rows=rows, **options)
        if role == "reward":
            model.set_normalisation(0.7, -1.9)
        if name.endswith("bf16"):
            freeze_weights(model, "lora")
            round_frozen(model, torch.bfloat16)
        folder = root / f"{name}_20260101000000" / "final"
        save_model(model, folder, describe_model(name.split("_")[0], tokenizer, PromptTemplate(), "scratch"))
        tokenizer.save(folder)
    run = root / "sft_plain_20260101000000"
    config = {"dataset": "/a/b/rows|.jsonl", "seed": 5, "config": "gpt2-nano"}
    (run / "hyperparams.json").write_text(json.dumps({"stage": "sft", "config": config, "commit": "abc"}))
    lines = [{"step": step, "eval/loss": loss, "train/loss": 9.0} for step, loss in ((2, 2.5), (3, 1.25), (4, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def make(runs, stem, to, *words):
    """Run the task in this process."""
    return run.run(Parser(prog="export"), ["-m", stem, "--to", str(to), "--runs-dir", str(runs), *map(str, words)])


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """`exports(stem)`: its export, made once."""
    made = {}

    def get(stem):
        if stem not in made:
            made[stem] = tmp_path_factory.mktemp("exports") / "deep" / stem
            assert make(runs, stem, made[stem]) == 0
        return made[stem]

    return get


def source(runs, stem):
    """(our model, our tokenizer)."""
    folder = runs / f"{stem}_20260101000000" / "final"
    return load_checkpoint(folder, "reward" if stem.startswith("rm") else "lm").eval(), load_tokenizer(folder)


def messages(turns, system=None):
    """Chat messages of user, assistant, user, ..."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


LANGUAGE_MODELS = ["sft_plain", "sft_lora", "sft_wide", "sft_own", "sft_other"]
LANGUAGE_MODELS += [name for name in LLAMAS if not name.startswith("rm")]
REWARD_MODELS = ["rm_plain", "rm_lora", "rm_own", *(name for name in LLAMAS if name.startswith("rm"))]


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", LANGUAGE_MODELS)
@torch.no_grad()
def test_the_folder_is_the_model(runs, exports, stem, caplog, capfd):
    """Sizes, ids and limits are right, logits and greedy tokens ours, and nothing is told on loading."""
    folder = exports(stem)
    ours, own = source(runs, stem)
    their_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        their_logging.disable_propagation()
    assert caplog.text == "" and "nitialized" not in capfd.readouterr().err
    config, generation = theirs.config, theirs.generation_config
    assert (config.max_position_embeddings, config.vocab_size, config.dtype) == (CONTEXT, own.vocab_size, torch.float32)
    assert tokenizer.model_max_length == CONTEXT - ROOM and tokenizer.padding_side == "left"
    assert config.eos_token_id == generation.eos_token_id == tokenizer.eos_token_id == own.eos_id
    assert config.pad_token_id == generation.pad_token_id == tokenizer.pad_token_id < own.vocab_size
    texts = ["a", "Hello there, how are you?", "\n\nHuman: 2 + 2?\n\nAssistant:"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    prompts = own.encode_batch(texts)
    assert [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])] == prompts
    rows = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = ours.batch_generate(prompts, 20, own.eos_id, temperature=0)
    for b, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
        mine = answers.row(b).tolist()
        assert rows[b, : len(mine)].tolist() == mine
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o644] * len(list(folder.iterdir()))
    assert [path.name for path in folder.parent.iterdir()] == [stem]


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_may_be_read_as_the_umask_says(runs, tmp_path, mask):
    before = os.umask(mask)
    try:
        make(runs, "sft_plain", tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755 & ~mask


@torch.no_grad()
def test_an_answer_stops_at_the_eos(runs, tmp_path):
    """A model that says EOS after three tokens stops there in transformers, too."""
    ours, own = source(runs, "sft_plain")
    prompt = own.encode("\n\nHuman: Hi\n\nAssistant:")
    third = int(ours.generate(torch.tensor(prompt), 3, own.eos_id, temperature=0)[2])
    both = torch.tensor([own.eos_id, third])
    table = ours.transformer.wte.weight
    table[both] = table[both.flip(0)]
    run = tmp_path / "sft_stops_20260101000000/final"
    save_model(ours, run, describe_model("sft", own, PromptTemplate(), "scratch"))
    own.save(run)
    make(tmp_path, "sft_stops", tmp_path / "out")
    say = pipeline("text-generation", str(tmp_path / "out"))
    ids = say("\n\nHuman: Hi\n\nAssistant:", do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert ids[len(prompt) :] == ours.generate(torch.tensor(prompt), 50, own.eos_id, temperature=0).tolist()
    assert len(ids) == len(prompt) + 3 and ids[-1] == own.eos_id


def test_an_answer_stops_at_any_of_several_ids(runs, tmp_path, monkeypatch):
    """As a chat model has them: the EOS first."""
    ours, own = source(runs, "sft_llama")
    prompt = own.encode("\n\nHuman: Hi\n\nAssistant:")
    said = ours.generate(torch.tensor(prompt), 20, own.eos_id, temperature=0).tolist()
    other = said[4]
    monkeypatch.setattr(contents.Export, "stop_ids", [own.eos_id, other])
    make(runs, "sft_llama", tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [own.eos_id, other]
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == own.eos_id
    assert f"| ids of EOS | {own.eos_id}, {other} |" in (tmp_path / "out/README.md").read_text()
    say = pipeline("text-generation", str(tmp_path / "out"))
    ids = say("\n\nHuman: Hi\n\nAssistant:", do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert ids[len(prompt) :] == said[: said.index(other) + 1]


@pytest.mark.parametrize(
    ("stem", "record", "temperature"),
    [
        ("ppo_t", {"config": {"temperature": 0.7}}, 0.7),
        ("sft_t", {"config": {"temperature": 0.7}}, 1.0),
        ("ppo_t", {"config": {"temperature": "hot"}}, 1.0),
        ("ppo_t", {"config": 3, "rm": [], "commit": {}}, 1.0),
        ("ppo_t", [], 1.0),
    ],
)
def test_a_policy_is_sampled_as_it_was_trained(runs, tmp_path, stem, record, temperature):
    """And a record that holds anything else is no trouble."""
    run = tmp_path / f"{stem}_20260101000000"
    ours, own = source(runs, "sft_plain")
    save_model(ours, run / "final", describe_model(stem[:3], own, PromptTemplate(), "scratch"))
    own.save(run / "final")
    (run / "hyperparams.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("[]\n")
    make(tmp_path, stem, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["do_sample"], generation["temperature"]) == (True, temperature)


@pytest.mark.parametrize("stem", ["sft_plain", "sft_llama"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_half_precision(runs, tmp_path, stem, dtype, capsys):
    make(runs, stem, tmp_path / "out", "--dtype", dtype)
    shown = capsys.readouterr().out
    assert f"parameters in {dtype}" in shown and "logits within" in shown
    wanted = contents.DTYPES[dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {wanted}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted


def test_the_card_says_what_the_records_say(exports):
    card = (exports("sft_plain") / "README.md").read_text()
    for row in (
        "| run | sft_plain_20260101000000/final |", "| stage | supervised fine-tuning (SFT) |", "| steps | 3 |",
        "| family | GPT-2 (GPT2LMHeadModel) |", "| trained from | sft_x_20250101000000 |", "| weights | fp32 |",
        "| prompt template | human-assistant |",
        "| id of EOS | 1023 |", "| data set | rows\\|.jsonl |", "| seed | 5 |", "| commit | abc |",
        "| eval/loss | 3 | 1.25 |",
    ):  # fmt: skip
        assert row in card
    assert "train/loss" not in card and "0.5 |" not in card and "/somewhere" not in card and "/a/b" not in card
    assert "adapters" not in card
    bare = (exports("sft_lora") / "README.md").read_text()
    assert "data set" not in bare and "figure" not in bare and "None" not in bare.partition("## Use")[0]
    assert "| adapters | LoRA of rank 4, merged into the weights |" in bare
    llama = (exports("rm_llama_lora") / "README.md").read_text()
    assert "| family | LLaMA (LlamaForSequenceClassification) |" in llama and "| adapters | LoRA of rank 4," in llama


@pytest.mark.parametrize(
    ("first", "told"),
    [("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("scratch", "scratch"),
     ("/models/my-llama", "my-llama"), ("/old/sft_gone_20250101000000/final", ""), ("", "")],
)  # fmt: skip
def test_the_card_names_the_base_model_behind_all_runs(runs, tmp_path, first, told):
    """By the runs that are beside it now, wherever they were then."""
    names = {"sft": "sft_a_20260101000001", "ppo": "ppo_a_20260101000002"}
    for (stage, name), origin in zip(names.items(), (first, f"/old/runs/{names['sft']}/final")):
        shutil.copytree(runs / "sft_llama_20260101000000/final", tmp_path / name / "final")
        path = tmp_path / name / "final/model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": stage, "trained_from": origin}))
    make(tmp_path, "ppo_a", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| trained from | {names['sft']}/final |" in card
    assert (f"| base model | {told} |" in card) if told else ("base model" not in card)


def test_a_card_of_runs_that_were_trained_from_each_other(runs, tmp_path):
    """Nobody can make such runs, but anybody can write so; it ends."""
    shutil.copytree(runs / "sft_llama_20260101000000/final", tmp_path / "sft_a_20260101000001/final")
    path = tmp_path / "sft_a_20260101000001/final/model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_from": str(path.parent)}))
    make(tmp_path, "sft_a", tmp_path / "out")
    assert "base model" not in (tmp_path / "out/README.md").read_text()


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sft_plain", "sft_own", "sft_llama", "sft_llama_own"])
def speaker(request, runs, exports):
    """(transformers' pipeline, `greedy(prompt text, tokens)` by ours)."""
    ours, own = source(runs, request.param)

    def greedy(text, tokens=200):
        ids = torch.tensor(own.encode(text))
        new = ours.generate(ids, min(tokens, CONTEXT - len(ids)), own.eos_id, temperature=0)
        return own.decode(new)

    return pipeline("text-generation", str(exports(request.param))), greedy


def test_pipeline_on_prompts_messages_and_batches(speaker):
    say, greedy = speaker
    options = dict(do_sample=False, max_new_tokens=8)
    prompt = "\n\nHuman: Hello.\n\nAssistant:"
    assert say(prompt, return_full_text=False, **options)[0]["generated_text"] == greedy(prompt, 8)
    assert say(messages(["Hello."]), **options)[0]["generated_text"][-1]["content"] == greedy(prompt, 8)
    chats = [messages(turns) for turns in (DIALOGUES["one turn"], DIALOGUES["three turns"], DIALOGUES["five turns"])]
    said = say(chats, batch_size=3, **options)
    assert [row[0]["generated_text"][-1]["content"] for row in said] == [
        greedy(PromptTemplate().format([m["content"] for m in chat]), 8) for chat in chats
    ]
    begun = say(messages(["Hi!", "Well, "]), **options)[0]["generated_text"][-1]["content"]
    assert begun == "Well, " + greedy("\n\nHuman: Hi!\n\nAssistant: Well,", 8)


def test_pipeline_ends_at_the_context(speaker):
    """After as many tokens as its record says, and with a prompt that is cut."""
    say, greedy = speaker
    prompt = "\n\nHuman: Hello.\n\nAssistant:"
    said = say(prompt, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said == greedy(prompt, ROOM).replace("<own-pad>", "")  # which a random model says, and theirs leaves out
    long = "\n\nHuman: " + "word " * 300 + prompt
    for options in (dict(truncation=True), dict(truncation=True, max_new_tokens=ROOM)):
        ids = say(long, do_sample=False, return_tensors=True, **options)[0]["generated_token_ids"]
        assert CONTEXT - ROOM < len(ids) <= CONTEXT and prompt in say.tokenizer.decode(ids)


@pytest.mark.parametrize("stem", [name for name in LANGUAGE_MODELS if name != "sft_other"])
@pytest.mark.parametrize("variant", ["", "/lora"])
def test_training_goes_on_from_an_export(runs, exports, stem, variant):
    """-p FOLDER: what starts is the model that was exported, by its own tokenizer."""
    ours, own = source(runs, stem)
    preset = f"{'llama' if 'llama' in stem else 'gpt2'}-nano{variant}"
    started, tokenizer, template, _ = sft_start(SFTConfig(config=preset, pretrain=str(exports(stem))), None)
    assert bool(started.config.lora_rank) == bool(variant) and template == PromptTemplate()
    prompts = own.encode_batch([template.format([text]) for text in ("Hello.", "What is 2 + 2?", "Why?")])
    assert prompts == tokenizer.encode_batch([template.format([text]) for text in ("Hello.", "What is 2 + 2?", "Why?")])
    wanted, found = (model.eval().batch_generate(prompts, 20, own.eos_id, temperature=0) for model in (ours, started))
    assert tokenizer.eos_id == own.eos_id
    assert [found.row(b).tolist() for b in range(3)] == [wanted.row(b).tolist() for b in range(3)]


@pytest.mark.parametrize("stem", ["sft_lora", "sft_llama_untied", "ppo_llama_lora"])
def test_a_look_at_an_export_shows_what_a_look_at_the_run_shows(runs, exports, stem, capsys):
    shown = []
    for model in (stem, str(exports(stem))):
        capsys.readouterr()
        words = ["-m", model, "--runs-dir", str(runs), "--temperature", "0", "--prompt", "Hello.", "--prompt", "Why?"]
        look_at_gpt(Parser(prog="gpt"), words)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].count("-- sample 1") == 2


# The tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["sft_plain", "sft_other", "sft_own"])
@pytest.mark.parametrize("turns", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("system", [None, "", " Be brief.\n"])
def test_the_chat_template_is_ours(exports, stem, turns, system):
    template = OTHER if stem == "sft_other" else PromptTemplate()
    tokenizer = AutoTokenizer.from_pretrained(exports(stem))
    wanted = (system or "").strip() + template.format(turns)
    options = dict(tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages(turns, system), **options) == wanted
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages(turns, system)]
    assert tokenizer.apply_chat_template(parts, **options) == wanted
    # With a reply at the end, as a row of training.
    ended = tokenizer.apply_chat_template(messages([*turns, " Yes. "], system), tokenize=False)
    assert ended == wanted + template.response("Yes.") + tokenizer.eos_token


USER, REPLY, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        ([SYSTEM], "no turn of the user"),
        ([REPLY], "Turns are those of user, assistant"),
        ([USER, USER], "Turns are those of user, assistant"),
        ([SYSTEM, SYSTEM, USER], "Turns are those of user, assistant"),
        ([USER, REPLY, SYSTEM], "Turns are those of user, assistant"),
        ([USER, REPLY, REPLY], "Turns are those of user, assistant"),
        ([{"role": "tool", "content": "x"}], "Turns are those of user, assistant"),
        ([USER, REPLY], "the last turn is the assistant's"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "Only text can be read, not image"),
    ],
)  # fmt: skip
def test_messages_out_of_order_are_refused(exports, chat, told):
    tokenizer = AutoTokenizer.from_pretrained(exports("sft_plain"))
    with pytest.raises((jinja2.TemplateError, ValueError), match=told):
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


# Reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", REWARD_MODELS)
@torch.no_grad()
def test_scores_of_padded_rows_are_ours(runs, exports, stem):
    folder = exports(stem)
    ours, own = source(runs, stem)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_token_id != own.eos_id
    chats = [messages(turns) for turns in (("Hi!", "Hello."), ("a", "b", "c", "A long reply it is. " * 2), ("x", "y"))]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    wanted = []
    for chat in chats:
        *turns, reply = [m["content"] for m in chat]
        text = PromptTemplate().format(turns) + PromptTemplate().response(reply)
        ids = torch.tensor([[*own.encode(text), own.eos_id]])
        wanted.append(float(ours(ids, torch.ones_like(ids, dtype=torch.bool))))
    assert max(wanted) - min(wanted) > 0.1
    constant = getattr(theirs.config, "reward_constant", 0.0)  # an RMSNorm has no place for it
    assert (constant != 0) == (ours.family == "llama") == ("reward_constant" in (folder / "README.md").read_text())
    wanted = [score - constant for score in wanted]
    found = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert found == pytest.approx(wanted, abs=1e-4)
    score = pipeline("text-classification", str(folder))
    assert [row["score"] for row in score(texts, batch_size=3)] == pytest.approx(wanted, abs=1e-4)
    assert [path.name for path in folder.iterdir() if path.name == "generation_config.json"] == []


@pytest.mark.parametrize("stem", ["rm_plain", "rm_llama"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_reward_model_in_half_precision(runs, tmp_path, stem, dtype, capsys):
    make(runs, stem, tmp_path / "out", "--dtype", dtype)
    assert "the scores of 3 padded rows within" in capsys.readouterr().out


@pytest.mark.parametrize("stem", ["rm_plain", "rm_llama"])
@pytest.mark.parametrize(("noise", "told"), [(1e-5, "in the same order"), (2e-4, "the scores are off by")])
def test_scores_agree_to_a_ten_thousandth(runs, tmp_path, monkeypatch, stem, noise, told, capsys):
    """What is nearer than that is told with the order of the scores; what is not is no export."""
    read = contents.read_model

    def noisy(*words, **options):
        model = read(*words, **options)
        model.score.register_forward_hook(lambda module, given, scores: scores + noise)
        return model

    monkeypatch.setattr(contents, "read_model", noisy)
    ours, _ = source(runs, stem)
    ours.set_normalisation(0.01, 0.0)  # scores below 1, where the distance is not relative
    run_folder = tmp_path / f"{stem}_20260101000000"
    shutil.copytree(runs / run_folder.name, run_folder)
    description = json.loads((run_folder / "final/model.json").read_text())
    extra = {key: description[key] for key in ("stage", "tokenizer", "template")}
    save_model(ours, run_folder / "final", extra)
    if noise < 1e-4:
        make(tmp_path, stem, tmp_path / "out")
        assert told in capsys.readouterr().out
    else:
        with pytest.raises(RunStopped, match=told):
            make(tmp_path, stem, tmp_path / "out")


# What is not the model ------------------------------------------------------------------------------------------------


def spoil_json(name, **values):
    def spoil(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def spoil_tensor(name):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = state[name].flip(0)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def drop_tensor(name):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        del state[name]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"type":"ByteLevel"', '"type":"Nothing"').replace('"BPE"', '"WordPiece"'))


def another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


OFF = "the (logits|scores) are off by"
OF_GPT2 = {
    "another weight": (spoil_tensor("transformer.h.1.mlp.c_fc.weight"), OFF),
    "another table": (spoil_tensor("transformer.wte.weight"), OFF),
    "another activation": (spoil_json("config.json", activation_function="relu"), OFF),
    "a missing tensor": (drop_tensor("transformer.ln_f.weight"), "the weights have missing keys: .*ln_f.weight"),
}
OF_LLAMA = {
    "another weight": (spoil_tensor("model.layers.1.mlp.up_proj.weight"), OFF),
    "other heads": (spoil_tensor("model.layers.0.self_attn.k_proj.weight"), OFF),
    "another table": (spoil_tensor("model.embed_tokens.weight"), OFF),
    "another activation": (spoil_json("config.json", hidden_act="relu"), OFF),
    "other rotations": (spoil_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0}), OFF),
    "a missing tensor": (drop_tensor("model.norm.weight"), "the weights have missing keys: .*model.norm.weight"),
}
FAULTS = {
    "another context": (spoil_json("tokenizer_config.json", model_max_length=1024), "does not know the context"),
    "another padding": (spoil_json("config.json", pad_token_id=3), "config.json has another padding id"),
    "weights that are cut short": (cut_weights, "SafetensorError"),
    "a tokenizer that cannot be read": (another_tokenizer, ""),
    "another template": (another_template, "the chat template writes another prompt"),
}


@pytest.mark.parametrize(
    ("stem", "spoil", "told"),
    [(stem, *fault) for fault in (OF_GPT2 | FAULTS).values() for stem in ("sft_plain", "rm_plain")]
    + [(stem, *fault) for fault in OF_LLAMA.values() for stem in ("sft_llama", "rm_llama")]
    + [
        ("sft_llama_untied", spoil_tensor("lm_head.weight"), "the logits are off by"),
        ("rm_llama", spoil_json("config.json", reward_constant=0.0), "the scores are off by"),
        ("sft_plain", spoil_json("tokenizer_config.json", padding_side="right"), "does not pad on the left"),
        ("rm_plain", spoil_json("tokenizer_config.json", padding_side="left"), "does not pad on the right"),
        ("sft_plain", spoil_json("generation_config.json", eos_token_id=7), "generation ends at another id"),
        ("rm_plain", spoil_json("config.json", pad_token_id=1023), "config.json has another padding id"),
    ],
)
def test_a_folder_that_is_not_the_model_is_not_left(runs, tmp_path, monkeypatch, stem, spoil, told):
    write = contents.Export.write
    monkeypatch.setattr(contents.Export, "write", lambda self, folder: (write(self, folder), spoil(folder)))
    with pytest.raises(RunStopped, match=f"the export is not the model: .*{told}"):
        make(runs, stem, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Files for llama.cpp --------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf():
    """What the package reads a file as."""
    return pytest.importorskip("gguf").GGUFReader


@pytest.mark.parametrize("stem", ["sft_plain", "sft_llama", "sft_llama_untied", "sft_llama_wide", "sft_llama_own"])
@torch.no_grad()
def test_a_gguf_file_in_the_export_is_the_model(runs, tmp_path, gguf, stem, capsys):
    make(runs, stem, tmp_path / "out", "--gguf", "f16")
    folder, (shown, bars) = tmp_path / "out", capsys.readouterr()
    told = next(line for line in shown.splitlines() if line.startswith("out-f16.gguf: read back by transformers: "))
    assert "logits within" in told and f"\n- {told}\n" in (folder / "README.md").read_text() and bars == ""
    ours, own = source(runs, stem)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    fields = gguf(folder / "out-f16.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_id
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="out-f16.gguf", config=config).eval()
    batch = tokenizer(["a", "Hello there, how are you?"], padding=True, return_tensors="pt")
    rows = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    prompts = own.encode_batch(["a", "Hello there, how are you?"])
    answers = ours.batch_generate(prompts, 12, own.eos_id, temperature=0)
    for b in range(2):
        mine = answers.row(b).tolist()
        assert rows[b, : len(mine)].tolist() == mine


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_eight_bits_make_of_a_model_is_told(runs, tmp_path, gguf, dtype, capsys):
    make(runs, "sft_llama", tmp_path / "out", "--gguf", "q8_0", "--dtype", dtype)
    assert "out-q8_0.gguf: read back by transformers: " in capsys.readouterr().out
    kinds = {tensor.tensor_type.name for tensor in gguf(tmp_path / "out/out-q8_0.gguf").tensors}
    assert kinds == {"Q8_0", "F32"}


def other_heads(folder):
    spoil_tensor("model.layers.0.self_attn.k_proj.weight")(folder)


def other_rotations(folder):
    spoil_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0})(folder)


def other_letters(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_heads, "the logits are off by"),
        (other_rotations, "the logits are off by"),
        (other_letters, "'a' gets other ids from out-f16.gguf"),
        (another_template, "out-f16.gguf has another chat template"),
    ],
)
def test_a_gguf_file_that_is_not_the_model_is_not_left(runs, tmp_path, gguf, monkeypatch, spoil, told):
    write = gguf_file.write_gguf

    def of_another_model(folder, path, kind):
        other = shutil.copytree(folder, folder.with_name("other"))
        spoil(other)
        write(other, path, kind)
        shutil.rmtree(other)

    monkeypatch.setattr(gguf_file, "write_gguf", of_another_model)
    with pytest.raises(RunStopped, match=f"the export is not the model: {told}"):
        make(runs, "sft_llama", tmp_path / "out", "--gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["", "/lora"])
def test_a_chat_model_in_all_its_forms(tmp_path, gguf, variant):
    """Its turns stand between special tokens: in the folder, in the file for llama.cpp, and where training goes on."""
    tokenizer = HuggingFaceTokenizer(chat_folder(tmp_path / "tokenizer", "chatml"))
    template, tokenizer = choose_template("chatml", tokenizer)
    sizes = dict(n_kv_head=2, block_size=CONTEXT, vocab_size=tokenizer.vocab_size)
    ours = llama("lm", **sizes, lora_rank=4 if variant else 0)
    save_model(ours, tmp_path / "sft_c_20260101000000/final", describe_model("sft", tokenizer, template, "scratch"))
    tokenizer.save(tmp_path / "sft_c_20260101000000/final")
    make(tmp_path, "sft_c", tmp_path / "out", "--gguf", "f16")
    card = (tmp_path / "out/README.md").read_text()
    assert "| prompt template | chatml |" in card and f"| id of EOS | {tokenizer.eos_id} |" in card
    written = gguf(tmp_path / "out/out-f16.gguf").fields["tokenizer.chat_template"].contents()
    assert written == AutoTokenizer.from_pretrained(tmp_path / "out").chat_template and "<|im_start|>user" in written
    started, theirs, read, _ = sft_start(
        SFTConfig(config=f"llama-nano{variant}", pretrain=str(tmp_path / "out")), None
    )
    prompt = template.format(["Hello."])
    ids = template.encode_prompts(tokenizer, [prompt])
    assert read.encode_prompts(theirs, [prompt]) == ids and theirs.eos_id == tokenizer.eos_id
    wanted, found = (m.eval().batch_generate(ids, 12, tokenizer.eos_id, temperature=0) for m in (ours, started))
    assert found.row(0).tolist() == wanted.row(0).tolist()


def test_where_there_can_be_no_gguf_file(runs, tmp_path, gguf, monkeypatch):
    with pytest.raises(UserError, match="^--gguf f16: its tokenizer is BPE with byte fallback.*; leave it out"):
        make(runs, "sft_llama_pieces", tmp_path / "out", "--gguf", "f16")
    with pytest.raises(UserError, match="^-m rm_llama: holds a reward model, .*; leave --gguf out"):
        make(runs, "rm_llama", tmp_path / "out", "--gguf", "f16")
    def refuses(folder, path, kind):
        raise UserError(f"{folder}: its tokenizer is Unigram")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "write_gguf", refuses)
        with pytest.raises(UserError, match="^--gguf f16: its tokenizer is Unigram; leave it out"):
            make(runs, "sft_llama", tmp_path / "out", "--gguf", "f16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--gguf f16: GGUF files take the gguf package; pip install gguf"):
        make(runs, "sft_llama", tmp_path / "out", "--gguf", "f16")
    assert list(tmp_path.iterdir()) == []


# The place ------------------------------------------------------------------------------------------------------------


def test_an_export_is_replaced_whole_and_only_when_asked(runs, exports, tmp_path, monkeypatch):
    to = shutil.copytree(exports("sft_plain"), tmp_path / "out")
    (to / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--to .*: is not empty \(README.md, ...\); --overwrite replaces an export"):
        make(runs, "sft_lora", to)
    before = {path.name: path.read_bytes() for path in to.iterdir()}

    def broken(self, folder, *rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(contents.Export, "write", broken)
        with pytest.raises(UserError, match="cannot be written"):
            make(runs, "sft_lora", to, "--overwrite")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    make(runs, "sft_lora", to, "--overwrite")
    after = {path.name: path.read_bytes() for path in to.iterdir()}
    assert "note.txt" not in after and after["model.safetensors"] != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_export_comes_back_when_the_new_one_cannot_take_its_place(runs, exports, tmp_path, monkeypatch):
    to = shutil.copytree(exports("sft_plain"), tmp_path / "out")
    rename = Disk.rename

    def fails(self, old, new):
        if new == to and old.name.endswith(".writing"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(self, old, new)

    monkeypatch.setattr(Disk, "rename", fails)
    with pytest.raises(UserError, match="Input/output error"):
        make(runs, "sft_lora", to, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (to / "config.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), ValueError("x")])
@pytest.mark.parametrize("at", ["sync", "rename"])
def test_whatever_stops_it_leaves_no_half_export(runs, tmp_path, monkeypatch, error, at):
    def stop(*_):
        assert not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(Disk, at, stop)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        make(runs, "sft_plain", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(runs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr("experiments.export.contents.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"^--to .*: cannot be written \(it needs 17 MB, and 0 are free\)"):
        make(runs, "sft_plain", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_the_tokenizer(runs, tmp_path, monkeypatch):
    """Its library raises a plain Exception."""

    def full(self, *_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("utils.tokenizer.TiktokenTokenizer.export_huggingface", full)
    with pytest.raises(UserError, match=r"^--to .*: cannot be written \(No space left"):
        make(runs, "sft_plain", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_a_link_to_one_are_taken(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    make(runs, "sft_plain", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty/config.json").is_file()


@pytest.mark.parametrize(
    ("stem", "to", "told"),
    [
        ("sft_typo", "out", "-m sft_typo: no such run or folder; runs in .*: ppo_critic, .*rm_lora"),
        ("ppo_critic", "out", "-m ppo_critic: holds a critic"),
        ("hf", "out", "-m .*/sft_plain: is in Hugging Face's form already"),
        ("sft_plain", "", "--to: is empty"),
        ("sft_plain", "file", "--to .*file: is a file"),
        ("sft_plain", "file/out", "--to .*out: cannot be written \\(Not a directory\\)|File exists"),
        ("sft_plain", "loop", "--to loop: cannot be (used \\(Symlink loop|written)"),
        ("sft_plain", "~nobody-of-that-name/out", "--to .*: cannot be used \\(Could not determine home"),
        ("sft_plain", "n" * 300, "--to n*: cannot be used \\(File name too long\\)"),
        ("sft_plain", ".", "--to .*: is the working folder or around it"),
        ("sft_plain", "..", "--to .*: is the working folder or around it"),
        ("sft_plain", "photos", "--overwrite replaces an export, and this is none \\(it has no config.json"),
        ("sft_plain", "clone", "--overwrite replaces an export, and this is none \\(it holds .git"),
        ("sft_plain", "CHECKPOINT/out", "--to .*: is inside the checkpoint"),
        ("sft_plain", "CHECKPOINT", "--to .*: is inside the checkpoint"),
        ("sft_plain", "RUN", "--overwrite replaces an export, and this is none \\(it holds "),
    ],
)  # fmt: skip
def test_wrong_places_are_told_and_left_alone(runs, exports, tmp_path, monkeypatch, stem, to, told):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "file").write_text("x")
    (here / "loop").symlink_to("loop")
    (here / "photos").mkdir()
    (here / "photos/a.jpg").write_text("x")
    shutil.copytree(exports("sft_plain"), here / "clone")
    (here / "clone/.git").mkdir()
    run = runs / "sft_plain_20260101000000"
    to = to.replace("CHECKPOINT", str(run / "final")).replace("RUN", str(run))
    before = sorted(here.rglob("*")) + sorted(run.rglob("*"))
    with pytest.raises(UserError, match=told):
        make(runs, str(exports("sft_plain")) if stem == "hf" else stem, to, "--overwrite")
    assert sorted(here.rglob("*")) + sorted(run.rglob("*")) == before


def test_a_reward_model_needs_padding_of_its_own(runs, tmp_path):
    model, own = source(runs, "rm_plain")
    for pad_id in (None, own.eos_id):
        with pytest.raises(ValueError, match="a padding id that is not EOS"):
            save_pretrained(model, tmp_path / "out", own.eos_id, pad_id)
    assert not (tmp_path / "out").exists()
