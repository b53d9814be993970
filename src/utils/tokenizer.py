"""The tokenizer of a name, a folder or a checkpoint: GPT-2's own BPE, the demo's small one, or a Hugging Face folder.

All are a `Tokenizer` (utils/tokenizers/interface.py), with the same rules for EOS, PAD and special tokens.
"""

import json
import os
from pathlib import Path

import tiktoken

from config.user_error import UserError
from utils.runs.folder import REPO
from utils.tokenizers.bpe import EOS_TEXT, RANKS_FILE, TiktokenTokenizer, read_ranks
from utils.tokenizers.huggingface import HuggingFaceTokenizer
from utils.tokenizers.interface import IDENTITY_FILE, SAVED_FOLDER, Tokenizer

__all__ = [
    "EOS_TEXT", "HuggingFaceTokenizer", "TiktokenTokenizer", "Tokenizer", "get_tokenizer", "load_tokenizer",
    "tokenizer_beside",
]  # fmt: skip

DEMO_FOLDER = REPO / "assets" / "demo"
DEMO_RANKS = DEMO_FOLDER / RANKS_FILE


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


def tokenizer_beside(model: str | Path) -> Tokenizer:
    """The tokenizer in the folder of a Hugging Face model; GPT-2's where it has none, or the model is a hub's name."""
    folder = Path(model).expanduser()
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return get_tokenizer(folder if has_own else "gpt2")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Restores what `Tokenizer.save` wrote into a checkpoint folder, and checks that it is unaltered.

    Raises:
        UserError: the folder has no tokenizer, or its files do not match the recorded identity.
    """
    saved = _saved_folder(Path(folder))
    if saved is None:
        raise UserError(f"{folder}: has no {SAVED_FOLDER}/{IDENTITY_FILE}; a checkpoint carries its tokenizer there")
    try:
        identity = json.loads((saved / IDENTITY_FILE).read_text(encoding="utf-8"))
        kind, name, sha256 = (identity[key] for key in ("kind", "name", "sha256"))
        if not all(isinstance(value, str) for value in (kind, name, sha256)):
            raise TypeError("kind, name and sha256 are strings")
        if kind not in (HuggingFaceTokenizer.kind, "tiktoken", "demo"):
            raise ValueError(f"no tokenizer is of the kind {kind!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{saved / IDENTITY_FILE}: is not the identity of a tokenizer ({type(error).__name__}: {error})"
        ) from None
    if kind == HuggingFaceTokenizer.kind:
        tokenizer: Tokenizer = HuggingFaceTokenizer(saved)
        tokenizer.name = name
    else:
        tokenizer = _from_ranks_file(name, saved / RANKS_FILE, kind)
    if tokenizer.identity()["sha256"] != sha256:
        raise UserError(
            f"{saved}: the vocabulary is not the one recorded in {IDENTITY_FILE}; it was altered or mixed up"
        )
    _check_model(Path(folder) / "model.json", tokenizer)
    return tokenizer


def _check_model(path: Path, tokenizer: Tokenizer) -> None:
    """Ids mean what the model beside the tokenizer learned: its model.json, if there is one, names this tokenizer."""
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
    for candidate in (folder / SAVED_FOLDER, folder):
        if (candidate / IDENTITY_FILE).is_file():
            return candidate
    return None
