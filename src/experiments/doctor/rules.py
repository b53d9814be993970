"""What a finding of the doctor is, what all stages share, and the rules for SFT and reward-model runs.

A rule looks at a run's record and returns a Finding (it is broken, and here it shows), Unclear (too early or too little
to tell), or None (healthy). The ranges are alarms and not goals. Where a single point may leave its range by chance, a
rule asks for behaviour that lasts; docs/doctor.md says which and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.doctor.record import RunRecord


@dataclass(frozen=True)
class Cause:
    """A likely cause, and what to change: flags by name."""

    why: str
    change: str


@dataclass(frozen=True)
class Finding:
    """Something is wrong, and where it shows.

    Attributes:
        code: short name, the same in docs/doctor.md and in the picture's file name.
        title: one sentence.
        tag: the figure that betrays it.
        step: the first step at which it holds.
        value: the figure there.
        low, high: the range of healthy values, None where it is open.
        causes: likeliest first.
        notes: further evidence, a sentence each.
        beside: tags that belong into the picture beside the figure.
        of: the record that the figures come from, when it is not that of the run itself.
    """

    code: str
    title: str
    tag: str
    step: int
    value: float
    low: float | None
    high: float | None
    causes: tuple[Cause, ...]
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    of: RunRecord | None = None


@dataclass(frozen=True)
class Unclear:
    """A rule that cannot judge this run: its code, and what is missing."""

    code: str
    missing: str


Rule = Callable[[RunRecord], "Finding | Unclear | None"]

# Figures that have no value for good reasons: a correlation of constants, a variance explained of none, word pairs of
# answers without any.
_MAY_BE_UNDEFINED = ("corr", "explained_var", "kendall_tau", "distinct_2", "repetition", "duplicate_rate")
_SUSPICIOUS_LR = 5.0  # times the preset's default


def diagnose(record: RunRecord, rules: tuple[Rule, ...]) -> tuple[list[Finding], list[Unclear]]:
    """All findings in the order of the rules, and what could not be judged."""
    results = [rule(record) for rule in rules]
    return [r for r in results if isinstance(r, Finding)], [r for r in results if isinstance(r, Unclear)]


def lasting(bad: np.ndarray, count: int) -> int | None:
    """The index at which `bad` [N] holds for the first time and then for `count` points in a row, or None."""
    run = 0
    for i, holds in enumerate(bad):
        run = run + 1 if holds else 0
        if run == count:
            return i - count + 1
    return None


def trailing_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Mean of each value and its `count` - 1 predecessors, [N] -> [N - count + 1]."""
    return np.convolve(values, np.full(count, 1 / count), mode="valid")


def mean_outside(values: np.ndarray, count: int, low: float = -math.inf, high: float = math.inf) -> int | None:
    """Where a mean of `count` values leaves [low, high] for the first time: the first of them that is outside itself.

    Args:
        values: [N]. count: at most N, or nothing is found.
    """
    if len(values) < count:
        return None
    smooth = trailing_mean(values, count)
    left = np.flatnonzero((smooth < low) | (smooth > high))
    if not len(left):
        return None
    window = values[left[0] : left[0] + count]
    return int(left[0] + np.flatnonzero((window < low) | (window > high))[0])


def likeliest_first(suspects: list[Cause | None], usual: list[Cause]) -> tuple[Cause, ...]:
    """Causes: those that the run's own flags point at, then the usual ones."""
    return tuple(cause for cause in [*suspects, *usual] if cause is not None)


def high_lr(record: RunRecord, *settings: str) -> Cause | None:
    """A learning rate far above the preset's default, when there is one."""
    found = [(record.times_default(name), name) for name in settings or ("lr",)]
    times, name = max(found)
    if times < _SUSPICIOUS_LR:
        return None
    flag, value = "--" + name.replace("_", "-"), float(record.config[name])
    change = f"{flag} {record.default(name):g} instead of {value:g}"
    return Cause(f"the learning rate is {times:.3g} times the default of this preset", change)


def low_lr(record: RunRecord) -> Cause | None:
    """A learning rate far below the preset's default, when there is one."""
    times = record.times_default("lr")
    if times > 1 / _SUSPICIOUS_LR:
        return None
    change = f"--lr {record.default('lr'):g} instead of {float(record.config['lr']):g}"
    return Cause("the learning rate is far below the default of this preset", change)


def not_a_number(record: RunRecord) -> Finding | None:
    """A figure that must have a value is NaN or infinite."""
    broken = [
        (int(s.steps[np.flatnonzero(~np.isfinite(s.values))[0]]), tag)
        for tag, s in record.series.items()
        if not np.isfinite(s.values).all() and not any(word in tag for word in _MAY_BE_UNDEFINED)
    ]
    if not broken:
        return None
    step, tag = min(broken)
    also = sorted({other for at, other in broken if at == step} - {tag})
    half = record.precision == "fp16"
    return Finding(
        "not-a-number", "a figure is NaN or infinite", tag, step, math.nan, None, None,
        likeliest_first(
            [high_lr(record, *(("lr", "critic_lr") if record.stage == "ppo" else ("lr",))),
             Cause("fp16 has overflowed", "--dtype fp32, or bf16 where the device has it") if half else None],
            [Cause("the learning rate is too high, or warm-up too short", "lower --lr"),
             Cause("a reward function or a row of the data gives values that are not finite",
                   "look at the rows with -t dataset; print what --reward-fn returns")],
        ),
        (f"at the same step also: {', '.join(also)}",) if also else (),
    )  # fmt: skip


def gradient_spikes(tags: tuple[str, ...]) -> Rule:
    """The rule that gradients stay near their own recent size: three or more norms above ten times the median of the
    ten before."""

    def rule(record: RunRecord) -> Finding | None:
        for tag in tags:
            norms = record[tag]
            before = [np.median(norms.values[max(0, i - 10) : i]) if i >= 5 else np.inf for i in range(len(norms))]
            spikes = np.flatnonzero(norms.values > 10 * np.array(before))
            if len(spikes) >= 3:
                at = spikes[0]
                return Finding(
                    "gradient-spikes", f"{tag} jumps again and again to more than ten times its usual size", tag,
                    int(norms.steps[at]), float(norms.values[at]), None, 10 * float(before[at]),
                    likeliest_first(
                        [high_lr(record)],
                        [Cause("the learning rate is too high for this batch size",
                               "lower --lr, raise --global-batch-size"),
                         Cause("single rows are unlike all others", "look at the data with -t dataset")],
                    ),
                )  # fmt: skip
        return None

    return rule


def halfway(record: RunRecord) -> bool:
    """Whether at least half of the planned steps are done."""
    return record.finished or 0 < record.planned_steps <= 2 * record.last_step


def _half_of(record: RunRecord) -> str:
    return f"half of the {record.planned_steps} steps" if record.planned_steps else "the first steps"


# ---------------------------------------------------------------------------------------------------------------------
# SFT and the reward model
# ---------------------------------------------------------------------------------------------------------------------


def diverges(tag: str) -> Rule:
    """The rule that training does not undo what the model could do: the training loss stays within 0.5 nats of the
    held-out loss `tag` of step 0, and (mean of five) of its own lowest."""

    def rule(record: RunRecord) -> Finding | None:
        held_out, train = record[tag], record["train/loss"]
        found = []  # (step, value, upper end of the healthy range, what happens)
        if len(held_out) and held_out.steps[0] == 0:
            high = float(held_out.values[0]) + 0.5
            above = np.flatnonzero(train.values > high)[:1]
            found += [(train.steps[at], train.values[at], high, "training makes the model worse") for at in above]
        smooth = trailing_mean(train.values, 5) if len(train) >= 5 else np.zeros(0)
        lowest = np.minimum.accumulate(smooth)
        for start in np.flatnonzero(smooth > lowest + 0.5)[:1]:
            high = float(lowest[start]) + 0.5
            at = start + np.flatnonzero(train.values[start : start + 5] > high)[0]
            found.append((train.steps[at], train.values[at], high, "the training loss climbs after it has fallen"))
        if not found:
            return None
        step, value, high, title = min(found)
        return Finding(
            "diverges", title, "train/loss", int(step), float(value), None, round(high, 4), _too_far(record),
            beside=(tag, "train/grad_norm"),
        )  # fmt: skip

    return rule


def forgets(record: RunRecord) -> Finding | None:
    """A reward model keeps what it has learned: held-out accuracy within three standard errors of its best, or a
    held-out loss within 0.05 of its best. (With the loss alone it would be overfitting: accuracy holds.)"""
    accuracy, loss = record["eval/accuracy"], record["eval/nll"]
    if len(accuracy) != len(loss):
        return None
    low = np.maximum.accumulate(accuracy.values) - 3 * accuracy_error(record)
    bad = np.flatnonzero((accuracy.values < low) & (loss.values > np.minimum.accumulate(loss.values) + 0.05))
    if not len(bad):
        return None
    at = int(bad[0])
    return Finding(
        "forgets", "the reward model loses accuracy while it trains", "eval/accuracy", int(accuracy.steps[at]),
        float(accuracy.values[at]), round(float(low[at]), 3), None, _too_far(record), beside=("eval/nll", "train/loss"),
    )  # fmt: skip


def _too_far(record: RunRecord) -> tuple[Cause, ...]:
    """What makes an optimizer jump past what it has found."""
    return likeliest_first(
        [high_lr(record)],
        [Cause("the learning rate is too high, or the warm-up too short", "lower --lr, raise --warmup-steps"),
         Cause("the batches are too small", "raise --global-batch-size"),
         Cause("single rows are unlike all others", "look at the data with -t dataset")],
    )  # fmt: skip


def not_learning(tag: str) -> Rule:
    """The rule that the held-out loss `tag` falls: to below 0.98 of its start, at all evaluations but one, and at the
    last one once half of the training is done."""

    def rule(record: RunRecord) -> Finding | Unclear | None:
        held_out = record[tag]
        if len(held_out) < 2:
            return Unclear("not-learning", f"two values of {tag}")
        bad = held_out.values[1:] > 0.98 * held_out.values[0]
        if bad.sum() < 2 and not (bad[-1] and halfway(record)):
            return None
        at = int(np.flatnonzero(bad)[0]) + 1
        return Finding(
            "not-learning", "the held-out loss is no lower than before training", tag, int(held_out.steps[at]),
            float(held_out.values[at]), None, float(0.98 * held_out.values[0]),
            likeliest_first(
                [high_lr(record), low_lr(record)],
                [Cause("the learning rate is too low or too high", "another --lr"),
                 Cause("nothing that matters is trained", "--freeze none, or a larger --lr for adapters"),
                 Cause("the data is not what it should be", "look at it with -t dataset")],
            ),
            beside=("train/loss",),
        )  # fmt: skip

    return rule


def overfitted(tag: str, margin: float) -> Rule:
    """The rule that the held-out loss `tag` ends within `margin` nats of its best; the last two evaluations count."""

    def rule(record: RunRecord) -> Finding | None:
        held_out = record[tag]
        best = held_out.values.argmin() if len(held_out) else 0
        after = held_out.values[best + 1 :]
        if len(after) < 2 or not (after[-2:] > held_out.values[best] + margin).all():
            return None
        at = best + 1 + int(np.flatnonzero(after > held_out.values[best] + margin)[0])
        return Finding(
            "overfitted", "the held-out loss rises again", tag, int(held_out.steps[at]), float(held_out.values[at]),
            None, float(held_out.values[best]) + margin,
            likeliest_first(
                [Cause(f"{record.config['epochs']} passes over the data", "fewer --epochs")
                 if record.config.get("epochs", 1) > 1 else None, high_lr(record)],
                [Cause("too many steps for so little data", "take best/ of this run; fewer --epochs or a lower --lr")],
            ),
            beside=("train/loss",),
        )  # fmt: skip

    return rule


def sft_never_ends(record: RunRecord) -> Finding | Unclear | None:
    """Samples of an SFT model end with EOS: at least 0.95 of them once half of the training is done."""
    rate = record["resp/eos_rate"]
    if not len(rate):
        text = record.config.get("dataset") == "demo-text"
        return None if text else Unclear("never-ends", "resp/eos_rate: this run drew no samples")
    if not halfway(record):
        return Unclear("never-ends", _half_of(record))
    if rate.values[-1] >= 0.95:
        return None
    late = np.flatnonzero((rate.steps > 0) & (rate.values < 0.95))
    at = late[0] if len(late) else len(rate) - 1
    # A model without EOS writes the next turn of the dialogue itself; one whose answers are long is only cut.
    last = [row["response"] for row in record.samples if row.get("step") == record.samples[-1].get("step")]
    runs_on = sum("Human:" in text for text in last)
    masked = Cause(
        "the EOS is no target of the loss: masked as padding, or missing in the rows",
        "look for the EOS in -t dataset; take labels from lengths, never from the PAD id",
    )
    short = Cause("the samples are cut before they can end", "raise --sample-tokens; compare with the data's lengths")
    early = Cause("too little training", "more --epochs")
    never = rate.values[-1] < 0.5
    return Finding(
        "never-ends", "the model does not end its answers", "resp/eos_rate", int(rate.steps[at]),
        float(rate.values[at]), 0.95, None, (masked, short, early) if never or runs_on else (short, early, masked),
        (f"of the last {len(last)} samples {runs_on} go on with a turn of the human",) if last else (),
        beside=("resp/len_mean",),
    )  # fmt: skip


def repeats_itself(record: RunRecord) -> Finding | None:
    """Samples of an SFT model do not loop: less than 0.3 of their tokens repeat what stands just before."""
    repetition = record["resp/repetition"]
    at = lasting((repetition.values > 0.3) & (repetition.steps > 0), 2)
    if at is None or repetition.values[-1] <= 0.3:
        return None
    return Finding(
        "repeats-itself", "the samples repeat themselves", "resp/repetition", int(repetition.steps[at]),
        float(repetition.values[at]), None, 0.3,
        likeliest_first(
            [high_lr(record)],
            [Cause("the samples never end and loop", "see never-ends"),
             Cause("the data repeats itself, or too little training", "look at it with -t dataset; more --epochs")],
        ),
    )  # fmt: skip


def reward_scale_at_start(record: RunRecord) -> Finding | None:
    """Before training, margins of normalised scores have deviation sqrt(2) or so; above 3 the head starts too large."""
    margin = record["eval/margin_sd"]
    if not len(margin) or margin.steps[0] > 0 or margin.values[0] <= 3:
        return None
    return Finding(
        "scale-off", "the scores are too far apart before any training", "eval/margin_sd", int(margin.steps[0]),
        float(margin.values[0]), None, 3.0,
        (Cause("the head starts too large, or its output was not normalised at the start",
               "initialise it with deviation 1/sqrt(d + 1); more --normalise-prompts"),),
    )  # fmt: skip


def accuracy_error(record: RunRecord) -> float:
    """Standard error of a held-out accuracy near 0.5."""
    return math.sqrt(0.25 / max(1, int(record.config.get("eval_examples") or 256)))


def reward_at_chance(record: RunRecord) -> Finding | Unclear | None:
    """Held-out accuracy of a reward model above chance, and above what the length alone would give."""
    accuracy, longer = record["eval/accuracy"], record["eval/longer_wins"]
    if not len(accuracy) or not halfway(record):
        return Unclear("reward-at-chance", "an evaluation after " + _half_of(record))
    bar, last = 0.5 + 2 * accuracy_error(record), float(accuracy.values[-1])
    by_length = max(longer.values[-1], 1 - longer.values[-1]) if len(longer) else 0.0
    if last > max(bar, by_length):
        return None
    good = np.flatnonzero((accuracy.steps == 0) | (accuracy.values > max(bar, by_length)))
    at = min(int(good[-1]) + 1 if len(good) else 0, len(accuracy) - 1)
    mixed = Cause("chosen and rejected are mixed up in the data, or say nothing",
                  "look at pairs with -t dataset --stage rm")  # fmt: skip
    suspects = [high_lr(record), low_lr(record)]
    if last < 1 - bar:
        title = "the reward model is worse than chance"
        usual = [Cause("chosen and rejected are swapped", "swap them in the data; look at -t dataset --stage rm")]
    elif last <= bar:
        title = "the reward model is no better than chance"
        usual = [mixed, Cause("the score is read at a prompt or padding column", "see where with -t reward"),
                 Cause("too few rows or steps", "more data; more --max-steps")]  # fmt: skip
    else:
        title = "the reward model is no better than the length of the answers"
        usual = [Cause("too few rows or steps to learn more than the length", "more data; more --max-steps"), mixed]
    return Finding(
        "reward-at-chance", title, "eval/accuracy", int(accuracy.steps[at]), float(accuracy.values[at]),
        round(max(bar, by_length), 3), None, likeliest_first(suspects, usual),
        (f"chance over {record.config.get('eval_examples')} held-out prompts is up to {bar:.3f}, "
         f"the longest or the shortest wins {by_length:.3f}",),
        beside=("eval/nll",),
    )  # fmt: skip


def constant_score(record: RunRecord) -> Finding | None:
    """The raw scores of SFT samples differ from one another."""
    spread = record["norm/raw_sd"]
    if not len(spread) or spread.values[-1] > 1e-3:
        return None
    return Finding(
        "score-constant", "every answer gets the same score", "norm/raw_sd", int(spread.steps[-1]),
        float(spread.values[-1]), 1e-3, None,
        (Cause("the score is read at a prompt or padding column", "see where with -t reward"),
         Cause("the head is not trained", "--freeze none; a larger --lr")),
    )  # fmt: skip


def miscalibrated(record: RunRecord) -> Finding | None:
    """Calibration error of the last two evaluations below 0.15."""
    error = record["eval/ece"].values
    steps = record["eval/ece"].steps
    late = steps > 0
    at = lasting(late & (error > 0.15), 2)
    if at is None or error[-1] <= 0.15:
        return None
    return Finding(
        "miscalibrated", "the reward model is far surer, or less sure, than it is right", "eval/ece", int(steps[at]),
        float(error[at]), None, 0.15,
        likeliest_first(
            [high_lr(record), Cause(f"{record.config['epochs']} passes over the data", "--epochs 1")
             if record.config.get("epochs", 1) > 1 else None],
            [Cause("overfitting", "--epochs 1, a lower --lr, more data")],
        ),
        beside=("eval/margin_sd",),
    )  # fmt: skip


def length_bias(record: RunRecord) -> Finding | None:
    """Scores do not follow the length of the answer alone."""
    corr = record["eval/length_corr"]
    at = lasting((corr.steps > 0) & (abs(corr.values) > 0.8), 2)
    if at is None or abs(corr.values[-1]) <= 0.8:
        return None
    return Finding(
        "length-bias", "the scores are little more than the length of the answer", "eval/length_corr",
        int(corr.steps[at]), float(corr.values[at]), -0.8, 0.8,
        (Cause("in the data the longer (or the shorter) answer nearly always wins",
               "balance the pairs by length; compare eval/longer_wins"),),
    )  # fmt: skip


SFT_RULES: tuple[Rule, ...] = (
    not_a_number, diverges("eval/loss"), not_learning("eval/loss"), sft_never_ends, overfitted("eval/loss", 0.1),
    repeats_itself, gradient_spikes(("train/grad_norm",)),
)  # fmt: skip
RM_RULES: tuple[Rule, ...] = (
    not_a_number, constant_score, reward_scale_at_start, reward_at_chance, diverges("eval/nll"), forgets,
    not_learning("eval/nll"), length_bias, overfitted("eval/nll", 0.1), miscalibrated,
    gradient_spikes(("train/grad_norm",)),
)  # fmt: skip
