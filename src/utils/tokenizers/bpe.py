"""Byte-level BPE in tiktoken's form, bytes with ranks: GPT-2's own and the demo's.

A vocabulary file has one `base64-of-the-bytes rank` per line. `TiktokenTokenizer.export_huggingface` writes Hugging
Face's form of the same: printable characters with a merge list.
"""

import base64
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from config.user_error import UserError
from utils.tokenizers.interface import Tokenizer, vocabulary_sha256

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer

EOS_TEXT = "<|endoftext|>"
RANKS_FILE = "bpe.tiktoken"

# GPT-2's split of a text into words (openai/gpt-2 src/encoder.py) in the form in which tiktoken writes it, which is
# faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class TiktokenTokenizer(Tokenizer):
    """A byte-level BPE in the way of GPT-2: byte strings with ranks, GPT-2's split pattern, EOS as the id after the
    last rank."""

    def __init__(self, name: str, ranks: dict[bytes, int], kind: str = "tiktoken"):
        """Args: `ranks` maps each token's bytes to its id 0 .. len(ranks) - 1; a token's id is also its merge priority.

        Raises:
            ValueError: the ids are not 0 .. len(ranks) - 1, or one of the 256 bytes is missing.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"the ranks of {name} are not 0 .. {len(ranks) - 1}")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError(f"the vocabulary of {name} lacks some of the 256 single bytes")
        self.kind, self.name = kind, name
        self.ranks = ranks
        self.eos_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOS_TEXT: self.eos_id}
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`. Long texts are shared out to threads; for short ones that costs more than it
        brings."""
        if sum(map(len, texts)) > 400 * len(texts):
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=min(8, os.cpu_count() or 1))
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    @cached_property
    def _sha256(self) -> str:
        by_id = {rank: token for token, rank in self.ranks.items()}
        return vocabulary_sha256(by_id | {self.eos_id: EOS_TEXT.encode()})

    def _save_files(self, folder: Path) -> None:
        write_ranks(folder / RANKS_FILE, self.ranks)

    def for_transformers(self) -> "GPT2Tokenizer":
        """See `Tokenizer.for_transformers`."""
        from tokenizers import processors
        from transformers import GPT2Tokenizer

        alphabet = byte_alphabet()

        def shown(token: bytes) -> str:
            return "".join(alphabet[byte] for byte in token)

        tokenizer = GPT2Tokenizer(
            vocab={shown(token): rank for token, rank in self.ranks.items()} | {EOS_TEXT: self.eos_id},
            merges=[(shown(left), shown(right)) for left, right in recover_merges(self.ranks)],
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS_TEXT),
        )
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
        return tokenizer

    def export_huggingface(
        self, folder: str | Path, max_length: int = 1024, chat_template: str = "", own_pad: bool = False
    ) -> int:
        """See `Tokenizer.export_huggingface`."""
        from tokenizers import Tokenizer as Backend

        pad_id = super().export_huggingface(folder, max_length, chat_template, own_pad)
        # vocab.json and merges.txt, which older programs read.
        Backend.from_file(str(Path(folder) / "tokenizer.json")).model.save(str(folder))
        return pad_id


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken vocabulary: one `base64-of-the-bytes rank` per line.

    Raises:
        UserError: the file is missing, or a line is not of this form.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; a tiktoken vocabulary is needed") from None
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{number}: a line of a tiktoken vocabulary is `base64 rank`") from None
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Writes what `read_ranks` reads, in the order of the ranks."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order))


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in Hugging Face's files (openai/gpt-2 src/encoder.py
    bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge list behind a ranked vocabulary, in order.

    A token of rank r came from merging two tokens of lower rank: they are what is left of its bytes after applying all
    merges of rank below r.

    Raises:
        ValueError: a token is not a merge of two others, so that no merge list gives this vocabulary.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(token, rank, ranks)
        if len(parts) != 2:
            raise ValueError(f"token {rank} ({token!r}) is not a merge of two tokens of lower rank")
        merges.append((parts[0], parts[1]))
    return merges


def _merge_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
