"""What every tokenizer here can do.

Ids: 0 .. vocab_size - 1 are real and include EOS. PAD is the *virtual* id `vocab_size`: it stands in batches only, has
no row in any embedding table and is never EOS, so that a generated EOS cannot be mistaken for padding.

Nothing in a user's text is special: the characters "<|endoftext|>" are encoded letter by letter, never as EOS. No
tokenizer here adds a token of its own; who needs an EOS appends it. Special tokens between texts are written by
`encode_marked`, for the templates of chat models (utils/template.py).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAVED_FOLDER = "tokenizer"
IDENTITY_FILE = "identity.json"
PAD_TEXT = "<|pad|>"


class Tokenizer(ABC):
    """What every tokenizer here can do. `vocab_size` counts EOS; `pad_id == vocab_size`."""

    kind: str
    name: str
    vocab_size: int
    eos_id: int
    other_stop_ids: tuple[int, ...] = ()
    """More ids at which a model ends that was made elsewhere; not saved, since ours end with `eos_id` alone."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end what the tokenizer's model says, `eos_id` first."""
        return (self.eos_id, *(i for i in self.other_stop_ids if i != self.eos_id))

    @property
    def ends(self) -> int | tuple[int, ...]:
        """`stop_ids` as `models.generation.generate` takes them."""
        return self.stop_ids if len(self.stop_ids) > 1 else self.eos_id

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

    def mark(self, token: str) -> str:
        """What stands for a special token in the texts of `encode_marked`: a name that nobody can write, another one in
        every process.

        Raises:
            ValueError: there is no special token of this name.
        """
        raise ValueError(f"the tokenizer {self.name} has no special token {token}")

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts with special tokens in them, by the names that `mark` gives them."""
        raise NotImplementedError

    def decode_marked(self, ids: Iterable[int]) -> str:
        """The reverse of `encode_marked`."""
        raise NotImplementedError

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
    def for_transformers(self) -> "PreTrainedTokenizerBase":
        """A tokenizer of `transformers` with the same ids, whoever asks for it may change it."""

    def export_huggingface(
        self, folder: str | Path, max_length: int = 1024, chat_template: str = "", own_pad: bool = False
    ) -> int:
        """Writes a tokenizer that `transformers.AutoTokenizer.from_pretrained(folder)` loads, with the same ids.

        Args:
            folder: made if it is not there.
            max_length: tokens that the model reads; longer texts are cut there, at their start, when that is asked for.
            chat_template: Jinja, for `apply_chat_template`.
            own_pad: padding is a token that no text has, and on the right, as who reads a row's last token needs it.
                Otherwise EOS pads where the tokenizer has no padding, and on the left, as who goes on with a row needs
                it.

        Returns:
            The id of padding in the export.
        """
        tokenizer = self.for_transformers()
        if own_pad and tokenizer.pad_token in (None, tokenizer.eos_token):
            tokenizer.add_special_tokens({"pad_token": PAD_TEXT})
        elif tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right" if own_pad else "left"
        tokenizer.truncation_side = "left"
        tokenizer.model_max_length = max_length
        tokenizer.clean_up_tokenization_spaces = False
        # Of these, only what the tokenizer was made with is saved.
        saved = ("padding_side", "truncation_side", "clean_up_tokenization_spaces")
        tokenizer.init_kwargs |= {name: getattr(tokenizer, name) for name in saved}
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(str(folder))
        return int(tokenizer.pad_token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids (a list, an array or a 1-D tensor); those that end it and PAD are left out.

        Bytes that are not UTF-8, as in a character cut in the middle, come out as U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary and is not PAD.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
        for i in ids:
            if not 0 <= i <= self.vocab_size:
                raise ValueError(f"id {i} is not in the vocabulary of {self.name}: 0 .. {self.vocab_size - 1}")
        return self._decode([i for i in ids if i not in (*self.stop_ids, self.pad_id)])

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
