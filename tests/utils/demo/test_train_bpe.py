"""The demo's tokenizer: tiktoken and the tokenizers library agree, every byte is there, the file is reproducible."""

import base64
import random

import pytest
import tiktoken
from tokenizers import ByteLevelBPETokenizer

from utils.demo.train_bpe import DEMO_FOLDER, VOCAB_SIZE, corpus_texts, train_bpe
from utils.tokenizers.bpe import EOS_TEXT, GPT2_PATTERN, byte_alphabet, write_ranks

pytestmark = pytest.mark.slow


def read_ranks(path):
    """Read a tiktoken file."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def encoding(ranks):
    """Build the tiktoken encoding of some ranks."""
    special = {EOS_TEXT: len(ranks)}
    return tiktoken.Encoding("demo", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def corpus():
    """Return the texts that the shipped tokenizer was trained on."""
    return list(corpus_texts(DEMO_FOLDER))


@pytest.fixture(scope="module")
def trained(corpus):
    """Train on the whole shipped corpus."""
    return train_bpe(corpus)


def test_shipped_file_has_every_byte_and_the_agreed_size():
    ranks = read_ranks(DEMO_FOLDER / "bpe.tiktoken")
    assert sorted(ranks.values()) == list(range(VOCAB_SIZE - 1))
    assert all(ranks[bytes([byte])] == byte for byte in range(256))
    # Every longer token is two shorter ones of lower rank, or it could never be merged.
    for token, rank in ranks.items():
        if len(token) > 1:
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            assert any(max(ranks.get(left, rank), ranks.get(right, rank)) < rank for left, right in halves)


def test_training_again_gives_the_shipped_file(trained, tmp_path):
    write_ranks(tmp_path / "bpe.tiktoken", trained[0])
    assert (tmp_path / "bpe.tiktoken").read_bytes() == (DEMO_FOLDER / "bpe.tiktoken").read_bytes()


def test_tiktoken_and_tokenizers_agree_on_the_corpus(trained, corpus):
    ranks, library = trained
    texts = sorted(set(corpus))[::5]
    mine = encoding(ranks).encode_ordinary_batch(texts)
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    for text, ids, other in zip(texts, mine, library.encode_batch(texts), strict=True):
        tokens = [bytes(to_byte[character] for character in token) for token in other.tokens]
        assert [ranks[token] for token in tokens] == ids, text


def test_round_trip_of_any_text():
    demo = encoding(read_ranks(DEMO_FOLDER / "bpe.tiktoken"))
    rng = random.Random(0)
    texts = ["", " ", "\n\nHuman: hi\n\nAssistant:", "it's 10\u00a0\u20ac \u4e2d\u6587 \U0001f600", EOS_TEXT]
    texts += ["\x00\t\r\n  x  "]
    for _ in range(200):
        codes = [rng.choice([rng.randrange(32, 127), rng.randrange(160, 0xD800)]) for _ in range(40)]
        texts.append("".join(map(chr, codes)))
    for text in texts:
        ids = demo.encode_ordinary(text)
        assert demo.decode(ids) == text
        assert demo.eot_token not in ids
    assert demo.decode_bytes(list(range(256))) == bytes(range(256))
    assert demo.eot_token == VOCAB_SIZE - 1 == demo.max_token_value


def test_split_pattern_cuts_as_gpt2_does():
    regex = pytest.importorskip("regex")
    text = "I'll  say: it's 42 days,\n\nwe've\tgone -- l'\u00e9t\u00e9 \u4e2d\u6587  "
    pieces = ["I", "'ll", " ", " say", ":", " it", "'s", " 42", " days", ",", "\n", "\n"]
    pieces += ["we", "'ve", "\t", "gone", " --", " l", "'", "\u00e9t\u00e9", " \u4e2d\u6587", "  "]
    assert regex.findall(GPT2_PATTERN, text) == pieces
    trained_with = ByteLevelBPETokenizer().pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in trained_with] == pieces


def test_small_vocabularies():
    ranks, _ = train_bpe(["abab abab"] * 3, vocab_size=259)
    assert len(ranks) == 258
    assert ranks[b"ab"] == 256
    few, _ = train_bpe(["xy"] * 3, vocab_size=1024)
    assert len(few) == 257
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["a"], vocab_size=256)


def test_byte_alphabet_is_a_bijection():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert alphabet[ord(" ")] == "\u0120"
