"""Demonstrations for the sentiment part: review openings, each with how the pre-trained model itself goes on.

A continuation is sampled from the bare text. As SFT rows they teach the model to answer an opening in the dialogue's
form as it would have gone on by itself, and to stop at the end of a sentence.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from inference.answers import Machine, Sampling, TextModel, sample_answers
from models.families import load_pretrained
from models.weights.huggingface import describe_pretrained
from utils.data.files import read_rows
from utils.runs.durable import write_file
from utils.template import PromptTemplate

TEMPERATURE, DRAWS = 0.7, 2
"""Below 1, so that the SFT model writes clearer than the pre-trained one; continuations of each opening."""
_FEWEST_WORDS = 4


def whole_sentences(text: str) -> str:
    """The first paragraph up to its last complete sentence; "" where that is short or does not begin with a word."""
    paragraph = next(iter(text.strip().splitlines()), "")
    ended = re.match(r"\w.*[.!?][\"”')]*(?=\s|$)", paragraph)
    return ended[0] if ended and len(ended[0].split()) >= _FEWEST_WORDS else ""


def write_continuations(model: str, openings: Path, tokens: int, seed: int, machine: Machine, path: Path) -> int:
    """Write rows {"prompt", "response"} for `--dataset`; returns their number.

    Args:
        model: folder in Hugging Face's form. openings: a text file with one a line. tokens: longest continuation.
    """
    found = describe_pretrained(model)
    tokenizer, _ = found.tokenizer("--model")
    source = TextModel(load_pretrained(model, vocab_size=tokenizer.vocab_size).eval(), tokenizer, PromptTemplate())
    prompts = [data["prompt"] for _, data in read_rows(openings)]
    rows = []
    for draw in range(DRAWS):
        answers = sample_answers(source, prompts, "continuations", Sampling(TEMPERATURE, tokens, seed), machine, draw)
        said = ((answer.prompt, whole_sentences(answer.text)) for answer in answers)
        rows += [{"prompt": prompt, "response": text} for prompt, text in said if text]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return len(rows)
