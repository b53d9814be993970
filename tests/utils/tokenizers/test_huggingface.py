"""Tokenizers of other families behind the same interface: SentencePiece's BPE with byte fallback, Unigram, word pieces.

Ids are those of transformers; texts come back; nothing in a text is special; prompt and response are tokenised apart.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from config.user_error import UserError
from utils.tokenizer import get_tokenizer, load_tokenizer, tokenizer_note
from utils.tokenizers.huggingface import HuggingFaceTokenizer

pytestmark = pytest.mark.slow

TEXTS = ["What is the capital of Italy? It is Rome.\n\nHuman: hi\n\nAssistant: hello there, na\u00efve!"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PROMPT, RESPONSE = "\n\nHuman: What is  2 + 2?\n\nAssistant:", " It's 4, Zo\u00eb \U0001f600."
AWKWARD = [
    PROMPT, "a", "  a  b ", "\n", "\n\n a", "\t", "x" * 200, "12345 1,000.50", "\u65e5\u672c\u8a9e",
    "\U0001f600\u200d\u00e9", "</s>", "a</s>b <s> <unk>", "<0x41>", "nai\u0308ve", "don't I'LL",
    "`` code\n    x = 1", "a\x00b", "\r\n",
]  # fmt: skip


def bpe() -> Tokenizer:
    """SentencePiece's BPE as older tokenizer.json have it: a normalizer puts the prefix before the text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained: no piece goes on behind a space
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    description = json.loads(made.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(description))


def metaspace() -> Tokenizer:
    """The same, as newer ones have it."""
    made = bpe()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def unigram() -> Tokenizer:
    """All it knows are the letters of TEXTS; special tokens are among the pieces that it cuts texts into."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, initial_alphabet=["<", ">", "/"]
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def word_pieces() -> Tokenizer:
    """BERT's: lower case, no line breaks."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return made


def words() -> Tokenizer:
    """Whole words, and EOS is written like one."""
    made = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def save(made: Tokenizer, folder: Path, cls: str = "PreTrainedTokenizerFast", **config) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": cls, "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = {
    "LLaMA, the prefix by its normalizer": (bpe, "PreTrainedTokenizerFast"),
    "LLaMA, the prefix by its pre-tokenizer": (metaspace, "PreTrainedTokenizerFast"),
    "LLaMA, rebuilt by its class": (bpe, "LlamaTokenizer"),
    "Unigram": (unigram, "PreTrainedTokenizerFast"),
    "word pieces": (word_pieces, "BertTokenizer"),
    "whole words": (words, "PreTrainedTokenizerFast"),
}
EXACT = [kind for kind in KINDS if "LLaMA" in kind]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(make(), root / str(i), cls) for i, (kind, (make, cls)) in enumerate(KINDS.items())}


def theirs(folder: Path, text: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(folders, kind):
    ours = HuggingFaceTokenizer(folders[kind])
    # Where a normalizer puts the prefix, a text that starts with a space would get a second one.
    is_other = re.compile("^ |<unk>|</?s>" if KINDS[kind] == (bpe, "PreTrainedTokenizerFast") else "<unk>|</?s>")
    texts = [text for text in [*AWKWARD, RESPONSE] if not is_other.search(text)]
    assert ours.encode_batch(texts) == [theirs(folders[kind], text) for text in texts]
    assert ours.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_are_tokenised_apart(folders, kind):
    """Their ids joined are those of the joined text: no second prefix stands before the response."""
    ours = HuggingFaceTokenizer(folders[kind])
    assert ours.encode(PROMPT) + ours.encode(RESPONSE) == theirs(folders[kind], PROMPT + RESPONSE)


@pytest.mark.parametrize("kind", EXACT)
def test_texts_come_back(folders, kind):
    """All but the first space of a text, which the prefix stands for."""
    ours = HuggingFaceTokenizer(folders[kind])
    for text in [*AWKWARD, RESPONSE]:
        assert ours.decode(ours.encode(text)) == text.removeprefix(" "), text
    assert ours.decode([*ours.encode("a"), ours.eos_id, ours.pad_id]) == "a"
    assert "\ufffd" in ours.decode(ours.encode("\u65e5")[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_plain_text(folders, kind):
    ours = HuggingFaceTokenizer(folders[kind])
    special = {ours._vocabulary[token] for token in ("<s>", "</s>") if token in ours._vocabulary}
    for text in ("</s>", "a </s> b", "<s>a</s>", "<s> </s>"):
        assert ours.eos_id in special and not special & set(ours.encode(text)), text
    if kind in EXACT:
        assert ours.decode(ours.encode("a </s> b<s><unk>")) == "a </s> b<s><unk>"


@pytest.mark.parametrize("kind", KINDS)
def test_they_travel_with_a_checkpoint(folders, kind, tmp_path):
    ours = HuggingFaceTokenizer(folders[kind], "owner/name")
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.identity() == ours.identity() and again.name == "owner/name"
    assert again.encode_batch([*AWKWARD, RESPONSE]) == ours.encode_batch([*AWKWARD, RESPONSE])


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_come_back_is_told(folders, kind):
    ours = HuggingFaceTokenizer(folders[kind])
    told = "does not give texts back as they were" in tokenizer_note(ours, ours.vocab_size)
    assert told == (kind not in EXACT)


@pytest.mark.parametrize(
    "rows,told", [(420, ""), (424, ""), (448, ""), (512, ""), (433, "has 420 ids"), (2000, "2000 rows")]
)
def test_a_table_of_another_size_is_told(folders, rows, told):
    ours = HuggingFaceTokenizer(folders[EXACT[0]])
    ours.vocab_size = 420
    note = tokenizer_note(ours, rows)
    assert told in note and bool(note) == bool(told)


def test_a_file_is_not_read_by_a_class_that_knows_better(tmp_path):
    """Beside a GPT-2's config.json transformers takes GPT-2's class, which would split a LLaMA vocabulary by its own
    pattern."""
    folder = save(bpe(), tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 420}')
    plain = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Rome is old", add_special_tokens=False).ids
    assert get_tokenizer(folder).encode("Rome is old") == plain != theirs(folder, "Rome is old")


def test_limits_that_a_file_carries_do_not_cut_or_fill_texts(tmp_path):
    made = metaspace()
    made.enable_truncation(4)
    made.enable_padding(length=10, pad_id=0, pad_token="<unk>")
    ours = HuggingFaceTokenizer(save(made, tmp_path))
    assert ours.decode(ours.encode("It is Rome. " * 5)) == "It is Rome. " * 5


SPM = "reading {} takes the sentencepiece package.*save_pretrained.*writes the tokenizer.json"
UNUSABLE = {
    "tokenizer_config.json alone": ({"tokenizer_config.json": '{"tokenizer_class": "GPT2TokenizerFast"}'},
                                    "none of the files .*tokenizer_config.json alone makes none"),
    "two files without a vocabulary": ({"tokenizer_config.json": "{}", "merges.txt": "a b\n"},
                                       "tokenizer_config.json and merges.txt alone make none"),
    "vocab.txt of an unnamed class": ({"vocab.txt": "[UNK]\na\n", "config.json": '{"model_type": "gpt2"}'},
                                      "GPT2Tokenizer finds no vocabulary in it; name the class.*BertTokenizer"),
    "vocab.txt without EOS": ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n",
                               "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
                              'no EOS token; set "eos_token" in its tokenizer_config.json'),
    "vocab.json without merges": ({"vocab.json": '{"a": 0}', "config.json": '{"model_type": "gpt2"}'},
                                  "cannot load it"),
    "a pointer of Git LFS": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
                             "pointer of Git LFS, not the file; fetch it with git lfs pull"),
    "tokenizer.model": ({"tokenizer.model": "\n\x0e", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
                        SPM.format("tokenizer.model")),
    "spiece.model": ({"spiece.model": "\n\x0e"}, SPM.format("spiece.model")),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_folders_are_told_in_one_line(kind, tmp_path, monkeypatch, capfd):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find_spec(name))
    files, told = UNUSABLE[kind]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told) as error:
        get_tokenizer(tmp_path)
    assert str(error.value).startswith(f"tokenizer {tmp_path}: ") and "\n" not in str(error.value)
    assert not capfd.readouterr().err


def test_the_remedy_for_a_missing_eos_works(tmp_path):
    files, _ = UNUSABLE["vocab.txt without EOS"]
    (tmp_path / "vocab.txt").write_text(files["vocab.txt"])
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}')
    assert get_tokenizer(tmp_path).eos_id == 2
    assert "does not give texts back" in tokenizer_note(get_tokenizer(tmp_path), 6)
