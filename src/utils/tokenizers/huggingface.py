"""A tokenizer folder of `transformers`, of whatever model family.

Byte-level BPE, BPE with byte fallback (SentencePiece's, as LLaMA has it), Unigram and word pieces are all encoded by
the `tokenizers` library, from a copy that knows no special token: see `_plain_encoder`.
"""

import contextlib
import copy
import datetime
import importlib.util
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokenizers import Tokenizer as Backend

from config.user_error import UserError
from utils.hub import LFS_POINTER, is_lfs_pointer
from utils.tokenizers.bpe import byte_alphabet
from utils.tokenizers.interface import Tokenizer, vocabulary_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TRACES = (*_FILES, "tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
# What tells two readings of one tokenizer.json apart: line breaks, digits, an apostrophe, letters beyond ASCII, spaces.
_PROBE = "\n\nHuman: It's 1234  na\u00efve?\n\nAssistant: Yes."

_DAY = datetime.datetime(2024, 7, 26)  # what Llama 3.2's template writes where it cannot know the date


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer, be they enough to load it or not."""
    return any((folder / name).is_file() for name in _TRACES)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer folder of `transformers`, of whatever model family.

    Ids are those of `transformers` with `add_special_tokens=False`, but for two things. Text is never special. And
    where a tokenizer puts a space before every text (SentencePiece's dummy prefix), a text that starts with one
    continues another: that space is the prefix. So ids of prompt and response, joined, are those of the joined text.
    """

    kind = "huggingface"

    def __init__(self, folder: str | Path, name: str = ""):
        """Loads the folder, without any network. `name`: what it is called; the folder's name where not given.

        Raises:
            UserError: the folder holds no usable tokenizer, or one without an EOS token.
        """
        path = Path(folder)
        self._tokenizer = _load(path)
        if self._tokenizer.eos_token_id is None:
            raise UserError(f'tokenizer {path}: has no EOS token; set "eos_token" in its tokenizer_config.json')
        self.name = name or path.name
        self.eos_id = int(self._tokenizer.eos_token_id)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(len(self._tokenizer), max(self._vocabulary.values(), default=-1) + 1)
        description = _description(self._tokenizer)
        self._encoder, self._marks = _plain_encoder(description) if description else (None, {})
        self._has_prefix = "Prepend" in [step["type"] for step in _steps(description.get("normalizer"), "normalizers")]
        if self.eos_id in self.encode(self._tokenizer.eos_token):
            raise UserError(
                f'tokenizer {path}: takes the text "{self._tokenizer.eos_token}" for EOS, so that anybody\'s text '
                "could end a response; save it as a tokenizer.json (`save_pretrained` of its fast class)"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if not texts:
            return []
        if self._encoder is not None:
            texts = [text.removeprefix(" ") for text in texts] if self._has_prefix else list(texts)
            return [encoding.ids for encoding in self._encoder.encode_batch(texts, add_special_tokens=False)]
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return [list(ids) for ids in self._tokenizer(list(texts), verbose=False, **options)["input_ids"]]

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens that a prompt template may have as marks."""
        return list(self._marks)

    @property
    def writable_tokens(self) -> list[str]:
        """Tokens that were added to the vocabulary without being special, so that every text may give them."""
        return [token for token in self._tokenizer.get_added_vocab() if token not in self._marks]

    def mark(self, token: str) -> str:
        """See `Tokenizer.mark`."""
        return self._marks[token] if token in self._marks else super().mark(token)

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_marked`. The ids are those of transformers for the text with the tokens in it."""
        return [encoding.ids for encoding in self._encoder.encode_batch(list(texts), add_special_tokens=False)]

    def decode_marked(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode_marked`."""
        return self._encoder.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how a dialogue is written for its model."""
        return bool(self._tokenizer.chat_template)

    def chat_text(self, messages: Sequence[dict[str, str]], ask: bool) -> str:
        """A dialogue as the folder's chat template writes it, with the cue to answer behind it where `ask` is true.

        It is always the same day to the template: with today's date, prompts of tomorrow would be others.

        Raises:
            Exception: of many kinds, from transformers and Jinja, where the template refuses it or is broken.
        """
        day = {"date_string": _DAY.strftime("%d %b %Y"), "strftime_now": _DAY.strftime}
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **day)

    def with_eos(self, token: str) -> Self:
        """The same tokenizer with another of its special tokens as EOS, also when it is saved."""
        if token == self._tokenizer.eos_token:
            return self
        other = copy.copy(self)
        other._tokenizer = copy.deepcopy(self._tokenizer)
        other._tokenizer.eos_token = token
        other.eos_id = int(other._tokenizer.eos_token_id)
        return other

    def with_stops(self, folder: Path) -> Self:
        """The same tokenizer with the ids at which the model in a folder ends by its own configuration.

        Of these only special tokens: config.json may name GPT-2's EOS by default, whatever the vocabulary is.
        """
        special = {self._vocabulary[token] for token in self._marks}
        found: list[Any] = []
        for name in ("generation_config.json", "config.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
                found += ids if isinstance(ids, list) else [ids]
        other = copy.copy(self)
        other.other_stop_ids = tuple(dict.fromkeys(i for i in found if type(i) is int and i in special))
        return other

    def tokens_from(self, first: int) -> list[str]:
        """The tokens with an id of `first` or more, in order."""
        return sorted((token for token, i in self._vocabulary.items() if i >= first), key=self._vocabulary.get)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def _sha256(self) -> str:
        description = _description(self._tokenizer)
        same_as_tiktoken = _gpt2_style_vocabulary(description, self._tokenizer.eos_token)
        if same_as_tiktoken is not None:
            return vocabulary_sha256(same_as_tiktoken)
        rules = [description.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        by_id = {i: token.encode("utf-8", "surrogatepass") for token, i in self._vocabulary.items()}
        return vocabulary_sha256(by_id, json.dumps(rules, sort_keys=True))

    def _save_files(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))

    def for_transformers(self) -> "PreTrainedTokenizerBase":
        """See `Tokenizer.for_transformers`. What puts BOS or EOS around a text by itself is left out: models are
        trained without."""
        from tokenizers import processors

        tokenizer = copy.deepcopy(self._tokenizer)
        for option in ("add_bos_token", "add_eos_token"):
            tokenizer.init_kwargs.pop(option, None)
        if hasattr(tokenizer, "backend_tokenizer"):
            # The one post-processor that adds nothing; with none at all transformers makes its own.
            nothing = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
            tokenizer.backend_tokenizer.post_processor = nothing
        return tokenizer


def _load(path: Path) -> Any:
    """transformers' tokenizer of a folder; UserError where it has none that can be loaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without this, transformers makes an empty tokenizer of one token out of a folder that has a model's config alone.
    if not any((path / name).is_file() for name in _FILES):
        there = [name for name in _TRACES if (path / name).is_file()]
        alone = f" ({' and '.join(there)} alone {'make' if len(there) > 1 else 'makes'} none)" if there else ""
        raise UserError(f"tokenizer {path}: has none of the files {', '.join(_FILES)}{alone}")
    pointer = next((n for n in _TRACES if (path / n).is_file() and is_lfs_pointer(path / n)), None)
    if pointer:
        raise UserError(f"tokenizer {path}: {pointer} {LFS_POINTER}")
    file = path / "tokenizer.json"
    unread = [name for name in _SENTENCEPIECE if (path / name).is_file()]
    if not file.is_file() and unread and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"tokenizer {path}: reading {unread[0]} takes the sentencepiece package; where that is installed, "
            f"`AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})` writes the tokenizer.json "
            "that is read here"
        )
    try:
        with quiet_transformers():
            # Said aloud: unsaid, transformers asks on the terminal whether to run the folder's Python files.
            loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
            # Some classes build their own splitting from the vocabulary, whatever tokenizer.json says; GPT-2's is also
            # taken where no class is named. What the file says is what the model was trained with.
            own = isinstance(loaded, PreTrainedTokenizerFast) and type(loaded) is not PreTrainedTokenizerFast
            if own and file.is_file() and _probe(loaded.backend_tokenizer) != _probe(Backend.from_file(str(file))):
                loaded = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds, down to plain Exception, for a broken folder
        if "trust_remote_code" in str(error):
            raise UserError(
                f"tokenizer {path}: needs Python code of its own (auto_map), which is never run; save it as a "
                "plain tokenizer.json"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {path}: transformers cannot load it ({type(error).__name__}: {reason})") from None
    if not set(loaded.get_vocab()) - set(loaded.get_added_vocab()):
        raise UserError(
            f"tokenizer {path}: {type(loaded).__name__} finds no vocabulary in it; name the class that does as "
            '"tokenizer_class" in its tokenizer_config.json (BertTokenizer for a vocab.txt)'
        )
    return loaded


def _probe(backend: Backend) -> list[int]:
    backend.no_padding()
    backend.no_truncation()
    return backend.encode(_PROBE, add_special_tokens=False).ids


def _description(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of one of transformers' tokenizers; {} for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer; `inner` is where a sequence of them keeps its own."""
    if not step:
        return []
    return [s for part in step[inner] for s in _steps(part, inner)] if step["type"] == "Sequence" else [step]


def _plain_encoder(description: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """A tokenizer with the same ids that finds no special token in any text, and what it calls each of them.

    Not to look for them is not enough: Unigram and word-level models have them in the vocabulary that they cut texts
    into. So here they have names that nobody can write.
    """
    special = [token["content"] for token in description["added_tokens"] if token["special"]]
    names = {token: f"{secrets.token_hex(16)}-{i}" for i, token in enumerate(special)}
    added = [t | {"content": names.get(t["content"], t["content"])} for t in description["added_tokens"]]
    model = dict(description["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = (tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & set(names)]
    plain = {"added_tokens": added, "model": model, "post_processor": None, "truncation": None, "padding": None}
    return Backend.from_str(json.dumps(description | plain)), names


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without warnings and bars: what matters of them is told by who calls it, in one line."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _gpt2_style_vocabulary(tokenizer: dict[str, Any], eos_text: str) -> dict[int, bytes] | None:
    """The bytes of every id, if a tokenizer.json gives the ids that tiktoken would give with GPT-2's pattern; otherwise
    None.

    That holds when it splits as GPT-2 does, normalises nothing, adds no token but EOS, and merges in the order of the
    ids.
    """
    model, split = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    special_rules = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    has_gpt2_rules = (
        (model.get("type"), split.get("type"), tokenizer.get("normalizer")) == ("BPE", "ByteLevel", None)
        and not split.get("add_prefix_space")
        and split.get("use_regex", True)
        and [token["content"] for token in tokenizer.get("added_tokens") or []] == [eos_text]
        and not any(model.get(key) for key in special_rules)
    )
    if not has_gpt2_rules:
        return None
    to_byte = {character: byte for byte, character in byte_alphabet().items()}
    by_id = {tokenizer["added_tokens"][0]["id"]: eos_text.encode()}
    for token, i in model["vocab"].items():
        if any(character not in to_byte for character in token):
            return None
        if token != eos_text:
            by_id[i] = bytes(to_byte[character] for character in token)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = [model["vocab"].get("".join(pair), -1) for pair in pairs]
    is_in_order = all(a < b for a, b in zip(merged, merged[1:], strict=False)) and -1 not in merged
    singles = sum(len(token) == 1 for token in by_id.values())
    return by_id if is_in_order and singles == 256 and len(merged) + singles + 1 == len(by_id) else None
