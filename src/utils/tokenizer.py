"""The tokenizer of a name, a folder, a model or a checkpoint: GPT-2's own BPE, the demo's small one, or one in Hugging
Face's form.

All are a `Tokenizer` (utils/tokenizers/interface.py), with the same rules for EOS, PAD and special tokens.
"""

import json
from pathlib import Path

import tiktoken

from config.user_error import UserError
from utils.hub import hub_folder, is_hub_name, is_openai_gpt2
from utils.runs.folder import REPO, typed_path
from utils.tokenizers.bpe import EOS_TEXT, RANKS_FILE, TiktokenTokenizer, read_ranks
from utils.tokenizers.huggingface import HuggingFaceTokenizer, has_tokenizer
from utils.tokenizers.interface import IDENTITY_FILE, SAVED_FOLDER, Tokenizer

__all__ = [
    "EOS_TEXT", "HuggingFaceTokenizer", "TiktokenTokenizer", "Tokenizer", "get_tokenizer", "load_tokenizer",
    "model_tokenizer",
]  # fmt: skip

DEMO_FOLDER = REPO / "assets" / "demo"
DEMO_RANKS = DEMO_FOLDER / RANKS_FILE

_GPT2_IDS = 50257
_SAMPLE = "\n\nHuman: What is 2 + 2?\n\nAssistant: Zo\u00eb, it is 4."


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by name or folder.

    Args:
        name_or_path: "gpt2" (GPT-2's BPE, from tiktoken's cache or the network), "demo" (ships in assets/demo), a
            folder (one that `Tokenizer.save` wrote into, or a Hugging Face tokenizer), or the hub name of a model.

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
    path = typed_path(name)
    if path.is_dir():
        saved = _saved_folder(path)
        return load_tokenizer(path) if saved else HuggingFaceTokenizer(path)
    if is_hub_name(name):
        found = _from_hub(name)
        if found is None and not is_openai_gpt2(name):
            raise UserError(f"tokenizer {name}: the hub's model has none; choose gpt2, or a model with the same one")
        return found or get_tokenizer("gpt2")
    raise UserError(
        f"tokenizer {name}: not known; choose gpt2, demo, a hub name (owner/name), or the path of a folder with a "
        "Hugging Face tokenizer"
    )


def model_tokenizer(model: str, folder: Path, rows: int, flag: str, choose: str = "") -> tuple[Tokenizer, str]:
    """The tokenizer that a model in Hugging Face's form was trained with, and a line on it where there is one to say.

    It is the model's own. GPT-2's is taken instead only where nothing else can be meant: the model is one of OpenAI's
    by name, or the folder has no file of a tokenizer and the token table has GPT-2's number of rows, padded or not.

    Args:
        model: the folder or hub name. folder: where its config.json lies; of a hub name in the hub's cache.
        rows: of its token table.
        flag: what named it, for the error. choose: a remedy to go behind that of the folder, such as a flag.

    Raises:
        UserError: its tokenizer cannot be loaded, is larger than the table, or there is none and GPT-2's is no guess.
    """
    is_folder = typed_path(model).is_dir()
    if has_tokenizer(folder) or _saved_folder(folder):
        tokenizer = get_tokenizer(folder) if is_folder else HuggingFaceTokenizer(folder, model)
        if tokenizer.vocab_size > rows:
            extra = tokenizer.tokens_from(rows) if isinstance(tokenizer, HuggingFaceTokenizer) else []
            remedy = "put the model's own there"
            if 0 < len(extra) <= 8:
                remedy = f"take what was added ({', '.join(extra)}) out of its tokenizer.json, or enlarge the table"
            raise UserError(
                f"{flag}: its tokenizer has {tokenizer.vocab_size} ids, its token table {rows} rows; {remedy}"
            )
        if isinstance(tokenizer, HuggingFaceTokenizer):
            tokenizer = tokenizer.with_stops(folder)
        return tokenizer, tokenizer_note(tokenizer, rows)
    if not is_folder and is_openai_gpt2(model):
        return get_tokenizer("gpt2"), f"tokenizer: GPT-2's, which is that of {model} by definition"
    if is_folder and _is_padding(rows, _GPT2_IDS):
        return get_tokenizer("gpt2"), f"tokenizer: GPT-2's, because {model} has none and {rows} rows in its token table"
    where = f"{folder} has" if is_folder else "the hub's cache has"
    size = f"its token table of {rows} rows is not of GPT-2's size" if is_folder else "GPT-2's need not be its own"
    raise UserError(f"{flag}: {where} no tokenizer for it, and {size}; put its tokenizer.json there{choose}")


def tokenizer_note(tokenizer: Tokenizer, rows: int) -> str:
    """What is to be told of a tokenizer for a token table of so many rows; "" when all is as expected."""
    notes = []
    if tokenizer.vocab_size < rows and not _is_padding(rows, tokenizer.vocab_size):
        notes.append(f"has {tokenizer.vocab_size} ids, the token table {rows} rows: is it the model's own?")
    back = tokenizer.decode(tokenizer.encode(_SAMPLE))
    if back != _SAMPLE:
        notes.append(f"does not give texts back as they were: {_SAMPLE!r} comes back as {back!r}")
    return f"tokenizer {tokenizer.name}: " + "; ".join(notes) if notes else ""


def _is_padding(rows: int, ids: int) -> bool:
    """Whether a table of `rows` rows may be one of `ids` ids: as many, or rounded up to a multiple of 8, ..., 1024."""
    return any(rows == -(-ids // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128, 256, 512, 1024))


def _from_hub(name: str) -> Tokenizer | None:
    """The tokenizer of a hub's model; None where the model has none, or is OpenAI's GPT-2 and cannot be looked at."""
    try:
        folder = hub_folder(name)
    except UserError as error:
        if is_openai_gpt2(name):
            return None
        raise UserError(f"tokenizer {error}") from None
    return HuggingFaceTokenizer(folder, name) if has_tokenizer(folder) else None


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
    if (tokenizer.identity()["sha256"], tokenizer.eos_id) != (sha256, identity.get("eos_id", tokenizer.eos_id)):
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
