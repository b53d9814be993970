"""Between tiktoken's form of a byte-level BPE (bytes with ranks) and Hugging Face's (printable characters with a merge
list)."""

from pathlib import Path
from typing import Any

MODEL_MAX_LENGTH = 1024
"""GPT-2's context, as its own tokenizer_config.json says. Only a hint: nothing here truncates by it."""


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


def write_huggingface_bpe(folder: Path, ranks: dict[bytes, int], eos_text: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt; the id of EOS is the one after the last
    rank."""
    from tokenizers import processors
    from transformers import GPT2Tokenizer

    alphabet = byte_alphabet()

    def shown(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    tokenizer = GPT2Tokenizer(
        vocab={shown(token): rank for token, rank in ranks.items()} | {eos_text: len(ranks)},
        merges=[(shown(left), shown(right)) for left, right in recover_merges(ranks)],
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), eos_text),
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.save_pretrained(str(folder))
    backend.model.save(str(folder))


def gpt2_style_vocabulary(tokenizer: dict[str, Any], eos_text: str) -> dict[int, bytes] | None:
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
