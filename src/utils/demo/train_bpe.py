"""Train the offline demo's tokenizer: a byte-level BPE with GPT-2's split pattern, in tiktoken's file format.

`python src/utils/demo/train_bpe.py` reads the texts in assets/demo and writes assets/demo/bpe.tiktoken: one
`base64(token) rank` per line, all 256 bytes first, then merges in the order learned (Sennrich, Haddow & Birch 2016;
byte-level: GPT-2, Radford et al. 2019). The special token "<|endoftext|>" is not in the file; its id is the number of
ranks.
"""

import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    importlib.import_module("config")  # before any package: it tells of those that are missing

import tyro
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm

from utils.data.files import read_jsonl
from utils.tokenizer import DEMO_FOLDER
from utils.tokenizers.bpe import EOS_TEXT, byte_alphabet, write_ranks

VOCAB_SIZE = 1024
"""Ids of the tokenizer: 256 bytes, 767 merges and the end of text."""
CORPUS_FILES = ("text", "sft-train", "pairs-train")


def train_bpe(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> tuple[dict[bytes, int], ByteLevelBPETokenizer]:
    """Train byte-level BPE on `texts`.

    Returns the mergeable ranks for `tiktoken.Encoding` (vocab_size - 1 of them, fewer if the texts run out of pairs;
    the bytes have ranks 0 .. 255) and the same vocabulary as `tokenizers` has it, for comparison.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text), not {vocab_size}")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size - 1, show_progress=False)
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        token = bytes(to_byte[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    return ranks, tokenizer


def corpus_texts(folder: Path) -> Iterator[str]:
    """Yield the training texts of a demo folder: plain text, demonstrations, and both dialogues of every pair."""
    for name in CORPUS_FILES:
        for _, row in read_jsonl(folder / f"{name}.jsonl.gz"):
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
