"""Texts that end a response, such as "\\n\\nHuman:". Tokens do not end where texts do, so the text is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """Ends a row as soon as its response contains one of `strings`.

    decode: token ids to text, of the model's own tokenizer.

    Raises:
        ValueError: no string, or an empty one, which every response contains.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def __post_init__(self) -> None:
        if isinstance(self.strings, str) or not self.strings or not all(self.strings):
            raise ValueError(f"stop strings must be a tuple of at least one text, none of them empty: {self.strings!r}")

    @property
    def window(self) -> int:
        """How many of the newest tokens hold every string that the newest ends: a token is at least a byte."""
        return max(len(text.encode("utf-8", "surrogatepass")) for text in self.strings)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether a string ends in the last token of a response; `ids` are its newest `window` tokens, or all."""
        text = self.decode(ids)
        return any(s in text for s in self.strings)

    def cut(self, text: str) -> str:
        """A response without its first stop string and what is behind that."""
        return text[: min([at for s in self.strings if (at := text.find(s)) >= 0], default=len(text))]
