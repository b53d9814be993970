"""The tokenizer of a GGUF file, from and to a tokenizer.json.

A GGUF file has tokens, their types, and merges or scores, but how text is split before that it only names
(`tokenizer.ggml.pre`). transformers' own reader goes by GPT-2's splits where it does not know the name, SmolLM2's for
one: a number behind a line end and a space is then read otherwise than in training. So the splits are written out here,
and an unknown name is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from config.user_error import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # what tokenizer.ggml.token_type says of a token

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_NAMES = {"default": "gpt-2", "gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPACE = "\u2581"  # SentencePiece's mark


def splits() -> dict[str, pre_tokenizers.PreTokenizer]:
    """How text is cut before merging, by the name that a GGUF file gives: one token of each piece at least."""
    parts = pre_tokenizers
    return {
        "gpt-2": parts.ByteLevel(add_prefix_space=False),
        "smollm": parts.Sequence([parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]),
        "llama-bpe": parts.Sequence(
            [parts.Split(Regex(_LLAMA3), "isolated"), parts.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    }


def read_tokenizer(metadata: dict[str, Any], rows: int, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describe; its ids are the file's.

    Args:
        metadata: key -> value. rows: of the token table. context: tokens, what the tokenizer calls its longest text.

    Raises:
        UserError: there is none, it is of a kind that is not read, or what there is does not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    tokens, kind = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise UserError("has no tokenizer; take a file that was made with one")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or len(tokens) > rows:
        raise UserError("its list of tokens is damaged, or not that of its token table; copy it again")
    while types[-1] == UNUSED:  # rows that only fill the table
        tokens, types = tokens[:-1], types[:-1]
    if kind == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens), False
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise UserError(f"its tokenizer is of kind {kind}; gpt2 (byte-level BPE) and llama (SentencePiece) are known")
    named = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    named = {role: i for role, i in named.items() if i is not None}
    if any(i >= len(tokens) for i in named.values()):
        raise UserError(f"its {', '.join(named)} are not all tokens of its; copy it again")
    special = {*named.values(), *(i for i, what in enumerate(types) if what in (CONTROL, UNKNOWN))}
    plain = [i for i, what in enumerate(types) if what == USER_DEFINED and i not in special]
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    backend.add_tokens([AddedToken(tokens[i], normalized=False) for i in plain])
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos or split_name(metadata) == "llama-bpe")
    if adds_bos and "bos_token" in named:
        bos = tokens[named["bos_token"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, named["bos_token"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=context, clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"), **{role: tokens[i] for role, i in named.items()},
    )  # fmt: skip


def split_name(metadata: dict[str, Any]) -> str:
    """`tokenizer.ggml.pre`, the same name for the same splits."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    return _NAMES.get(name, name)


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    name, known = split_name(metadata), splits()
    if name not in known:
        raise UserError(f"its tokenizer splits text as {name} does; {', '.join(known)} are known here")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not merges or any(len(pair) != 2 or "".join(pair) not in vocabulary for pair in merges):
        raise UserError("its merges are missing, or not those of its tokens; copy it again")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = known[name], decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """BPE with byte fallback, as LLaMA 1 and 2 have it; merges follow from the scores."""
    from transformers.tokenization_utils_base import generate_merges

    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) < len(tokens):
        raise UserError("its tokens have no scores; copy it again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = {token: scores[i] for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED)}
    unknown = next((tokens[i] for i, what in enumerate(types) if what == UNKNOWN), None)
    merges = generate_merges(vocabulary, ranked, {t for t, what in zip(tokens, types) if what in (CONTROL, UNKNOWN)})
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    pieces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        pieces.append(decoders.Strip(" ", 1, 0))
    backend.normalizer, backend.decoder = spaces, decoders.Sequence(pieces)
    return backend


def write_tokenizer(writer: GGUFWriter, folder: Path, rows: int, stops: list[int]) -> None:
    """Write a folder's tokenizer and chat template as metadata, with a name for each of `rows` of the token table.

    `stops`: ids that end a text or a turn; beside the tokenizer's EOS a GGUF file has a place for two.

    Raises:
        UserError: it is of a kind that has no name in a GGUF file, or none that is known here.
    """
    from transformers import PreTrainedTokenizerFast

    # The class that takes tokenizer.json as it is: others make splits of their own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    name = _split_name_of(description)
    special = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in description["added_tokens"]}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise UserError(f"its tokenizer has {max(by_id) + 1} ids, its token table {rows} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([special.get(i, NORMAL) if i in by_id else UNUSED for i in range(rows)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]])
    for role, key in _ROLES.items():
        if (i := getattr(tokenizer, f"{role}_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    others = [i for i in dict.fromkeys(stops) if i != tokenizer.eos_token_id]
    if len(others) > 2:
        raise UserError(f"has {len(others) + 1} ids of EOS; a GGUF file holds three")
    for role, i in zip(("eot", "eom"), others):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_name_of(description: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text; UserError where it has none that is known here."""
    model, backend = description["model"], Tokenizer(models.BPE())
    is_plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if not is_plain or description["normalizer"] is not None:
        what = model["type"] if is_plain or model["type"] != "BPE" else "BPE with byte fallback or affixes"
        raise UserError(f"its tokenizer is {what}, not a plain byte-level BPE without a normalizer; no GGUF file of it")
    for name, split in splits().items():
        backend.pre_tokenizer = split
        known = json.loads(backend.to_str())["pre_tokenizer"]
        if _steps(description["pre_tokenizer"]) == _steps(known):
            if bool(model.get("ignore_merges")) == (name == "llama-bpe"):
                return name
            raise UserError(f'its tokenizer.json has "ignore_merges": {model["ignore_merges"]}, unlike {name}')
    found = [step.get("type") for step in _steps(description["pre_tokenizer"])]
    raise UserError(
        f"its tokenizer.json cuts text by {', '.join(map(str, found)) or 'nothing'}, as none of {', '.join(splits())} "
        "does, which are known here"
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre_tokenizer without what changes no token."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [s for part in step["pretokenizers"] for s in _steps(part)]
    return [{"use_regex": True} | {key: value for key, value in step.items() if key != "trim_offsets"}]
