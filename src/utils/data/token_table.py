"""Rows as token ids in a few flat arrays, cut to length.

Shapes: N rows, M completions over all rows, P distinct prompts (counted once per row), K completions of one row.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from tqdm import tqdm

from utils.data.rows import Row
from utils.template import PromptTemplate
from utils.tokenizer import Tokenizer

MAX_CHARACTERS_PER_TOKEN = 128
"""The longest token of GPT-2 has 128 characters, so a longer text than this times the budget cannot fit, and is not
tokenised."""

_SEAM = re.compile(r".*\S(?= \S)", re.DOTALL)  # up to the last end of a word before one space
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
    long: int = 0
    """Of those kept: plain texts longer than a row, cut into pieces."""
    pieces: int = 0
    """Rows that the long ones became."""
    renewed: int = 0
    """Of those read: rows that the code before version 3 (utils/dataset.py) read otherwise, or not at all."""
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

    @classmethod
    def of(cls, sequences: list[np.ndarray]) -> "Ragged":
        """Sequences of int32 ids, end to end."""
        ends = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype=np.int32), *sequences]), ends)

    def is_whole(self, vocab_size: int) -> bool:
        """Whether the arrays have this form and every id is a real one."""
        flat, start = self.flat, self.start
        return (
            (flat.dtype, start.dtype, flat.ndim) == (np.int32, np.int64, 1)
            and _is_partition(start, len(flat))
            and (len(flat) == 0 or (flat.min() >= 0 and flat.max() < vocab_size))
        )


@dataclass(frozen=True)
class TokenTable:
    """Rows of any stage. A row's completions follow one another; completions that share a prompt share its ids."""

    prompts: Ragged
    """[P]; for prompt-only rows P = N."""
    responses: Ragged
    """[M], each ending in EOS but for the pieces of a long text; empty for prompt-only rows."""
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
        prompt_of, row_start = arrays["prompt_of"], arrays["row_start"]
        fit_together = (
            prompts.is_whole(vocab_size)
            and responses.is_whole(vocab_size)
            and prompt_of.dtype == row_start.dtype == np.int64
            and prompt_of.shape == (len(responses),)
            and _is_partition(row_start, len(prompt_of))
        )
        if fit_together and len(prompt_of):
            fit_together = 0 <= prompt_of.min() <= prompt_of.max() < len(prompts) and np.diff(row_start).min() >= 1
        elif fit_together:
            fit_together = len(row_start) - 1 == len(prompts)
        if not fit_together:
            raise ValueError("the arrays of a token table do not fit together")
        return cls(prompts, responses, prompt_of, row_start)


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    limits: LengthLimits,
    counts: Counts,
    description: str,
    template: PromptTemplate | None = None,
) -> TokenTable:
    """Tokenises rows, prompt and response apart, one EOS behind every response, and cuts or drops what is too long.

    A plain text that is too long becomes several rows: see `_pieces`. `counts` gets what `Counts` has of kept rows, and
    dropped; `description` is of the progress bar, which shows after 3 seconds; `template` is that of the rows' texts.
    """
    template = template or PromptTemplate()
    all_prompts: list[np.ndarray] = []
    all_responses: list[np.ndarray] = []
    prompt_of, row_start = [], [0]
    seen: set[int] = set()
    longest = MAX_CHARACTERS_PER_TOKEN * limits.max_length
    rows = iter(rows)
    with tqdm(desc=description, unit=" rows", delay=3, leave=False, disable=None) as bar:
        while chunk := list(islice(rows, _CHUNK)):
            hopeful = [row for row in chunk if _is_text(row) or all(len(text) <= longest for text in row.completions)]
            counts.dropped += len(chunk) - len(hopeful)
            for row, prompts, responses in _encode(hopeful, tokenizer, template, longest):
                pieces = _pieces(responses[0], limits.max_length) if _is_text(row) else []
                fitted = prompts if pieces else fit(prompts, responses, limits)
                if fitted is None:
                    counts.dropped += 1
                    continue
                counts.kept += 1
                counts.cut += any(len(a) < len(b) for a, b in zip(fitted, prompts, strict=True))
                if len(pieces) > 1:
                    counts.long, counts.pieces = counts.long + 1, counts.pieces + len(pieces)
                duplicate_key = hash((row.prompts, row.completions))
                counts.duplicates += duplicate_key in seen
                seen.add(duplicate_key)
                keys = [tuple(prompt) for prompt in fitted]
                for replies in [[piece] for piece in pieces] or [responses]:
                    place = {key: len(all_prompts) + i for i, key in enumerate(dict.fromkeys(keys))}
                    prompt_of += [place[key] for key in keys[: len(replies)]]
                    row_start.append(len(prompt_of))
                    all_prompts += [np.array(ids, dtype=np.int32) for ids in place]
                    all_responses += [np.array(ids, dtype=np.int32) for ids in replies]
            bar.update(len(chunk))
    index = np.array(prompt_of, dtype=np.int64), np.array(row_start, dtype=np.int64)
    return TokenTable(Ragged.of(all_prompts), Ragged.of(all_responses), *index)


def fit(prompts: list[list[int]], responses: list[list[int]], limits: LengthLimits) -> list[list[int]] | None:
    """Shortens the prompts of one row, from the left, until its longest completion fits.

    The beginning of the prompt goes and the cue to answer stays. All completions of a row get the same room, so that a
    shared prompt stays shared: a prompt shortened for the longer reply alone would tell the replies apart. Takes K
    token lists each (or one prompt and no responses), responses with their EOS.

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


def _is_text(row: Row) -> bool:
    """Whether a row is plain text: a completion of nothing."""
    return row.prompts == ("",) and len(row.completions) == 1


def _pieces(ids: list[int], max_length: int) -> list[list[int]]:
    """A plain text, with its EOS, in pieces of at most `max_length` that follow each other.

    A piece begins with the last token of the one before it. Nothing predicts a row's first token, so each token of the
    text but the first is predicted once.
    """
    return [ids[at : at + max_length] for at in range(0, max(1, len(ids) - 1), max(1, max_length - 1))]


def _encode(
    rows: list[Row], tokenizer: Tokenizer, template: PromptTemplate, longest: int
) -> Iterator[tuple[Row, list[list[int]], list[list[int]]]]:
    """Token lists of each row's prompts and responses. Of a prompt the last 2 x `longest` characters are enough: twice
    what can fit, since the split into words can start out of step where a text was cut."""
    shortened = [[prompt[-2 * longest :] for prompt in row.prompts] for row in rows]
    parts = {row.completions[0]: _parts(row.completions[0], longest) for row in rows if _is_text(row)}
    pieces = list(dict.fromkeys(chain.from_iterable(parts.values())))
    ids = dict(zip(pieces, tokenizer.encode_batch(pieces), strict=True))
    prompts = list(dict.fromkeys(chain.from_iterable(shortened)))
    asked = dict(zip(prompts, template.encode_prompts(tokenizer, prompts), strict=True))
    replies = list(dict.fromkeys(text for row in rows if not _is_text(row) for text in row.completions))
    said = dict(zip(replies, template.encode_responses(tokenizer, replies), strict=True))

    def said_in(row: Row) -> list[list[int]]:
        if not _is_text(row):
            return [said[text] for text in row.completions]
        return [[*chain.from_iterable(ids[piece] for piece in parts[row.completions[0]]), tokenizer.eos_id]]

    for row, own in zip(rows, shortened, strict=True):
        yield row, [asked[prompt] for prompt in own], said_in(row)


def _parts(text: str, longest: int) -> list[str]:
    """A text in parts of at most 2 x `longest` characters, cut before a space between two words, where byte-level BPE
    cuts too: the tokens are those of the whole, and a tokenizer need not take megabytes at once."""
    parts, start = [], 0
    while len(text) - start > 2 * longest:
        seam = _SEAM.match(text, start, start + 2 * longest)
        end = seam.end() if seam else start + 2 * longest
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _is_partition(start: np.ndarray, total: int) -> bool:
    """Whether offsets [n + 1] cut an array of so many entries into n pieces."""
    if start.ndim != 1 or not len(start):
        return False
    return start[0] == 0 and start[-1] == total and bool(np.all(np.diff(start) >= 0))
