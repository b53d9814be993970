"""Tokenizers: identical ids to transformers, no special token in user text, and the same tokenizer after saving."""

import gzip
import json

import numpy as np
import pytest
import torch

from config.user_error import UserError
from utils.tokenizer import HuggingFaceTokenizer, TiktokenTokenizer, get_tokenizer, load_tokenizer
from utils.tokenizers.bpe import byte_alphabet, read_ranks, recover_merges, write_ranks

pytestmark = pytest.mark.slow

EDGE_CASES = [
    "", " ", "  ", "\n", "\n\n", " \n ", "\t\t", "a", " a", "a ", "  a  b   c ", "don't I'll we've it's I'D", "'s's",
    "\n\nHuman: Hi\n\nAssistant: Hello.", "12345 1,000.50", "x" * 300, " " * 300,
    "\r\n\r\n", "a\x00b\x01", "\x7f\x80\xa0",
    "naïve café", "nai\u0308ve",
    "Ωμέγα привет שלום مرحبا हिन्दी", "日本語のテキスト、中文。한국어",
    "😀👩‍👩‍👧‍👦🇩🇪", "\ufeffbom", "\u200bzero\u2028line",
    "\U0010ffff\ue000", "½ ² ٣ Ⅷ", "ﬁ Ǆ ß İ",
    "<|endoftext|>", "a<|endoftext|>b <|endoftext|>", "<|pad|> <s> </s> [PAD]",
    "``` code\n    x = 1\n```",
    "\u3000\u00a0\u2003wide", "...!!!???---", "\u0301\u0301 combining first",
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(data_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken-cache"))
        return get_tokenizer("gpt2")


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory):
    """transformers' GPT-2 tokenizer from OpenAI's own two files, without any code of this project in between."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    for path in (data_dir / "tiktoken-cache").iterdir():
        data = path.read_bytes()
        (folder / ("vocab.json" if data.startswith(b"{") else "merges.txt")).write_bytes(data)
    return GPT2Tokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def demo():
    return get_tokenizer("demo")


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    demo.export_huggingface(folder)
    return folder


def test_gpt2_has_its_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.pad_id) == (50257, 50256, 50257)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("\n\nHuman: a\n\nAssistant:") == [198, 198, 20490, 25, 257, 198, 198, 48902, 25]


def test_gpt2_ids_equal_those_of_transformers_on_real_dialogues_and_edge_cases(gpt2, reference, data_dir):
    with gzip.open(data_dir / "hh-rlhf" / "harmless-test-1000.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 1000
    texts = EDGE_CASES + [row[key] for row in rows for key in ("chosen", "rejected")]
    # The reference takes "<|endoftext|>" in a text for EOS unless it is told not to.
    expected = reference(texts, split_special_tokens=True)["input_ids"]
    for text, ours, one, theirs in zip(texts, gpt2.encode_batch(texts), map(gpt2.encode, texts), expected, strict=True):
        assert ours == one == theirs
        assert gpt2.decode(ours) == text


def test_gpt2_export_gives_identical_ids(gpt2, tmp_path, data_dir):
    from transformers import AutoTokenizer

    gpt2.export_huggingface(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", 50256, 50257)
    assert theirs(EDGE_CASES, split_special_tokens=True)["input_ids"] == gpt2.encode_batch(EDGE_CASES)
    assert HuggingFaceTokenizer(tmp_path).identity()["sha256"] == gpt2.identity()["sha256"]


def test_gpt2_merges_are_recovered_from_the_ranks(gpt2, data_dir):
    files = [path.read_text(encoding="utf-8") for path in (data_dir / "tiktoken-cache").iterdir()]
    merges_txt = next(text for text in files if not text.startswith("{"))
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    expected = [
        tuple(bytes(map(to_byte.get, part)) for part in line.split(" ")) for line in merges_txt.splitlines()[1:] if line
    ]
    assert recover_merges(gpt2.ranks) == expected


def test_gpt2_without_network_or_cache_is_the_users_error(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError(f"no route for {name}")

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(UserError, match="tokenizer gpt2: .*go online once, or set TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize("text", EDGE_CASES)
def test_round_trip_and_no_eos_from_text(demo, exported, text):
    folder = HuggingFaceTokenizer(exported)
    ids = demo.encode(text)
    assert demo.decode(ids) == text
    assert demo.eos_id not in ids and demo.pad_id not in ids
    assert folder.encode(text) == ids and folder.decode(ids) == text


def test_export_loads_with_auto_tokenizer_beside_a_model_config(demo, tmp_path):
    from transformers import AutoTokenizer, GPT2Config

    demo.export_huggingface(tmp_path)
    GPT2Config(vocab_size=demo.vocab_size, eos_token_id=demo.eos_id).save_pretrained(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", demo.eos_id, demo.vocab_size)
    assert theirs(EDGE_CASES, split_special_tokens=True)["input_ids"] == demo.encode_batch(EDGE_CASES)
    assert theirs("a<|endoftext|>")["input_ids"] == [*demo.encode("a"), demo.eos_id]


def test_ids_of_eos_and_pad(demo):
    assert demo.eos_id == demo.vocab_size - 1 == len(demo.ranks)
    assert demo.pad_id == demo.vocab_size != demo.eos_id


def test_batch_equals_one_by_one_for_short_and_long_texts(demo):
    texts = ["short", "", "text " * 2000, "x"] * 2
    assert demo.encode_batch(texts) == [demo.encode(text) for text in texts]
    assert demo.encode_batch([]) == []


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_decode_leaves_out_eos_and_pad(demo, kind):
    ids = [demo.pad_id, *demo.encode("a b"), demo.eos_id, demo.pad_id]
    assert demo.decode(kind(ids)) == "a b"
    assert demo.decode([]) == ""


def test_decode_of_half_a_character_and_of_unknown_ids(demo):
    assert demo.decode(demo.encode("é")[:1]) == "\ufffd"
    for wrong in (demo.pad_id + 1, -1):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            demo.decode([wrong])


def test_saved_tokenizers_come_back_without_names_or_network(demo, exported, tmp_path):
    for i, tok in enumerate((demo, HuggingFaceTokenizer(exported))):
        folder = tmp_path / str(i)
        tok.save(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["tokenizer"]
        for again in (load_tokenizer(folder), get_tokenizer(folder), get_tokenizer(folder / "tokenizer")):
            assert type(again) is type(tok)
            assert again.identity() == tok.identity()
            assert again.encode_batch(EDGE_CASES) == tok.encode_batch(EDGE_CASES)


def test_identity_tells_vocabularies_apart_and_only_them(demo, exported, tmp_path):
    identity = demo.identity()
    assert set(identity) == {"kind", "name", "vocab_size", "eos_id", "sha256"} and identity["kind"] == "demo"
    assert HuggingFaceTokenizer(exported).identity()["sha256"] == identity["sha256"]
    swapped = dict(demo.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    assert TiktokenTokenizer("demo", swapped, "demo").identity()["sha256"] != identity["sha256"]


@pytest.mark.parametrize("change", ["merges", "split", "normalizer"])
def test_identity_of_a_folder_depends_on_its_rules(demo, exported, tmp_path, change):
    data = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    if change == "merges":
        data["model"]["merges"] = data["model"]["merges"][::-1]
    elif change == "split":
        data["pre_tokenizer"]["add_prefix_space"] = True
    else:
        data["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tok = HuggingFaceTokenizer(tmp_path)
    assert tok.identity()["sha256"] != demo.identity()["sha256"]


def test_an_altered_checkpoint_tokenizer_is_refused(demo, tmp_path):
    demo.save(tmp_path)
    path = tmp_path / "tokenizer" / "bpe.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    a, b = lines[97].split()[0], lines[98].split()[0]
    path.write_bytes(b"".join([*lines[:97], b + b" 97\n", a + b" 98\n", *lines[99:]]))
    with pytest.raises(UserError, match="not the one recorded"):
        load_tokenizer(tmp_path)
    cases = {
        b"YQ== x\n": ":1: a line of a tiktoken vocabulary",
        b"YQ== 0\n": "lacks some of the 256",
        b"".join(lines[:-2] + lines[-1:]): "the ranks of demo are not 0 ..",
    }
    for broken, message in cases.items():
        path.write_bytes(broken)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_tokenizer(tmp_path)
    for broken in ("[]", "{", '{"kind": 1, "name": "x", "sha256": "y"}', '{"kind": "a", "name": "x", "sha256": "y"}'):
        (tmp_path / "tokenizer" / "identity.json").write_text(broken)
        with pytest.raises(UserError, match="is not the identity of a tokenizer"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "description,message",
    [
        ({"tokenizer": {"sha256": "0" * 64}, "model": {"vocab_size": 1024}}, "not the one that model.json names"),
        ({"model": {"vocab_size": 1000}}, "has 1024 ids and its model 1000"),
        ({"tokenizer": None, "model": {"vocab_size": 1024}}, None),
        ([], None),
    ],
)
def test_a_tokenizer_has_to_be_the_models_own(demo, tmp_path, description, message):
    """model.json beside it says which one the model learned; one that says nothing is judged by who loads the model."""
    demo.save(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(description))
    if message is None:
        assert load_tokenizer(tmp_path).identity() == demo.identity()
        return
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_unknown_names_and_unusable_folders(tmp_path):
    with pytest.raises(UserError, match="tokenizer gpt3: not known; choose gpt2, demo, a hub name .*, or the path"):
        get_tokenizer("gpt3")
    with pytest.raises(UserError, match="has none of the files tokenizer.json"):
        get_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer/identity.json"):
        load_tokenizer(tmp_path)
    # transformers turns a lone model config into an empty tokenizer of one token.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="has none of the files"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load it"):
        get_tokenizer(tmp_path)


def test_a_folder_without_eos_is_refused_and_an_eos_in_plain_text_is_none(exported, tmp_path):
    data = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="has no EOS token"):
        get_tokenizer(tmp_path)
    # A word-level vocabulary in which EOS is a word like any other: whoever writes it must not end the response.
    data |= {
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"end": 0, "a": 1, "unk": 2}, "unk_token": "unk"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "end", "unk_token": "unk"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert get_tokenizer(tmp_path).encode("a end a") == [1, 2, 1]


def test_ranks_file_round_trip(demo, tmp_path):
    write_ranks(tmp_path / "ranks", demo.ranks)
    assert read_ranks(tmp_path / "ranks") == demo.ranks


def test_missing_demo_vocabulary_names_the_script_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.tokenizer.DEMO_RANKS", tmp_path / "none")
    with pytest.raises(UserError, match="utils/demo/make.py"):
        get_tokenizer("demo")
