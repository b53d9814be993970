"""One interface over three tokenizers: GPT-2's own BPE (tiktoken), the demo's small BPE, and a Hugging Face folder.

Ids: 0 .. vocab_size - 1 are real and include EOS. PAD is the *virtual* id `vocab_size`: it stands in batches only, has
no row in any embedding table and is never EOS, so that a generated EOS cannot be mistaken for padding.

Nothing in a user's text is special: the characters "<|endoftext|>" are encoded letter by letter, never as EOS. No
tokenizer here adds a token of its own; who needs an EOS appends it.

Shapes: B texts, T tokens of the longest one.
"""

import base64
import binascii
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
import torch

from config.user_error import UserError

REPO_ROOT = Path(__file__).resolve().parents[2]
DEMO_RANKS = REPO_ROOT / "assets" / "demo" / "bpe.tiktoken"
EOS_TEXT = "<|endoftext|>"

# GPT-2's split of a text into words (openai/gpt-2 src/encoder.py) in the form in which tiktoken writes it, which is
# faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_FOLDER = "tokenizer"
_RANKS_FILE = "bpe.tiktoken"
_IDENTITY_FILE = "identity.json"
_HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


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
            max_length: longest length for `truncation`, width for `padding="max_length"`.
            truncation: cut to `max_length` tokens.
            truncation_side: "right" cuts the end, as in Hugging Face; "left" cuts the beginning (right for a prompt,
                whose end carries the cue to answer).
            padding: False, True or "longest" (to the longest of the batch), or "max_length".
            padding_side: "right" or "left".
            return_tensors: None for lists, "pt" for LongTensors.

        Returns:
            `input_ids` and `attention_mask` (1 on real tokens, 0 on PAD). For B texts: B lists, or tensors [B, T]. For
            one text: one flat list, or tensors [1, T].

        Raises:
            ValueError: an argument is not one of these, or ragged lists are asked for as a tensor.
        """
        _check_call(max_length, truncation, truncation_side, padding, padding_side, return_tensors)
        rows = self.encode_batch([text] if isinstance(text, str) else list(text))
        if truncation:
            rows = [
                row[:max_length] if truncation_side == "right" else row[max(0, len(row) - max_length) :] for row in rows
            ]
        masks = [[1] * len(row) for row in rows]
        if padding:
            width = max_length if padding == "max_length" else max(map(len, rows), default=0)
            rows = [_pad(row, self.pad_id, width, padding_side) for row in rows]
            masks = [_pad(mask, 0, width, padding_side) for mask in masks]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise ValueError("texts of different lengths make no tensor; set padding=True")
            width = len(rows[0]) if rows else 0
            return {
                "input_ids": torch.tensor(rows, dtype=torch.long).reshape(len(rows), width),
                "attention_mask": torch.tensor(masks, dtype=torch.long).reshape(len(rows), width),
            }
        if isinstance(text, str):
            return {"input_ids": rows[0], "attention_mask": masks[0]}
        return {"input_ids": rows, "attention_mask": masks}

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
        target = Path(folder) / _FOLDER
        target.mkdir(parents=True, exist_ok=True)
        self._save_files(target)
        (target / _IDENTITY_FILE).write_text(json.dumps(self.identity(), indent=2) + "\n", encoding="utf-8")


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
        return _vocabulary_sha256(
            {rank: token for token, rank in self.ranks.items()} | {self.eos_id: EOS_TEXT.encode()}
        )

    def _save_files(self, folder: Path) -> None:
        write_ranks(folder / _RANKS_FILE, self.ranks)

    def export_huggingface(self, folder: str | Path) -> None:
        """See `Tokenizer.export_huggingface`."""
        from utils.tokenizers.export import write_huggingface_bpe

        write_huggingface_bpe(Path(folder), self.ranks, EOS_TEXT)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer folder of `transformers`, of whatever model family."""

    kind = "huggingface"

    def __init__(self, folder: str | Path):
        """Loads the folder, without any network.

        Raises:
            UserError: the folder holds no usable tokenizer, or one without an EOS token.
        """
        from transformers import AutoTokenizer

        path = Path(folder)
        # Without this, transformers makes an empty tokenizer of one token out of a folder that has a model's config
        # alone.
        if not any((path / name).is_file() for name in _HUGGINGFACE_FILES):
            raise UserError(f"tokenizer {path}: has none of the files {', '.join(_HUGGINGFACE_FILES)}")
        try:
            # Said aloud: unsaid, transformers asks on the terminal whether to run the folder's Python files.
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds, down to plain Exception, for a broken folder
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"tokenizer {path}: needs Python code of its own (auto_map), which is never run; save it as a "
                    "plain tokenizer.json"
                ) from None
            raise UserError(
                f"tokenizer {path}: transformers cannot load it ({type(error).__name__}: {str(error)[:200]})"
            ) from None
        if self._tokenizer.eos_token_id is None:
            raise UserError(f'tokenizer {path}: has no EOS token; set "eos_token" in its tokenizer_config.json')
        self.name = path.name
        self.eos_id = int(self._tokenizer.eos_token_id)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(len(self._tokenizer), max(self._vocabulary.values(), default=-1) + 1)
        if self.eos_id in self.encode(self._tokenizer.eos_token):
            raise UserError(
                f'tokenizer {path}: takes the text "{self._tokenizer.eos_token}" for EOS; mark it "special": true in '
                "tokenizer.json, so that nobody's text can end a response"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if not texts:
            return []
        options = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_attention_mask": False,
            "verbose": False,
        }
        return [list(ids) for ids in self._tokenizer(list(texts), **options)["input_ids"]]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def _sha256(self) -> str:
        from utils.tokenizers.export import gpt2_style_vocabulary

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        description = json.loads(backend.to_str()) if backend is not None else {}
        same_as_tiktoken = gpt2_style_vocabulary(description, self._tokenizer.eos_token)
        if same_as_tiktoken is not None:
            return _vocabulary_sha256(same_as_tiktoken)
        rules = [description.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        by_id = {i: token.encode("utf-8", "surrogatepass") for token, i in self._vocabulary.items()}
        return _vocabulary_sha256(by_id, json.dumps(rules, sort_keys=True))

    def _save_files(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))

    def export_huggingface(self, folder: str | Path) -> None:
        """See `Tokenizer.export_huggingface`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(str(folder))


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by name or folder.

    Args:
        name_or_path: "gpt2" (GPT-2's BPE, from tiktoken's cache or the network), "demo" (ships in assets/demo), or a
            folder: one that `Tokenizer.save` wrote into, or a Hugging Face tokenizer.

    Raises:
        UserError: no such tokenizer, or it cannot be read.
    """
    name = str(name_or_path)
    if name == "gpt2":
        return TiktokenTokenizer("gpt2", _gpt2_ranks())
    if name == "demo":
        if not DEMO_RANKS.is_file():
            raise UserError(f"tokenizer demo: {DEMO_RANKS} is missing; restore it with `python src/utils/demo/make.py`")
        return _from_ranks_file("demo", DEMO_RANKS, kind="demo")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        saved = _saved_folder(path)
        return load_tokenizer(path) if saved else HuggingFaceTokenizer(path)
    raise UserError(
        f"tokenizer {name}: not known; choose gpt2, demo, or the path of a folder with a Hugging Face tokenizer"
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Restores what `Tokenizer.save` wrote into a checkpoint folder, and checks that it is unaltered.

    Raises:
        UserError: the folder has no tokenizer, or its files do not match the recorded identity.
    """
    saved = _saved_folder(Path(folder))
    if saved is None:
        raise UserError(f"{folder}: has no {_FOLDER}/{_IDENTITY_FILE}; a checkpoint carries its tokenizer there")
    try:
        identity = json.loads((saved / _IDENTITY_FILE).read_text(encoding="utf-8"))
        kind, name, sha256 = (identity[key] for key in ("kind", "name", "sha256"))
        if not all(isinstance(value, str) for value in (kind, name, sha256)):
            raise TypeError("kind, name and sha256 are strings")
        if kind not in (HuggingFaceTokenizer.kind, "tiktoken", "demo"):
            raise ValueError(f"no tokenizer is of the kind {kind!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{saved / _IDENTITY_FILE}: is not the identity of a tokenizer ({type(error).__name__}: {error})"
        ) from None
    if kind == HuggingFaceTokenizer.kind:
        tokenizer: Tokenizer = HuggingFaceTokenizer(saved)
        tokenizer.name = name
    else:
        tokenizer = _from_ranks_file(name, saved / _RANKS_FILE, kind)
    if tokenizer.identity()["sha256"] != sha256:
        raise UserError(
            f"{saved}: the vocabulary is not the one recorded in {_IDENTITY_FILE}; it was altered or mixed up"
        )
    _check_model(Path(folder) / "model.json", tokenizer)
    return tokenizer


def _check_model(path: Path, tokenizer: Tokenizer) -> None:
    """Ids mean what the model beside the tokenizer learned: its model.json, if there is one, names this tokenizer.

    Raises:
        UserError: it names another one, or one of another size.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        recorded, size = description.get("tokenizer"), description["model"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # not a model folder of ours; who loads the model tells what is wrong with it
    if isinstance(recorded, dict) and recorded.get("sha256") != tokenizer.identity()["sha256"]:
        raise UserError(f"{path.parent}: its tokenizer is not the one that model.json names; put the model's own back")
    if size != tokenizer.vocab_size:
        has = f"its tokenizer has {tokenizer.vocab_size} ids and its model {size}"
        raise UserError(f"{path.parent}: {has}; put the model's own back")


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
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: a line of a tiktoken vocabulary is `base64 rank`") from None
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Writes what `read_ranks` reads, in the order of the ranks."""
    lines = [
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    path.write_bytes(b"".join(lines))


def _from_ranks_file(name: str, path: Path, kind: str) -> TiktokenTokenizer:
    ranks = read_ranks(path)
    try:
        return TiktokenTokenizer(name, ranks, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _gpt2_ranks() -> dict[bytes, int]:
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # requests, OS and value errors alike: none of them would tell the user what to do
        raise UserError(
            "tokenizer gpt2: its vocabulary is not on this machine and could not be downloaded "
            f"({type(error).__name__}); go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None


def _saved_folder(folder: Path) -> Path | None:
    """The folder with an identity: the given one or its tokenizer/ subfolder."""
    for candidate in (folder / _FOLDER, folder):
        if (candidate / _IDENTITY_FILE).is_file():
            return candidate
    return None


def _vocabulary_sha256(by_id: dict[int, bytes], rules: str = "") -> str:
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
