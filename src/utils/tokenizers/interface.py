"""What every tokenizer here can do.

Ids: 0 .. vocab_size - 1 are real and include EOS. PAD is the *virtual* id `vocab_size`: it stands in batches only, has
no row in any embedding table and is never EOS, so that a generated EOS cannot be mistaken for padding.

Nothing in a user's text is special: the characters "<|endoftext|>" are encoded letter by letter, never as EOS. No
tokenizer here adds a token of its own; who needs an EOS appends it.

Shapes: B texts, T tokens of the longest one.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

SAVED_FOLDER = "tokenizer"
IDENTITY_FILE = "identity.json"


class Tokenizer(ABC):
    """What every tokenizer here can do. `vocab_size` counts EOS; `pad_id == vocab_size`."""

    kind: str
    name: str
    vocab_size: int
    eos_id: int

    @property
    def pad_id(self) -> int:
        """The virtual id of padding: the first id past the vocabulary."""
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of one text; special tokens in it are plain text, no EOS is appended."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each as `encode` would give them."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of real ids other than EOS."""

    @cached_property
    @abstractmethod
    def _sha256(self) -> str:
        """Hex digest of everything that decides which ids a text gets."""

    @abstractmethod
    def _save_files(self, folder: Path) -> None:
        """Writes what `load_tokenizer` needs beside the identity."""

    @abstractmethod
    def export_huggingface(self, folder: str | Path) -> None:
        """Writes a tokenizer that `transformers.AutoTokenizer.from_pretrained(folder)` loads, with the same ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids (a list, an array or a 1-D tensor); EOS and PAD are left out.

        Bytes that are not UTF-8, as in a character cut in the middle, come out as U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary and is not PAD.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
        for i in ids:
            if not 0 <= i <= self.vocab_size:
                raise ValueError(f"id {i} is not in the vocabulary of {self.name}: 0 .. {self.vocab_size - 1}")
        return self._decode([i for i in ids if i not in (self.eos_id, self.pad_id)])

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        max_length: int | None = None,
        truncation: bool = False,
        truncation_side: str = "right",
        padding: bool | str = False,
        padding_side: str = "right",
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Encodes with the usual arguments of a Hugging Face tokenizer.

        Args:
            text: one text, or B of them.
            truncation: cut to `max_length` tokens; `truncation_side` "left" cuts the beginning, as is right for a
                prompt, whose end carries the cue to answer.
            padding: False, True or "longest" (to the longest of the batch), or "max_length"; on `padding_side`.
            return_tensors: None for lists, "pt" for LongTensors.

        Returns:
            `input_ids` and `attention_mask` (1 on real tokens, 0 on PAD). For B texts: B lists, or tensors [B, T]. For
            one text: one flat list, or tensors [1, T].

        Raises:
            ValueError: an argument is not one of these, or ragged lists are asked for as a tensor.
        """
        _check_call(max_length, truncation, truncation_side, padding, padding_side, return_tensors)
        rows = self.encode_batch([text] if isinstance(text, str) else list(text))
        if truncation and truncation_side == "right":
            rows = [row[:max_length] for row in rows]
        elif truncation:
            rows = [row[max(0, len(row) - max_length) :] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            width = max_length if padding == "max_length" else max(map(len, rows), default=0)
            rows = [_pad(row, self.pad_id, width, padding_side) for row in rows]
            masks = [_pad(mask, 0, width, padding_side) for mask in masks]
        found = {"input_ids": rows, "attention_mask": masks}
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise ValueError("texts of different lengths make no tensor; set padding=True")
            shape = (len(rows), len(rows[0]) if rows else 0)
            return {name: torch.tensor(lists, dtype=torch.long).reshape(shape) for name, lists in found.items()}
        return {name: lists[0] for name, lists in found.items()} if isinstance(text, str) else found

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records. Two tokenizers with the same `sha256` give the same ids to every text."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "sha256": self._sha256,
        }

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer/, from which `load_tokenizer(folder)` restores this tokenizer without a network."""
        target = Path(folder) / SAVED_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        self._save_files(target)
        (target / IDENTITY_FILE).write_text(json.dumps(self.identity(), indent=2) + "\n", encoding="utf-8")


def vocabulary_sha256(by_id: dict[int, bytes], rules: str = "") -> str:
    """Hex digest of the bytes of every id, and of the rules that go with them."""
    digest = hashlib.sha256(rules.encode())
    for i in sorted(by_id):
        digest.update(b"\n%d %s" % (i, by_id[i].hex().encode()))
    return digest.hexdigest()


def _pad(row: list[int], value: int, width: int, side: str) -> list[int]:
    filler = [value] * (width - len(row))
    return row + filler if side == "right" else filler + row


def _check_call(max_length, truncation, truncation_side, padding, padding_side, return_tensors) -> None:
    if padding not in (False, True, "longest", "max_length"):
        raise ValueError(f'padding is False, True, "longest" or "max_length", not {padding!r}')
    if max_length is None and (truncation or padding == "max_length"):
        raise ValueError('truncation and padding="max_length" need a max_length')
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length is 0 or more, not {max_length}")
    for name, side in (("truncation_side", truncation_side), ("padding_side", padding_side)):
        if side not in ("left", "right"):
            raise ValueError(f'{name} is "left" or "right", not {side!r}')
    if return_tensors not in (None, "pt"):
        raise ValueError(f'return_tensors is None or "pt", not {return_tensors!r}')
