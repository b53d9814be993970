"""When numbers go wrong: which tensor, at which step, in which rows; and whether the run stops or goes on.

It costs one check per optimizer step (the loss and the gradient norms together) and one per rollout. Only when that
fails are the rows of the batch taken one by one, to tell which of them is to blame; `engine.suspects` writes them down.

With `--on-nonfinite stop` the run then ends with exit code 1 and weights and optimizer as they were; with `skip` the
batch is dropped: no optimizer step is taken, and the states of optimizer and loss scaling stay as they are.

A gradient that overflows under loss scaling (--dtype fp16) is no such case as long as there is a scale to lower: the
same batch is taken again at half of it. So every step that is counted was taken, every row still trains once an epoch,
and step count, schedule and order of the data know nothing of overflows. Below a scale of 1 it is one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.user_error import RunStopped, UserError
from training.engine.runtime import NonFiniteStep, Overflow, Runtime
from training.engine.suspects import SHOWN_ROWS, SuspectRow, first_few, rollout_rows, rows_to_blame, write_suspects
from utils.loss import kl_k1
from utils.reward_function import NonFiniteReward
from utils.runs.finding import step_checkpoints
from utils.tokenizer import Tokenizer

# What a report calls the fields of an Experience.
_NAMES = {
    "sampler_logp": "the sampler's log-probability",
    "logp": "the policy's log-probability",
    "logp_ref": "the reference's log-probability",
    "values": "the critic's value",
    "scores": "the reward",
}
_MOST_IN_A_ROW = 10
"""Batches that are skipped one after another before the run is stopped all the same: it would learn nothing more."""


class NonFiniteRollout(FloatingPointError):
    """Of some sampled rows a log-probability, value or score is not finite.

    tensors: their names. suspects: the rows, by their positions in the rollout. cause: the error of the reward function
    that gave the number, if one did.
    """

    def __init__(self, tensors: Sequence[str], suspects: list[SuspectRow], cause: NonFiniteReward | None) -> None:
        rows = first_few([s.row for s in suspects])
        super().__init__(f"{' and '.join(tensors)} of the rollout is not finite in rows {rows}")
        self.tensors, self.suspects, self.cause = tensors, suspects, cause


def check_rollout(experience: Any, names: Sequence[str], cause: NonFiniteReward | None = None) -> None:
    """NonFiniteRollout unless the tensors `names` ([B] or [B, T]) of an `Experience` are finite; one wait for them."""
    broken = [~getattr(experience, name).isfinite() for name in names]
    by_row = torch.stack([x.reshape(len(experience), -1).any(dim=1) for x in broken]).cpu()  # (names, B)
    if by_row.any():
        rows = by_row.any(dim=0).nonzero().flatten().tolist()
        tensors = [name for name, in_rows in zip(names, by_row) if in_rows.any()]
        raise NonFiniteRollout(tensors, rollout_rows(experience, rows, names), cause)


def again_after_overflow(step: Callable) -> Callable:
    """Decorates a method that makes gradients and takes an optimizer step under `Guard.step`: while the gradients
    overflow under loss scaling, all of it is done again."""

    @wraps(step)
    def until_taken(*args: Any, **kwargs: Any) -> Any:
        while True:
            with contextlib.suppress(Overflow):
                return step(*args, **kwargs)

    return until_taken


class Guard:
    """What becomes of a run in which a number is not finite: `--on-nonfinite`.

    Args:
        stage: "sft", "rm" or "ppo". run: the run's folder.
        choice: "stop" or "skip".
        tokenizer: to show the rows as text. runtime: whose loss scale it lowers.
        state: of a run that is gone on with, see `state`.
    """

    def __init__(
        self, stage: str, run: Path, choice: str, tokenizer: Tokenizer, runtime: Runtime,
        state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.stage, self.run, self.choice, self.tokenizer, self.runtime = stage, run, choice, tokenizer, runtime
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

    @contextlib.contextmanager
    def step(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, rows: Iterable[int],
        alone: Callable[[int], SuspectRow],
    ) -> Iterator[None]:  # fmt: skip
        """Context of one `Runtime.step`. One that raises NonFiniteStep ends the run, or is left out: the batch is
        skipped, and what follows the step inside this context is not reached.

        Args:
            step: the step that is about to be taken, counted from 1.
            module: whose gradients to name.
            optimizer: the one that steps.
            rows, alone: the batch, see `rows_to_blame`.

        Raises:
            Overflow: to take the batch again, see `again_after_overflow`. RunStopped: the batch is not skipped.
        """
        try:
            yield
        except Overflow:
            self._lower_scale(step, optimizer)
            raise
        except NonFiniteStep as error:
            tensor = "the loss" if error.loss else self._broken_gradients(module)
            scaling = self._scaling or self.runtime.scaler_state()
            self.runtime.discard(optimizer)
            self.runtime.restore_scaler(scaling)  # the scale was not to blame: later batches keep theirs
            self._scaling = None
            was_training = module.training
            module.eval()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            suspects = rows_to_blame(rows, alone, parameters)
            module.train(was_training)
            self._stop_or_skip(step, tensor, suspects)
        else:
            self.in_a_row, self._scaling = 0, None

    def _broken_gradients(self, module: nn.Module) -> str:
        """ "the gradient of a, b, c and 3 more", and the loss scale where there is one."""
        named = self.runtime.unwrap(module).named_parameters()
        broken = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        scale = self.runtime.loss_scale
        return f"the gradient of {first_few(broken, 3)}" + ("" if scale is None else f" at a loss scale of {scale:g}")

    def _lower_scale(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Lower the loss scale for another try; RunStopped where that is no cure."""
        scale, self._scaling = self.runtime.loss_scale, self._scaling or self.runtime.scaler_state()
        self.runtime.discard(optimizer)
        self.overflows += 1
        if self.runtime.loss_scale >= scale:
            raise RunStopped(  # every gradient is finite, only their norm is not
                f"step {step}: the norm of the gradients is above what fp32 holds, and no loss scaling made it so; no "
                f"step was taken; {self.last_good()}. Lower --lr"
            )

    def evaluation(self, step: int, loss: float, rows: Iterable[int], alone: Callable[[int], SuspectRow]) -> None:
        """Stop the run (RunStopped) for a held-out loss that is not finite; one that skips goes on without a best/."""
        if not math.isfinite(loss):
            self._stop_or_skip(step, "the held-out loss", rows_to_blame(rows, alone), drop=False)

    def rollout(self, step: int, error: NonFiniteRollout, rows: Sequence[int], drop: bool = True) -> None:
        """Stop the run, or skip the rollout; `rows` are the prompts' indices in the data, drop is False at an
        evaluation."""
        for suspect in error.suspects:
            suspect.row = int(rows[suspect.row])
        names = " and ".join(_NAMES[name] for name in error.tensors)
        self._stop_or_skip(step, names, error.suspects, error.cause, drop)

    def check_kl(self, step: int, experience: Any, rows: Sequence[int], kl: Tensor, limit: float) -> None:
        """End the run (RunStopped) before the update on a rollout whose KL is above `--max-kl`; 0 never does.

        Args:
            step: the iteration.
            experience, rows: the rollout, and its prompts' indices in the data.
            kl: [] nats per response, mean over the rollout. limit: --max-kl.
        """
        if not limit or float(kl) <= limit:
            return
        per_row = kl_k1(experience.logp, experience.logp_ref).sum(dim=1)  # (B,); both are 0 behind a response
        farthest = per_row.topk(min(SHOWN_ROWS, len(per_row))).indices.tolist()
        suspects = rollout_rows(experience, farthest, ("logp", "logp_ref", "scores"))
        for suspect in suspects:
            suspect.values["kl"] = per_row[suspect.row].cpu()
            suspect.row = int(rows[suspect.row])
        file = self._write("kl", step, "objective/kl", suspects)
        raise RunStopped(
            f"step {step}: the KL to the reference is {float(kl):.3g} nats per response, above --max-kl {limit:g} "
            f"(most in rows {first_few([s.row for s in suspects])}); no step was taken. {file}; {self.last_good()}. "
            "A lower --lr or a higher --kl-coef keeps the policy nearer"
        )

    def _stop_or_skip(
        self, step: int, tensor: str, suspects: list[SuspectRow], cause: NonFiniteReward | None = None,
        drop: bool = True,
    ) -> None:  # fmt: skip
        """Write the rows down; then count and tell that the batch is skipped, or raise RunStopped: with --on-nonfinite
        stop, or after too many batches in a row.

        Args:
            step: the step (PPO: iteration) that was about to be taken.
            tensor: what is not finite. suspects: in which rows.
            cause: the reward function's error, which makes it the user's: a UserError in place of RunStopped.
            drop: False at an evaluation, where no batch of training is lost.
        """
        suspects = sorted(suspects, key=lambda s: s.row)
        file = self._write("nonfinite", step, tensor, suspects)
        rows = f"row{'s' * (len(suspects) != 1)} {first_few([s.row for s in suspects])}"
        rows += "" if drop else " of the held-out data"
        what = f"step {step}: {tensor} is not finite in {rows}" + ("; no step was taken" if drop else "")
        skip = self.choice == "skip"
        if drop and skip:
            self.skipped += 1
            self.in_a_row += 1
        if skip and self.in_a_row < _MOST_IN_A_ROW:
            what += f"; the batch is skipped ({self.skipped} so far)" if drop else ""
            tqdm.write(f"{what}. {file}")
            return
        remedy = "--on-nonfinite skip drops such a batch"
        remedy += "; a lower --lr or --dtype fp32 may cure it" if cause is None else ""
        if skip:
            remedy = f"{self.in_a_row} batches in a row were skipped; lower --lr, or try --dtype fp32"
        if cause is not None:
            raise UserError(f"{cause} (step {step}, {rows}). {file}; {self.last_good()}. {remedy}")
        raise RunStopped(f"{what}. {file}; {self.last_good()}. {remedy}")

    def _write(self, kind: str, step: int, tensor: str, suspects: list[SuspectRow]) -> str:
        """Write the rows into the run's folder; returns words that say where."""
        path = self.run / f"{kind}_step_{step:08d}.json"
        write_suspects(path, {"stage": self.stage, "step": step, "tensor": tensor}, suspects, self.tokenizer)
        return f"Rows and values: {path}"

    def last_good(self) -> str:
        """The newest checkpoint in words."""
        saved = [*step_checkpoints(self.run)[-1:], *(p for p in (self.run / "best",) if p.is_dir())]
        return f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint has been saved yet"
