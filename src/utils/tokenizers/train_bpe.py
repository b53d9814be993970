"""Train the offline demo's tokenizer: a byte-level BPE with GPT-2's split pattern, in tiktoken's file format.

`python src/utils/tokenizers/train_bpe.py` reads the texts in assets/demo and writes assets/demo/bpe.tiktoken: one
`base64(token) rank` per line, all 256 bytes first, then merges in the order learned (Sennrich, Haddow & Birch 2016;
byte-level: GPT-2, Radford et al. 2019). The special token "<|endoftext|>" is not in the file; its id is the number of
ranks.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from utils.tokenizer import DEMO_RANKS, EOS_TEXT, write_ranks
from utils.tokenizers.export import byte_alphabet

DEMO_FOLDER = DEMO_RANKS.parent
VOCAB_SIZE = 1024
"""Ids of the tokenizer: 256 bytes, 767 merges and the end of text."""
# GPT-2's pre-tokenisation pattern, in the form of openai/gpt-2 encoder.py, which tiktoken's "gpt2" is equivalent to.
SPLIT_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CORPUS_FILES = ("text", "sft-train", "pairs-train")


def train_bpe(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> tuple[dict[bytes, int], Tokenizer]:
    """Train byte-level BPE on `texts`.

    Returns the mergeable ranks for `tiktoken.Encoding` (vocab_size - 1 of them, fewer if the texts run out of pairs;
    the bytes have ranks 0 .. 255) and the same vocabulary as a `tokenizers.Tokenizer`, for comparison.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text), not {vocab_size}")
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(to_byte), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merges:
        token = bytes(to_byte[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    return ranks, tokenizer


def corpus_texts(folder: Path) -> Iterator[str]:
    """Yield the training texts of a demo folder: plain text, demonstrations, and both dialogues of every pair."""
    for name in CORPUS_FILES:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if "text" in row:
                    yield row["text"]
                elif "prompt" in row:
                    yield row["prompt"] + row["response"]
                else:
                    yield row["chosen"]
                    yield row["rejected"]


def main(out: Path = DEMO_FOLDER, vocab_size: int = VOCAB_SIZE) -> None:
    """Train the demo's tokenizer on the texts of a demo folder and write bpe.tiktoken there.

    Args:
        out: The folder that holds the demo's *.jsonl.gz and receives bpe.tiktoken.
        vocab_size: Number of token ids, with the 256 bytes and the end of text.
    """
    ranks, _ = train_bpe(tqdm(corpus_texts(out), desc="BPE corpus", unit=" texts", leave=False), vocab_size)
    write_ranks(out / "bpe.tiktoken", ranks)
    print(f"{out / 'bpe.tiktoken'}: {len(ranks)} ranks, and {EOS_TEXT} as id {len(ranks)}")


if __name__ == "__main__":
    tyro.cli(main)
