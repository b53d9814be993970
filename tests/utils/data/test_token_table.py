"""Cutting to length, and the flat form of the rows."""

import time

import numpy as np
import pytest

from utils.data.rows import Row
from utils.data.token_table import Counts, LengthLimits, TokenTable, fit, tokenize_rows
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

EOS = 99
T = PromptTemplate()


@pytest.fixture(scope="module")
def tok():
    return get_tokenizer("demo")


def limits(max_length, max_prompt_length=None, cue_length=2):
    return LengthLimits(max_length, max_prompt_length, cue_length)


def table_of(rows, tok, max_length=64, **more):
    counts = Counts()
    cue = len(tok.encode(T.assistant))
    return tokenize_rows(rows, tok, limits(max_length, cue_length=cue, **more), counts, "rows"), counts


def test_fit_leaves_what_fits():
    assert fit([[1, 2, 3]], [[4, EOS]], limits(5)) == [[1, 2, 3]]


def test_fit_cuts_the_beginning_of_the_prompt_and_never_the_response():
    assert fit([[1, 2, 3, 4]], [[4, EOS]], limits(5)) == [[2, 3, 4]]
    assert fit([[1, 2, 3, 4]], [], limits(100, max_prompt_length=2)) == [[3, 4]]


def test_fit_drops_a_row_whose_response_does_not_fit_or_leaves_no_room_for_the_cue():
    assert fit([[1, 2]], [[4, 5, 6, EOS]], limits(3)) is None
    assert fit([[1, 2, 3]], [[4, 5, 6, EOS]], limits(5)) is None, "one token of prompt is less than the cue"
    assert fit([[1, 2, 3]], [[4, 5, 6, EOS]], limits(6)) == [[2, 3]]
    assert fit([[]], [[4, 5, EOS]], limits(3)) == [[]], "plain text has no cue to lose"


def test_fit_gives_all_completions_of_a_row_the_same_room():
    prompt = [1, 2, 3, 4, 5]
    assert fit([prompt] * 3, [[6, EOS], [6, 7, 8, EOS], [EOS]], limits(7)) == [[3, 4, 5]] * 3
    assert fit([prompt, [9, 8]], [[6, EOS], [6, 7, 8, EOS]], limits(7)) == [[3, 4, 5], [9, 8]]


def test_fit_drops_a_ranking_that_cutting_has_made_equal():
    assert fit([[1, 2, 3, 4], [9, 2, 3, 4]], [[6, EOS]] * 2, limits(5)) is None
    assert fit([[1, 2, 3, 4], [9, 2, 3, 4]], [[6, EOS]] * 2, limits(6)) is not None


def test_table_gives_back_the_ids_with_one_eos_and_no_separator(tok):
    rows = [Row((T.format(["a"]),) * 2, (" yes", " no")), Row((T.format(["b"]), T.format(["c"])), (" yes", ""))]
    table, counts = table_of(rows, tok)
    assert (len(table), len(table.prompts), len(table.responses)) == (2, 3, 4)
    assert table.row_start.tolist() == [0, 2, 4] and table.prompt_of.tolist() == [0, 0, 1, 2]
    assert table.prompts[0].tolist() == tok.encode(T.format(["a"]))
    assert table.responses[0].tolist() == [*tok.encode(" yes"), tok.eos_id]
    assert table.responses[3].tolist() == [tok.eos_id]
    longest = [
        max(len(table.prompts[table.prompt_of[m]]) + len(table.responses[m]) for m in pair) for pair in ((0, 1), (2, 3))
    ]
    assert table.lengths.tolist() == longest
    assert (counts.kept, counts.cut, counts.dropped) == (2, 0, 0)


def test_special_tokens_in_text_never_become_eos(tok):
    table, _ = table_of([Row((T.format(["<|endoftext|>"]),), (" a <|endoftext|>",))], tok)
    assert tok.eos_id not in table.prompts[0]
    assert (table.responses[0] == tok.eos_id).tolist() == [False] * (len(table.responses[0]) - 1) + [True]


def test_counts_of_cut_dropped_and_duplicated_rows(tok):
    rows = [
        Row((T.format(["word " * 200]),), (" a",)),
        Row((T.format(["b"]),), (" word" * 200,)),
        Row((T.format(["c"]),), (" d",)),
        Row((T.format(["c"]),), (" d",)),
    ]
    table, counts = table_of(rows, tok)
    assert (counts.kept, counts.cut, counts.dropped, counts.duplicates) == (3, 1, 1, 1)
    assert len(table) == 3 and table.lengths.max() == 64
    assert tok.decode(table.prompts[0]).endswith("word\n\nAssistant:")
    assert table.responses[0][-1] == tok.eos_id


def test_a_megabyte_in_a_row_costs_next_to_nothing_and_cuts_to_the_same_ids(tok):
    words = "one two three " * 80_000
    rows = [
        Row((T.format([words]),), (" a",)),
        Row((T.format(["x" * 2**20]),), (" a",)),
        Row((T.format(["q" + " " * 2**20 + "q"]),), (" a",)),
        Row((T.format(["q"]),), (words,)),
    ]
    start = time.perf_counter()
    table, counts = table_of(rows, tok)
    assert time.perf_counter() - start < 5
    assert (counts.kept, counts.cut, counts.dropped) == (3, 3, 1)
    assert table.prompts[0].tolist() == tok.encode(T.format([words[-30_000:]]))[-(64 - 1 - len(tok.encode(" a"))) :]


def predicted(table, of):
    """The tokens of a table's rows that are predicted: all but the first of each."""
    return [token for row in of for token in table.responses[row].tolist()[1:]]


@pytest.mark.parametrize("words", [3, 62, 63, 64, 65, 127, 128, 500])
def test_long_texts_are_cut_into_pieces_that_predict_each_token_once(tok, words):
    text = " ".join(str(i % 10) for i in range(words))
    whole = [*tok.encode(text), tok.eos_id]
    table, counts = table_of([Row(("",), ("short",)), Row(("",), (text,)), Row(("",), ("last",))], tok)
    pieces = range(1, len(table) - 1)
    assert predicted(table, pieces) == whole[1:] and table.responses[1][0] == whole[0]
    assert table.lengths.max() <= 64 and all(len(table.responses[row]) == 64 for row in pieces[:-1])
    assert all(len(prompt) == 0 for prompt in table.prompts)
    is_long = len(whole) > 64
    assert (counts.kept, counts.dropped) == (3, 0)
    assert (counts.long, counts.pieces) == ((1, len(pieces)) if is_long else (0, 0))
    assert len(pieces) > 1 or not is_long


@pytest.mark.parametrize("text", ["one two three " * 30_000, "x" * 300_000, " " * 300_000 + "q", "ä\n" * 200_000])
def test_texts_of_megabytes_have_the_tokens_of_the_whole(tok, text):
    table, counts = table_of([Row(("",), (text,))], tok)
    ids = [table.responses[0][0], *predicted(table, range(len(table)))]
    assert tok.decode(ids[:-1]) == text and ids[-1] == tok.eos_id and counts.long == 1
    if text.startswith("one"):
        assert ids[:-1] == tok.encode(text)


def test_rows_across_chunks_keep_their_order(tok, monkeypatch):
    monkeypatch.setattr("utils.data.token_table._CHUNK", 3)
    rows = [Row((T.format([str(i)]),), (f" {i}",)) for i in range(10)]
    table, _ = table_of(iter(rows), tok)
    assert [tok.decode(table.responses[i]) for i in range(10)] == [f" {i}" for i in range(10)]


def test_prompt_only_table(tok):
    prompts = [T.format(["a"]), T.format(["b", "c", "d"])]
    table, _ = table_of([Row((prompt,), ()) for prompt in prompts], tok)
    assert len(table) == 2 and table.lengths.tolist() == [len(tok.encode(prompt)) for prompt in prompts]


def test_arrays_round_trip_and_broken_ones_are_refused(tok):
    table, _ = table_of([Row((T.format(["a"]),) * 2, (" yes", " no"))] * 3, tok)
    arrays = table.to_arrays()
    again = TokenTable.from_arrays(arrays, tok.vocab_size)
    assert all(np.array_equal(again.to_arrays()[name], arrays[name]) for name in arrays)
    broken = {
        "prompt_flat": [
            arrays["prompt_flat"][:-1],
            arrays["prompt_flat"].astype(np.int64),
            arrays["prompt_flat"] + tok.vocab_size,
        ],
        "response_start": [
            arrays["response_start"][::-1].copy(),
            arrays["response_start"][:-1],
            arrays["response_start"][:0],
        ],
        "prompt_of": [arrays["prompt_of"] + 3, arrays["prompt_of"][:-1], arrays["prompt_of"].astype(np.int32)],
        "row_start": [arrays["row_start"] * 2, arrays["row_start"] + 1, np.array([0, 0, 6])],
    }
    for name, values in broken.items():
        for value in values:
            with pytest.raises(ValueError, match="of a token table do not fit together"):
                TokenTable.from_arrays(arrays | {name: value}, tok.vocab_size)
        with pytest.raises(KeyError):
            TokenTable.from_arrays({key: value for key, value in arrays.items() if key != name}, tok.vocab_size)
