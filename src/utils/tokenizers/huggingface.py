"""A tokenizer folder of `transformers`, of whatever model family."""

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.user_error import UserError
from utils.tokenizers.bpe import byte_alphabet
from utils.tokenizers.interface import Tokenizer, vocabulary_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


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
        if not any((path / name).is_file() for name in _FILES):
            raise UserError(f"tokenizer {path}: has none of the files {', '.join(_FILES)}")
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
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        description = json.loads(backend.to_str()) if backend is not None else {}
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
