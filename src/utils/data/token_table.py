"""Rows as token ids in a few flat arrays, cut to length.

Shapes: N rows, M completions over all rows, P distinct prompts (counted once per row), K completions of one row.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm import tqdm

from utils.data.rows import Row
from utils.tokenizer import Tokenizer

MAX_CHARACTERS_PER_TOKEN = 128
"""The longest token of GPT-2 has 128 characters, so a longer text than this times the budget cannot fit, and is not
tokenised."""

_CHUNK = 2048  # rows tokenised at a time: enough for the batch API, little enough for memory and a smooth progress bar


@dataclass(frozen=True)
class LengthLimits:
    """Budgets in tokens, and the least that has to be left of a prompt."""

    max_length: int
    """Prompt, response and EOS together."""
    max_prompt_length: int | None
    """Prompt alone; None leaves it to `max_length`."""
    cue_length: int
    """Tokens of the prompt's last line, the cue to answer: a prompt cut to fewer would ask for nothing."""


@dataclass
class Counts:
    """What became of the rows; every row read is in exactly one of kept, dropped, bad, empty, elsewhere."""

    read: int = 0
    kept: int = 0
    dropped: int = 0
    """A response that does not fit with its EOS, or leaves no room for its prompt."""
    bad: int = 0
    """Malformed, passed over."""
    empty: int = 0
    """Demonstrations that say nothing."""
    elsewhere: int = 0
    """Belong to another split or stage."""
    of_test: int = 0
    """Of those elsewhere: rows of the training data whose conversation is one of the data's own test split."""
    cut: int = 0
    """Of those kept: prompt shortened from the left."""
    duplicates: int = 0
    """Of those kept: the same text as an earlier row."""
    first_bad: str = ""
    """The message of the first bad row."""


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one array."""

    flat: np.ndarray
    """[total] int32, all ids end to end."""
    start: np.ndarray
    """[n + 1] int64, sequence i is flat[start[i]:start[i + 1]]."""

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.start[i] : self.start[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64."""
        return np.diff(self.start)

    def validate(self, vocab_size: int) -> None:
        """Raises ValueError unless the arrays have this form and every id is a real one."""
        _require(self.flat.dtype == np.int32 and self.start.dtype == np.int64, "types")
        _require(self.flat.ndim == self.start.ndim == 1 and len(self.start) > 0, "shapes")
        _require(
            self.start[0] == 0 and self.start[-1] == len(self.flat) and np.all(np.diff(self.start) >= 0), "offsets"
        )
        _require(len(self.flat) == 0 or (self.flat.min() >= 0 and self.flat.max() < vocab_size), "token ids")


@dataclass(frozen=True)
class TokenTable:
    """Rows of any stage. A row's completions follow one another; completions that share a prompt share its ids."""

    prompts: Ragged
    """[P]; for prompt-only rows P = N."""
    responses: Ragged
    """[M], each ending in EOS; empty for prompt-only rows."""
    prompt_of: np.ndarray
    """[M] int64, the prompt of each completion."""
    row_start: np.ndarray
    """[N + 1] int64, row i has the completions row_start[i] .. row_start[i + 1] - 1."""

    def __len__(self) -> int:
        return len(self.row_start) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of each row, of a ranked row those of its longest completion, of a prompt-only row its
        prompt's."""
        if not len(self.responses):
            return self.prompts.lengths
        return np.maximum.reduceat(self.prompts.lengths[self.prompt_of] + self.responses.lengths, self.row_start[:-1])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays under names, for the cache."""
        return {
            "prompt_flat": self.prompts.flat,
            "prompt_start": self.prompts.start,
            "response_flat": self.responses.flat,
            "response_start": self.responses.start,
            "prompt_of": self.prompt_of,
            "row_start": self.row_start,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], vocab_size: int) -> "TokenTable":
        """The reverse of `to_arrays`.

        Raises:
            KeyError or ValueError: an array is missing, or the arrays do not fit together.
        """
        prompts = Ragged(arrays["prompt_flat"], arrays["prompt_start"])
        responses = Ragged(arrays["response_flat"], arrays["response_start"])
        table = cls(prompts, responses, arrays["prompt_of"], arrays["row_start"])
        prompts.validate(vocab_size)
        responses.validate(vocab_size)
        prompt_of, row_start = table.prompt_of, table.row_start
        _require(
            prompt_of.dtype == row_start.dtype == np.int64 and prompt_of.shape == (len(responses),), "prompt index"
        )
        _require(len(prompt_of) == 0 or (prompt_of.min() >= 0 and prompt_of.max() < len(prompts)), "prompt index")
        _require(
            row_start.ndim == 1 and len(row_start) > 0 and row_start[0] == 0 and row_start[-1] == len(prompt_of), "rows"
        )
        per_row = np.diff(row_start)
        _require(bool(np.all(per_row >= 1)) if len(prompt_of) else len(per_row) == len(prompts), "rows")
        return table


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, limits: LengthLimits, counts: Counts, description: str
) -> TokenTable:
    """Tokenises rows, prompt and response apart, appends one EOS to every response, and cuts or drops what is too long.

    Args:
        rows: of one stage.
        tokenizer: gives the ids.
        limits: the budgets.
        counts: kept, cut, dropped and duplicates are added up in it.
        description: of the progress bar, which shows when this takes more than a few seconds.
    """
    builder = _Builder()
    seen: set[int] = set()
    rows = iter(rows)
    with tqdm(desc=description, unit=" rows", delay=3, leave=False, disable=None) as bar:
        while chunk := list(islice(rows, _CHUNK)):
            for row, prompts, responses in _encode(chunk, tokenizer, limits):
                fitted = None if prompts is None else fit(prompts, responses, limits)
                if fitted is None:
                    counts.dropped += 1
                    continue
                builder.add(fitted, responses)
                counts.kept += 1
                counts.cut += any(len(a) < len(b) for a, b in zip(fitted, prompts, strict=True))
                duplicate_key = hash((row.prompts, row.completions))
                counts.duplicates += duplicate_key in seen
                seen.add(duplicate_key)
            bar.update(len(chunk))
    return builder.table()


def fit(prompts: list[list[int]], responses: list[list[int]], limits: LengthLimits) -> list[list[int]] | None:
    """Shortens the prompts of one row, from the left, until its longest completion fits.

    The beginning of the prompt goes and the cue to answer stays. All completions of a row get the same room, so that a
    shared prompt stays shared: a prompt shortened for the longer reply alone would tell the replies apart.

    Args:
        prompts: K token lists, one per completion (or one prompt and no responses).
        responses: K token lists ending in EOS, or none.
        limits: the budgets.

    Returns:
        The K prompts, or None if the row has to be dropped: a response alone is too long (it is never cut, and so never
        ends in an EOS it did not have), less than the cue would be left of a prompt, or cutting has made two
        completions equal.
    """
    room = limits.max_length - max(map(len, responses), default=0)
    if limits.max_prompt_length is not None:
        room = min(room, limits.max_prompt_length)
    if room < 0:
        return None
    if all(len(prompt) <= room for prompt in prompts):
        return prompts
    if room < limits.cue_length:
        return None
    fitted = [prompt[-room:] for prompt in prompts]
    pairs = {(tuple(prompt), tuple(response)) for prompt, response in zip(fitted, responses, strict=False)}
    return fitted if len(pairs) == len(responses) else None


def _encode(
    rows: list[Row], tokenizer: Tokenizer, limits: LengthLimits
) -> Iterator[tuple[Row, list[list[int]] | None, list[list[int]]]]:
    """Token lists per row; None in place of the prompts when a response is hopelessly long and nothing was
    tokenised."""
    longest = MAX_CHARACTERS_PER_TOKEN * limits.max_length
    # A prompt keeps twice that, since the split into words can start out of step where a text was cut.
    prompts = [[prompt[-2 * longest :] for prompt in row.prompts] for row in rows]
    hopeless = [any(len(text) > longest for text in row.completions) for row in rows]
    texts: dict[str, list[int]] = {}
    for row, row_prompts, skip in zip(rows, prompts, hopeless, strict=True):
        if not skip:
            texts.update(dict.fromkeys((*row_prompts, *row.completions)))
    texts = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    for row, row_prompts, skip in zip(rows, prompts, hopeless, strict=True):
        if skip:
            yield row, None, []
        else:
            responses = [[*texts[text], tokenizer.eos_id] for text in row.completions]
            yield row, [texts[prompt] for prompt in row_prompts], responses


class _Builder:
    """Collects rows in growing arrays."""

    def __init__(self) -> None:
        self.prompt_flat, self.response_flat = array("i"), array("i")
        self.prompt_start, self.response_start = array("q", [0]), array("q", [0])
        self.prompt_of, self.row_start = array("q"), array("q", [0])

    def add(self, prompts: list[list[int]], responses: list[list[int]]) -> None:
        index: dict[tuple[int, ...], int] = {}
        for prompt in prompts:
            key = tuple(prompt)
            if key not in index:
                index[key] = len(self.prompt_start) - 1
                self.prompt_flat.extend(prompt)
                self.prompt_start.append(len(self.prompt_flat))
        for prompt, response in zip(prompts, responses, strict=False):
            self.prompt_of.append(index[tuple(prompt)])
            self.response_flat.extend(response)
            self.response_start.append(len(self.response_flat))
        self.row_start.append(len(self.prompt_of))

    def table(self) -> TokenTable:
        def ids(values: array) -> np.ndarray:
            return np.array(values, dtype=np.int32)

        def index(values: array) -> np.ndarray:
            return np.array(values, dtype=np.int64)

        return TokenTable(
            Ragged(ids(self.prompt_flat), index(self.prompt_start)),
            Ragged(ids(self.response_flat), index(self.response_start)),
            index(self.prompt_of),
            index(self.row_start),
        )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the {what} of a token table do not fit together")
