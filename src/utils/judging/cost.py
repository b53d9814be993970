"""What asking a language model costs, and the limit that stops before it is passed."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from config.user_error import UserError
from utils.runs.folder import REPO

PRICE_FILE = REPO / "assets" / "judge_prices.json"

_CHARACTERS_PER_TOKEN = 4.0  # of English text; for the estimate only
_EXTRA_INPUT_TOKENS = 120  # the schema and the frame around each message
_OUTPUT_TOKENS = 8  # {"winner": "A"}


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """US dollars."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6

    def estimate(self, text: str) -> float:
        """US dollars that a call with this text is likely to cost."""
        return self.of(len(text) / _CHARACTERS_PER_TOKEN + _EXTRA_INPUT_TOKENS, _OUTPUT_TOKENS)

    def bound(self, text: str, max_tokens: int) -> float:
        """US dollars that no such call exceeds: every token of a byte-level vocabulary is at least one byte."""
        return self.of(len(text.encode()) + _EXTRA_INPUT_TOKENS, max_tokens)


@dataclass(frozen=True)
class PriceList:
    """Prices by model, of OpenAI's own server. as_of: when they were looked up."""

    as_of: str
    models: dict[str, Price]


def read_prices(path: Path = PRICE_FILE) -> PriceList:
    """The file of prices, US dollars per million tokens, standard tier, [input, output]; discounts for cached input are
    not counted on. UserError where it cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {name: Price(float(low), float(high)) for name, (low, high) in content["models"].items()}
        if not all(0 <= price.input < float("inf") and 0 <= price.output < float("inf") for price in models.values()):
            raise ValueError
        return PriceList(str(content["as_of"]), models)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{path}: no list of prices; it must be {{"as_of": ..., "models": {{MODEL: [INPUT, OUTPUT]}}}} in US '
            "dollars per million tokens; put the file back, or give --judge-price"
        ) from None


class Budget:
    """Adds up what calls cost and says no to one that could pass the limit; threads may share it.

    A call is reserved at its bound before it is made and settled at what the server says it used.
    """

    def __init__(self, price: Price | None, limit: float | None) -> None:
        """`price` None: nothing is added up. A limit needs a price and must be positive (UserError)."""
        if limit is not None and not limit > 0:
            raise UserError(f"--max-cost {limit}: give US dollars above 0")
        if limit is not None and price is None:
            raise UserError("--max-cost: the price of this judge is not known; give --judge-price, or leave it out")
        self.price, self.limit = price, limit
        self.input_tokens = self.output_tokens = 0
        self._settled, self._reserved, self._in_flight = 0.0, 0.0, 0
        self._changed = threading.Condition()

    @property
    def spent(self) -> float | None:
        """US dollars so far; None when the price is not known."""
        return None if self.price is None else self._settled

    def reserve(self, bound: float) -> bool:
        """Whether a call of at most `bound` dollars may be made now.

        Bounds are far above what calls cost, so near the limit a call waits until those in flight are settled.
        """
        with self._changed:
            while self.limit is not None and self._settled + self._reserved + bound > self.limit:
                if not self._in_flight:
                    return False
                self._changed.wait()
            self._reserved += bound
            self._in_flight += 1
            return True

    def settle(self, bound: float, usage: tuple[int, int] | None, charged: bool = True) -> None:
        """End a reserved call.

        Args:
            bound: as reserved. usage: input and output tokens, as the server reports them.
            charged: False for a call that was refused. One that may be charged, without usage, counts at its bound.
        """
        with self._changed:
            self._reserved -= bound
            self._in_flight -= 1
            if usage is not None:
                self.input_tokens += usage[0]
                self.output_tokens += usage[1]
            if charged and self.price is not None:
                self._settled += bound if usage is None else self.price.of(*usage)
            self._changed.notify_all()
