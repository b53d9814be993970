"""What the three loops call: order of the data, micro-batches, seeds, learning rates, and what happens at the end.

Everything about order is a pure function of (seed, position), so that a run can be taken up at any step without
replaying it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config.configs import RunConfig
from training.engine.runtime import Runtime
from training.storage.saving import capture_rng, restore_rng
from utils.data import batching


def steps_per_epoch(lengths: np.ndarray, config: RunConfig) -> int:
    """Optimizer steps that take every row once; their sizes differ by at most one row."""
    return batching.steps_per_epoch(len(lengths), config.global_batch_size)


def optimizer_steps(lengths: np.ndarray, config: RunConfig) -> int:
    """Optimizer steps of a run over rows of the given lengths: what the epochs hold, or fewer with --max-steps."""
    steps = steps_per_epoch(lengths, config) * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def data_order(lengths: np.ndarray, config: RunConfig, start: int, stop: int) -> Iterator[np.ndarray]:
    """Row indices of optimizer steps start .. stop - 1, see `utils.data.batching.epoch_batches`."""
    size = steps_per_epoch(lengths, config)
    for epoch in range(start // size, math.ceil(stop / size)):
        batches = batching.epoch_batches(lengths, config.global_batch_size, config.seed, epoch)
        yield from batches[max(0, start - epoch * size) : stop - epoch * size]


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, config: RunConfig, sequences: np.ndarray | None = None
) -> list[np.ndarray]:
    """Cut the rows of one optimizer step, sorted by length, into passes of at most --batch-size rows, or of at most
    --tokens-per-micro-batch; see `utils.data.batching.micro_batches`."""
    return batching.micro_batches(rows, lengths, config.batch_size, config.tokens_per_micro_batch, sequences)


def evaluation_rows(lengths: np.ndarray, config: RunConfig) -> np.ndarray:
    """The held-out rows of an evaluation, always the same, sorted by length."""
    rows = np.arange(min(len(lengths), config.eval_examples))
    return rows[np.argsort(lengths[rows], kind="stable")]


def evaluation_batches(lengths: np.ndarray, config: RunConfig) -> list[np.ndarray]:
    """`evaluation_rows` in micro-batches."""
    return micro_batches(evaluation_rows(lengths, config), lengths, config)


def prompt_order(count: int, batch: int, seed: int, iteration: int) -> np.ndarray:
    """Prompts of PPO iteration 1, 2, ...: the next `batch` of one shuffled pass after another."""
    first = (iteration - 1) * batch
    passes = range(first // count, (first + batch - 1) // count + 1)
    shuffled = np.concatenate([np.random.default_rng([seed, 2, p]).permutation(count) for p in passes])
    offset = first - passes.start * count
    return shuffled[offset : offset + batch]


def cosine_with_warmup(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of optimiser step `step` = 0, 1, ...: linear warm-up to peak, cosine down to floor at `total`.

    `peak * (step + 1) / warmup` while warming, so that the first step is not wasted on a rate of 0; floor from `total`
    on. One step is one optimiser step, never a micro-batch.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= total:
        return floor
    progress = (step - warmup) / (total - warmup)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))


def linear_to_zero(update: int, total: int) -> float:
    """Factor on the learning rate of PPO iteration `update` = 1, ..., total: `1 - (update - 1) / total`.

    Source: OAI train_policy.py. The first iteration has the full rate and the last 1 / total of it.
    """
    return max(0.0, 1.0 - (update - 1) / total)


# Purposes of `row_seeds` beside PPO's iterations 1, 2, ...
SFT_SAMPLES, SCALE_SAMPLES, EVALUATION_SAMPLES = -1, -2, -3


def row_seeds(seed: int, purpose: int, rows: int) -> list[int]:
    """Sampling seeds of `rows` responses; `purpose` is the iteration, or one of the negative numbers above."""
    sequence = np.random.SeedSequence([seed, purpose & 0xFFFFFFFF])
    return sequence.generate_state(rows, np.uint64).astype(np.int64).tolist()


# Below, `trainer` is one of `training.trainers`.


def step_metrics(trainer: Any, norms: dict[str, Tensor]) -> dict[str, float | Tensor]:
    """Figures of an optimizer step of SFT and reward model; `norms` is empty where the batch was skipped."""
    return {
        "train/grad_norm": norms.get("model", math.nan),
        "train/lr": trainer.optimizer.param_groups[0]["lr"],
        "train/epoch": (trainer.step + 1) / steps_per_epoch(trainer.train.lengths, trainer.config),
    }


def trainer_state(trainer: Any) -> dict[str, Any]:
    """What every stage needs to go on from a checkpoint, beside the weights."""
    return {
        "step": trainer.step,
        "best": trainer.best,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.runtime.scaler_state(),
        "rng": capture_rng(),
    } | trainer.guard.state()


def resume_trainer(
    state: dict[str, Any] | None, optimizer: torch.optim.Optimizer, runtime: Runtime
) -> tuple[int, float]:
    """Put optimizer and random generators back; returns (step, best so far, lower is better). None starts afresh.

    The optimizer's settings are those of this run's flags, which --resume-override may have changed.
    """
    if state is None:
        return 0, math.inf
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    runtime.restore_scaler(state["scaler"])
    restore_rng(state["rng"])
    return state["step"], state["best"]


def save_or_stop(trainer: Any, last: bool) -> bool:
    """At the end of a step: write the checkpoint that is due. True after a signal: it is written, and the run ends.

    last: whether the step was the run's last, which `finished` saves.
    """
    stop = bool(trainer.interrupt.signal) and not last
    if trainer.step % trainer.config.save_every == 0 or stop:
        trainer.saver.save_step(trainer.step, trainer.state())
    if stop:
        saved = "saved" if trainer.saver.saved_step == trainer.step else "the step could not be saved"
        tqdm.write(f"stopped at step {trainer.step}; {saved}. Go on with --resume {trainer.run}")
    return stop


def finished(trainer: Any) -> int:
    """Write final/; returns exit code 0."""
    tqdm.write(f"done: {trainer.saver.save_final(trainer.step, trainer.state())}")
    return 0
