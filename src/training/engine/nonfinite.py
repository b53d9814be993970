"""When numbers go wrong: which tensor, at which step, in which rows; and whether the run stops or goes on.

Looking costs one check per optimizer step (the loss and the gradient norms together) and one per rollout. Only after a
finding are the rows of the batch taken one by one, to tell which of them is to blame.

A finding leaves two files in the run's folder, `nonfinite_step_XXXXXXXX.json` (rows, texts, ids, and their numbers as
text, since JSON has no NaN) and `.safetensors` (the same numbers as tensors; `ids` is padded with -1). With
`--on-nonfinite stop` the run then ends with exit code 1 and weights and optimizer as they were; with `skip` the batch
is dropped: no optimizer step is taken, and the states of optimizer and loss scaling stay as they are.

A gradient that overflows under loss scaling (--dtype fp16) is no such finding as long as there is a scale to lower: the
same batch is taken again at half of it. So every step that is counted was taken, every row still trains once an epoch,
and step count, schedule and order of the data know nothing of overflows. Below a scale of 1 it is a finding.

Shapes: B rows of a batch, L tokens of a row, T response columns.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from config.user_error import RunStopped, UserError
from training.engine.runtime import NonFiniteStep, Runtime
from utils.loss import kl_k1
from utils.reward_function import NonFiniteReward
from utils.runs.folder import step_checkpoints
from utils.tokenizer import Tokenizer

# What a report calls the fields of an Experience.
_NAMES = {
    "sampler_logp": "the sampler's log-probability",
    "logp": "the policy's log-probability",
    "logp_ref": "the reference's log-probability",
    "values": "the critic's value",
    "scores": "the reward",
}
_NAMED, _SHOWN_ROWS = 3, 8
_MOST_IN_A_ROW = 10
"""Batches that are skipped one after another before the run is stopped all the same: it would learn nothing more."""


class Overflow(Exception):
    """The gradients of a step overflowed under loss scaling; the scale has been lowered and the step not been taken."""


def again_after_overflow(step: Callable) -> Callable:
    """Decorates a method that makes gradients and takes an optimizer step with `Guard.step`: while the gradients
    overflow under loss scaling, all of it is done again."""

    @wraps(step)
    def until_taken(*args: Any, **kwargs: Any) -> Any:
        while True:
            with contextlib.suppress(Overflow):
                return step(*args, **kwargs)

    return until_taken


@dataclass
class SuspectRow:
    """A row of a batch in which a number is not finite.

    row: its index in the data. sequences: (prompt ids, response ids), one per completion. values: its numbers, tensors
    of any shape by name.
    """

    row: int
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    values: dict[str, Tensor] = field(default_factory=dict)


class NonFiniteRollout(FloatingPointError):
    """Of some sampled rows a log-probability, value or score is not finite.

    tensors: their names. rows: [n] positions in the rollout. cause: the error of the reward function that gave the
    number, if one did.
    """

    def __init__(
        self, tensors: Sequence[str], rows: Sequence[int], suspects: list[SuspectRow], cause: NonFiniteReward | None
    ) -> None:
        super().__init__(f"{' and '.join(tensors)} of the rollout is not finite in rows {_listed(rows)}")
        self.tensors = tensors
        self.rows = rows
        self.suspects = suspects
        self.cause = cause


def check_rollout(experience: Any, names: Sequence[str], cause: NonFiniteReward | None = None) -> None:
    """Looks once at the tensors `names` ([B] or [B, T]) of an `Experience`; the host waits for the device once.

    Raises:
        NonFiniteRollout: one is not finite somewhere.
    """
    broken = [~getattr(experience, name).isfinite() for name in names]
    by_row = torch.stack([x.reshape(len(experience), -1).any(dim=1) for x in broken]).cpu()  # (names, B)
    if not by_row.any():
        return
    tensors = [name for name, rows in zip(names, by_row) if rows.any()]
    rows = by_row.any(dim=0).nonzero().flatten().tolist()
    raise NonFiniteRollout(tensors, rows, rollout_rows(experience, rows, names), cause)


def rollout_rows(experience: Any, rows: Sequence[int], names: Sequence[str]) -> list[SuspectRow]:
    """The given rows of an `Experience` with their tensors `names`, cut to each response."""
    prompts, responses, n = experience.prompts(), experience.responses(), experience.n.tolist()
    found = []
    for i in rows:
        values = {name: getattr(experience, name)[i].detach().cpu() for name in names}
        values = {name: value[: n[i]] if value.ndim else value for name, value in values.items()}
        found.append(SuspectRow(i, [(prompts[i], responses[i])], values))
    return found


@dataclass(frozen=True)
class RowView:
    """A batch row by row, by its positions in the batch.

    loss: the loss [] of one row alone. sequences: (prompt ids, response ids) of each of its completions. index: where
    the row is in the data.
    """

    loss: Callable[[int], Tensor]
    sequences: Callable[[int], Sequence[tuple[Sequence[int], Sequence[int]]]]
    index: Callable[[int], int] = int


def rows_to_blame(rows: Iterable[int], view: RowView, parameters: Sequence[nn.Parameter] = ()) -> list[SuspectRow]:
    """Takes rows one by one: those whose own loss, or the gradient of it, is not finite; all of them if none is.

    Args:
        rows: positions in the batch.
        view: what to look at.
        parameters: whose gradients to look at, too; they are cleared.
    """
    blamed, others = [], []
    for row in rows:
        with torch.set_grad_enabled(bool(parameters)):
            loss = view.loss(row)
        finite = bool(loss.isfinite())
        if loss.requires_grad:
            loss.backward()
        for p in parameters:
            finite &= p.grad is None or bool(p.grad.isfinite().all())
            p.grad = None
        suspect = SuspectRow(view.index(row), view.sequences(row), {"loss": loss.detach().cpu()})
        (others if finite else blamed).append(suspect)
    return blamed or others


def broken_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


class Guard:
    """What becomes of a run in which a number is not finite: `--on-nonfinite`.

    Args:
        stage: "sft", "rm" or "ppo".
        run: the run's folder.
        choice: "stop" or "skip".
        tokenizer: to show the rows as text.
        state: of a run that is gone on with, see `state`.
    """

    def __init__(
        self, stage: str, run: Path, choice: str, tokenizer: Tokenizer, state: dict[str, Any] | None = None
    ) -> None:
        self.stage = stage
        self.run = run
        self.choice = choice
        self.tokenizer = tokenizer
        counts = (state or {}).get("nonfinite") or {"skipped": 0, "in_a_row": 0}
        self.skipped, self.in_a_row = counts["skipped"], counts["in_a_row"]
        self.overflows: int = (state or {}).get("overflows", 0)
        self._scaling: dict[str, Any] | None = None  # state of the loss scaling before a batch that overflowed

    def state(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"nonfinite": {"skipped": self.skipped, "in_a_row": self.in_a_row}, "overflows": self.overflows}

    def metrics(self) -> dict[str, int]:
        """Batches skipped so far, where the user asked for that, and overflows so far, from the first one on."""
        skipped = {"train/skipped": self.skipped} if self.choice == "skip" else {}
        return skipped | ({"train/overflows": self.overflows} if self.overflows else {})

    def step(
        self, step: int, runtime: Runtime, module: nn.Module, optimizer: torch.optim.Optimizer,
        groups: dict[str, list[nn.Parameter]], max_norm: float, loss: Tensor, rows: Iterable[int], view: RowView,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """`Runtime.step`, or what becomes of it when the loss or a gradient is not finite.

        Args:
            step: the step that is about to be taken, counted from 1.
            module: whose gradients to look at.
            optimizer, groups, max_norm: see `Runtime.step`.
            loss: [] of the whole batch.
            rows, view: the batch, see `rows_to_blame`.

        Returns:
            The norms of the groups' gradients, or None when the batch is skipped.

        Raises:
            Overflow: to take the batch again, see `again_after_overflow`. RunStopped: the batch is not skipped.
        """
        try:
            norms = runtime.step(optimizer, groups, max_norm, loss)
        except NonFiniteStep as error:
            names = [] if error.loss else broken_gradients(runtime.unwrap(module))
            scale = "" if runtime.loss_scale is None else f" at a loss scale of {runtime.loss_scale:g}"
            scaling = self._scaling or runtime.scaler_state()
            runtime.discard(optimizer)
            runtime.restore_scaler(scaling)  # the scale was not to blame: later batches keep theirs
            self._scaling = None
            was_training = module.training
            module.eval()
            suspects = rows_to_blame(rows, view, [p for group in groups.values() for p in group])
            module.train(was_training)
            self.found(step, "the loss" if error.loss else gradient_name(names) + scale, suspects)
            return None
        if norms is None:
            self._overflowed(step, runtime, optimizer)
        self.in_a_row, self._scaling = 0, None
        return norms

    def _overflowed(self, step: int, runtime: Runtime, optimizer: torch.optim.Optimizer) -> None:
        """Lowers the loss scale and raises what has the batch taken again."""
        scale, self._scaling = runtime.loss_scale, self._scaling or runtime.scaler_state()
        runtime.discard(optimizer)
        self.overflows += 1
        if runtime.loss_scale < scale:
            raise Overflow
        raise RunStopped(  # every gradient is finite, only their norm is not
            f"step {step}: the norm of the gradients is above what fp32 holds, and no loss scaling made it so; no step "
            f"was taken; {self.last_good()}. Lower --lr"
        )

    def evaluation(self, step: int, loss: float, rows: Iterable[int], view: RowView) -> None:
        """Looks at a held-out loss; a run that skips goes on without a model for best/.

        Raises:
            RunStopped: it is not finite, and the run does not skip.
        """
        if not math.isfinite(loss):
            self.found(step, "the held-out loss", rows_to_blame(rows, view), drop=False)

    def found(
        self,
        step: int,
        tensor: str,
        suspects: list[SuspectRow],
        cause: NonFiniteReward | None = None,
        drop: bool = True,
    ) -> None:
        """Dumps the rows; then stops the run, or counts and tells that the batch is skipped.

        Args:
            step: the step (PPO: iteration) that was about to be taken.
            tensor: what is not finite.
            suspects: the rows.
            cause: the reward function's error, which makes it the user's.
            drop: False at an evaluation, where no batch of training is lost.

        Raises:
            RunStopped: `--on-nonfinite stop`, or too many batches in a row. With a `cause` it is a UserError instead.
        """
        suspects = sorted(suspects, key=lambda s: s.row)
        file = self.dump(step, tensor, suspects)
        rows = f"row{'s' * (len(suspects) != 1)} {_listed([s.row for s in suspects])}"
        rows += "" if drop else " of the held-out data"
        what = f"step {step}: {tensor} is not finite in {rows}" + ("; no step was taken" if drop else "")
        skip = self.choice == "skip"
        if drop and skip:
            self.skipped += 1
            self.in_a_row += 1
        if skip and self.in_a_row < _MOST_IN_A_ROW:
            told = f"; the batch is skipped ({self.skipped} so far)" if drop else ""
            tqdm.write(f"{what}{told}. Rows and values: {file}")
            return
        remedy = "--on-nonfinite skip drops such a batch"
        remedy += "; a lower --lr or --dtype fp32 may cure it" if cause is None else ""
        if skip:
            remedy = f"{self.in_a_row} batches in a row were skipped; lower --lr, or try --dtype fp32"
        told = f"{self.where(file)}. {remedy}"
        if cause is not None:
            raise UserError(f"{cause} (step {step}, {rows}). {told}")
        raise RunStopped(f"{what}. {told}")

    def where(self, file: Path) -> str:
        """Where the rows are, and what to go on from."""
        return f"Rows and values: {file}; {self.last_good()}"

    def last_good(self) -> str:
        """The newest checkpoint in words."""
        saved = [*step_checkpoints(self.run)[-1:], *(p for p in (self.run / "best",) if p.is_dir())]
        return f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint has been saved yet"

    def dump(self, step: int, tensor: str, suspects: list[SuspectRow], kind: str = "nonfinite") -> Path:
        """Writes the rows as JSON and as tensors; returns the JSON file, or says why there is none."""
        path = self.run / f"{kind}_step_{step:08d}.json"
        decode = self.tokenizer.decode

        def told(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
            ids = [*map(int, prompt), *map(int, response)]
            texts = {"prompt": decode(ids[: len(prompt)]), "response": decode(ids[len(prompt) :])}
            return texts | {"ids": ids, "prompt_tokens": len(prompt)}

        rows = [
            {
                "row": s.row,
                "values": {name: _as_text(value) for name, value in s.values.items()},
                "sequences": [told(*sequence) for sequence in s.sequences],
            }
            for s in suspects
        ]
        record = {"stage": self.stage, "step": step, "tensor": tensor, "rows": rows}
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
            save_file(_tensors(suspects), path.with_suffix(".safetensors"))
        except OSError as error:
            tqdm.write(f"{path}: cannot be written ({error.strerror or error})")
        return path

    def rollout(self, step: int, error: NonFiniteRollout, rows: Sequence[int], drop: bool = True) -> None:
        """`found` for a rollout; `rows` are the prompts' indices in the data."""
        for suspect in error.suspects:
            suspect.row = int(rows[suspect.row])
        names = " and ".join(_NAMES[name] for name in error.tensors)
        self.found(step, names, error.suspects, error.cause, drop)

    def check_kl(self, step: int, experience: Any, rows: Sequence[int], kl: Tensor, limit: float) -> None:
        """Ends the run before the update on a rollout whose KL is above `--max-kl`; 0 never does.

        Args:
            step: the iteration.
            experience, rows: the rollout, and its prompts' indices in the data.
            kl: [] nats per response, mean over the rollout. limit: --max-kl.

        Raises:
            RunStopped: it is above the limit.
        """
        if not limit or float(kl) <= limit:
            return
        per_row = kl_k1(experience.logp, experience.logp_ref).sum(dim=1)  # (B,); both are 0 behind a response
        farthest = per_row.topk(min(_SHOWN_ROWS, len(per_row))).indices.tolist()
        suspects = rollout_rows(experience, farthest, ("logp", "logp_ref", "scores"))
        for suspect in suspects:
            suspect.values["kl"] = per_row[suspect.row].cpu()
            suspect.row = int(rows[suspect.row])
        file = self.dump(step, "objective/kl", suspects, kind="kl")
        raise RunStopped(
            f"step {step}: the KL to the reference is {float(kl):.3g} nats per response, above --max-kl {limit:g} "
            f"(most in rows {_listed([s.row for s in suspects])}); no step was taken. {self.where(file)}. A lower --lr "
            "or a higher --kl-coef keeps the policy nearer"
        )


def _listed(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:_SHOWN_ROWS])) + more


def gradient_name(names: Sequence[str]) -> str:
    """ "the gradient of a, b and 3 more"."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"the gradient of {', '.join(names[:_NAMED])}{more}"


def _as_text(value: Tensor) -> Any:
    """Numbers for JSON: what is finite as it is, the rest as "nan", "inf" or "-inf"."""

    def shown(x: Any) -> Any:
        if isinstance(x, list):
            return [shown(y) for y in x]
        return x if not isinstance(x, float) or abs(x) < float("inf") else str(x)

    return shown(value.tolist())


def _tensors(suspects: list[SuspectRow]) -> dict[str, Tensor]:
    """Rows as tensors: row [n]; ids [m, L] and prompt_tokens [m] of all sequences, sequence_of [m]; values, padded
    with 0 to one shape [n, ...]."""
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
