"""`-t export`: what it writes is the model, for transformers' own classes and pipelines; what is not is not left."""

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
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging as their_logging

from config.user_error import RunStopped, UserError
from experiments import export
from experiments.main import Parser
from models.gpt import GPT, GPTCritic, GPTRewardModel
from models.weights.checkpoint import save_model
from models.weights.huggingface import save_pretrained
from training.start import describe_model
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
    for table in (model.transformer.wte.weight, model.transformer.wpe.weight):
        table *= 3
    model.transformer.ln_f.bias *= 0.2
    return model


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
    run = root / "sft_plain_20260101000000"
    config = {"dataset": "/a/b/rows|.jsonl", "seed": 5, "config": "gpt2-nano"}
    (run / "hyperparams.json").write_text(json.dumps({"stage": "sft", "config": config, "commit": "abc"}))
    lines = [{"step": step, "eval/loss": loss, "train/loss": 9.0} for step, loss in ((2, 2.5), (3, 1.25), (4, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def make(runs, stem, to, *words):
    """Run the task in this process."""
    return export.run(Parser(prog="export"), ["-m", stem, "--to", str(to), "--runs-dir", str(runs), *map(str, words)])


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


def source(runs, stem, cls=GPT):
    """(our model, our tokenizer)."""
    folder = runs / f"{stem}_20260101000000" / "final"
    return cls.from_checkpoint(folder).eval(), load_tokenizer(folder)


def messages(turns, system=None):
    """Chat messages of user, assistant, user, ..."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


LANGUAGE_MODELS = ("sft_plain", "sft_lora", "sft_wide", "sft_own", "sft_other")
REWARD_MODELS = ("rm_plain", "rm_lora", "rm_own")


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
    assert (config.n_positions, config.vocab_size, config.dtype) == (CONTEXT, own.vocab_size, torch.float32)
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


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_half_precision(runs, tmp_path, dtype, capsys):
    make(runs, "sft_plain", tmp_path / "out", "--dtype", dtype)
    shown = capsys.readouterr().out
    assert f"parameters in {dtype}" in shown and "logits within" in shown
    wanted = export.DTYPES[dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {wanted}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == wanted


def test_the_card_says_what_the_records_say(exports):
    card = (exports("sft_plain") / "README.md").read_text()
    for row in (
        "| run | sft_plain_20260101000000/final |", "| stage | supervised fine-tuning (SFT) |", "| steps | 3 |",
        "| trained from | sft_x_20250101000000 |", "| data set | rows\\|.jsonl |", "| seed | 5 |", "| commit | abc |",
        "| eval/loss | 3 | 1.25 |",
    ):  # fmt: skip
        assert row in card
    assert "train/loss" not in card and "0.5 |" not in card and "/somewhere" not in card and "/a/b" not in card
    bare = (exports("sft_lora") / "README.md").read_text()
    assert "data set" not in bare and "figure" not in bare and "None" not in bare.partition("## Use")[0]


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sft_plain", "sft_own"])
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
    ours, own = source(runs, stem, GPTRewardModel)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_token_id != own.eos_id
    chats = [messages(turns) for turns in (("Hi!", "Hello."), ("a", "b", "c", "A long reply it is. " * 3), ("x", "y"))]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    wanted = []
    for chat in chats:
        *turns, reply = [m["content"] for m in chat]
        text = PromptTemplate().format(turns) + PromptTemplate().response(reply)
        ids = torch.tensor([[*own.encode(text), own.eos_id]])
        wanted.append(float(ours(ids, torch.ones_like(ids, dtype=torch.bool))))
    assert max(wanted) - min(wanted) > 0.1
    found = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert found == pytest.approx(wanted, abs=1e-4)
    score = pipeline("text-classification", str(folder))
    assert [row["score"] for row in score(texts, batch_size=3)] == pytest.approx(wanted, abs=1e-4)
    assert [path.name for path in folder.iterdir() if path.name == "generation_config.json"] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_reward_model_in_half_precision(runs, tmp_path, dtype):
    assert make(runs, "rm_plain", tmp_path / "out", "--dtype", dtype) == 0


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


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["transformer.ln_f.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"type":"ByteLevel"', '"type":"Nothing"').replace('"BPE"', '"WordPiece"'))


def another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


FAULTS = {
    "another weight": (spoil_tensor("transformer.h.1.mlp.c_fc.weight"), "the (logits|scores) are off by"),
    "another table": (spoil_tensor("transformer.wte.weight"), "the (logits|scores) are off by"),
    "another activation": (spoil_json("config.json", activation_function="relu"), "the (logits|scores) are off by"),
    "a missing tensor": (drop_tensor, "the weights have missing keys: .*ln_f.weight"),
    "another context": (spoil_json("tokenizer_config.json", model_max_length=1024), "does not know the context"),
    "another padding": (spoil_json("config.json", pad_token_id=3), "config.json has another padding id"),
    "weights that are cut short": (cut_weights, "SafetensorError"),
    "a tokenizer that cannot be read": (another_tokenizer, ""),
    "another template": (another_template, "the chat template writes another prompt"),
}


@pytest.mark.parametrize(
    ("stem", "spoil", "told"),
    [(stem, *fault) for fault in FAULTS.values() for stem in ("sft_plain", "rm_plain")]
    + [
        ("sft_plain", spoil_json("tokenizer_config.json", padding_side="right"), "does not pad on the left"),
        ("rm_plain", spoil_json("tokenizer_config.json", padding_side="left"), "does not pad on the right"),
        ("sft_plain", spoil_json("generation_config.json", eos_token_id=7), "generation ends at another id"),
        ("rm_plain", spoil_json("config.json", pad_token_id=1023), "config.json has another padding id"),
    ],
)
def test_a_folder_that_is_not_the_model_is_not_left(runs, tmp_path, monkeypatch, stem, spoil, told):
    write = export.Export.write
    monkeypatch.setattr(export.Export, "write", lambda self, folder, *rest: (write(self, folder, *rest), spoil(folder)))
    with pytest.raises(RunStopped, match=f"the export is not the model: .*{told}"):
        make(runs, stem, tmp_path / "out")
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
        patch.setattr(export.Export, "write", broken)
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
    monkeypatch.setattr("experiments.export.shutil.disk_usage", lambda path: usage)
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
        ("sft_typo", "out", "-m sft_typo: no such run or folder; runs in .*: ppo_critic, rm_lora"),
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
    model, own = source(runs, "rm_plain", GPTRewardModel)
    for pad_id in (None, own.eos_id):
        with pytest.raises(ValueError, match="a padding id that is not EOS"):
            save_pretrained(model, tmp_path / "out", own.eos_id, pad_id)
    assert not (tmp_path / "out").exists()
