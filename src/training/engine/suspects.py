"""The rows behind a number that is not finite: which they are, and the two files that keep them.

`KIND_step_XXXXXXXX.json` holds the rows, their texts, ids and numbers (as text, since JSON has no NaN), the
`.safetensors` beside it the same numbers as tensors.

Shapes: L tokens of a row, T response columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.weights.checkpoint import write_tensors
from utils.tokenizer import Tokenizer

SHOWN_ROWS = 8


@dataclass
class SuspectRow:
    """A row of a batch in which a number is not finite.

    row: its index in the data. sequences: (prompt ids, response ids), one per completion. values: its numbers, tensors
    of any shape by name.
    """

    row: int
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    values: dict[str, Tensor] = field(default_factory=dict)


def rows_to_blame(
    rows: Iterable[int], alone: Callable[[int], SuspectRow], parameters: Sequence[nn.Parameter] = ()
) -> list[SuspectRow]:
    """Take rows one by one: those whose own loss, or the gradient of it, is not finite; all of them if none is.

    Args:
        rows: positions in the batch.
        alone: the row at a position, with its own loss [] as `values["loss"]`.
        parameters: whose gradients to check, too; they are cleared.
    """
    blamed, others = [], []
    for row in rows:
        with torch.set_grad_enabled(bool(parameters)):
            suspect = alone(int(row))
        loss = suspect.values["loss"]
        finite = bool(loss.isfinite())
        if loss.requires_grad:
            loss.backward()
        for p in parameters:
            finite &= p.grad is None or bool(p.grad.isfinite().all())
            p.grad = None
        suspect.values["loss"] = loss.detach().cpu()
        (others if finite else blamed).append(suspect)
    return blamed or others


def rollout_rows(experience: Any, rows: Sequence[int], names: Sequence[str]) -> list[SuspectRow]:
    """The given rows of an `Experience` with its tensors `names` ([B] or [B, T]), cut to each response."""
    suspects = []
    for i in rows:
        values = {name: getattr(experience, name)[i].detach().cpu() for name in names}
        values = {name: value[: experience.n[i]] if value.ndim else value for name, value in values.items()}
        suspects.append(SuspectRow(i, [experience.sequence(i)], values))
    return suspects


def write_suspects(path: Path, header: dict[str, Any], suspects: list[SuspectRow], tokenizer: Tokenizer) -> None:
    """Write the rows behind `header` as JSON, and as tensors beside it; on a full disk a line says that there are none.

    Args:
        path: the JSON file.
    """
    rows = [
        {
            "row": s.row,
            "values": {name: _json_numbers(value.tolist()) for name, value in s.values.items()},
            "sequences": [_json_sequence(*sequence, tokenizer) for sequence in s.sequences],
        }
        for s in suspects
    ]
    text = json.dumps(header | {"rows": rows}, ensure_ascii=False, indent=1) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
        write_tensors(_tensors(suspects), path.with_suffix(".safetensors"))
    except OSError as error:
        tqdm.write(f"{path}: cannot be written ({error.strerror or error})")


def first_few(names: Sequence[Any], most: int = SHOWN_ROWS) -> str:
    """ "a, b, c and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _json_sequence(prompt: Sequence[int], response: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    prompt, response = [*map(int, prompt)], [*map(int, response)]
    texts = {"prompt": tokenizer.decode(prompt), "response": tokenizer.decode(response)}
    return texts | {"ids": prompt + response, "prompt_tokens": len(prompt)}


def _json_numbers(x: Any) -> Any:
    """Finite numbers as they are, the others as "nan", "inf" or "-inf"."""
    if isinstance(x, list):
        return [_json_numbers(y) for y in x]
    return x if not isinstance(x, float) or abs(x) < float("inf") else str(x)


def _tensors(suspects: list[SuspectRow]) -> dict[str, Tensor]:
    """Rows as tensors: row [n]; ids [m, L] (padded with -1) and prompt_tokens [m] of all sequences, sequence_of [m];
    values, padded with 0 to one shape [n, ...]."""
    sequences = [(i, p, r) for i, s in enumerate(suspects) for p, r in s.sequences]
    ids = [torch.tensor([*map(int, p), *map(int, r)], dtype=torch.int64) for _, p, r in sequences]
    tensors = {
        "row": torch.tensor([s.row for s in suspects]),
        "ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1),
        "prompt_tokens": torch.tensor([len(p) for _, p, _ in sequences]),
        "sequence_of": torch.tensor([i for i, *_ in sequences]),
    }
    for name in suspects[0].values:
        values = [s.values[name].float() for s in suspects]
        stacked = nn.utils.rnn.pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        tensors[f"values.{name}"] = stacked.contiguous()
    return tensors
