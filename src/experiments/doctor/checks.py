"""What the doctor's table cannot say as a sign: checks that compare several figures.

A check returns what it has seen (it is broken, and here it shows), a text (what is missing to tell), or None (healthy).
"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter

import numpy as np

from experiments.doctor.ranges import ALARM, ENDS, KEEPS_LENGTH, SAMPLER_DRIFT, Range
from experiments.doctor.record import RunRecord, Series
from experiments.doctor.signs import Finding, Sign, lasting, mean_outside, trailing_mean

# Figures that have no value for good reasons: a correlation of constants, a variance explained of none, word pairs of
# answers without any.
_MAY_BE_UNDEFINED = ("corr", "explained_var", "kendall_tau", "distinct_2", "repetition", "duplicate_rate")
_LEARNED = 0.01  # nats a token: what has so low a loss before training has nothing to learn from these data
# Half the squared difference of two log-probabilities that rounding alone may cause: 1e-5 in fp32, 2e-2 in half.
_FIRST_PASS = Sign("policy/approxkl_epoch1", Range(high=1e-10), half=2e-4, floor=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# All stages
# ---------------------------------------------------------------------------------------------------------------------


def not_a_number(record: RunRecord) -> Finding | None:
    """A figure that must have a value is NaN or infinite."""
    broken = sorted(
        (int(series.steps[~np.isfinite(series.values)][0]), tag)
        for tag, series in record.series.items()
        if not np.isfinite(series.values).all() and not any(word in tag for word in _MAY_BE_UNDEFINED)
    )
    if not broken:
        return None
    step, tag = broken[0]
    also = ", ".join(other for at, other in broken[1:] if at == step)
    return Finding(tag, step, math.nan, notes=(f"at the same step also: {also}",) if also else ())


def gradient_spikes(record: RunRecord) -> Finding | None:
    """Three or more gradient norms above ten times the median of the ten before.

    A median of (nearly) 0 is no usual size: nothing was learned before, in --critic-warmup or from a constant reward.
    """
    for tag in ("train/grad_norm", "grad_norm/actor", "grad_norm/critic"):
        norms = record[tag]
        usual = np.array([np.median(norms.values[max(0, i - 10) : i]) if i >= 5 else 0 for i in range(len(norms))])
        known = usual > max(1e-6, 1e-2 * np.median(norms.values)) if len(norms) else False
        spikes = np.flatnonzero(known & (norms.values > 10 * usual))
        if len(spikes) >= 3:
            return Finding(tag, *norms.point(spikes[0]), high=10 * float(usual[spikes[0]]), case=tag)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# SFT and the reward model
# ---------------------------------------------------------------------------------------------------------------------


def _held_out(record: RunRecord) -> tuple[str, Series]:
    """The held-out loss of a stage."""
    tag = "eval/nll" if record.stage == "rm" else "eval/loss"
    return tag, record[tag]


def _halfway(record: RunRecord) -> bool:
    """Whether at least half of the planned steps are done."""
    return record.finished or 0 < record.planned_steps <= 2 * record.last_step


def _half_of(record: RunRecord) -> str:
    return f"half of the {record.planned_steps} steps" if record.planned_steps else "the first steps"


def diverges(record: RunRecord) -> Finding | None:
    """The training loss is more than 0.5 nats above the held-out loss of step 0, or (mean of five) its own lowest."""
    (_, held_out), train = _held_out(record), record["train/loss"]
    found = []  # (index, upper end of the healthy range, what happens)
    if len(held_out) and held_out.steps[0] == 0:
        high = float(held_out.values[0]) + 0.5
        found += [(at, high, "training makes the model worse") for at in np.flatnonzero(train.values > high)[:1]]
    smooth = trailing_mean(train.values, 5)
    lowest = np.minimum.accumulate(smooth)
    for start in np.flatnonzero(smooth > lowest + 0.5)[:1]:
        high = float(lowest[start]) + 0.5
        at = start + np.flatnonzero(train.values[start : start + 5] > high)[0]
        found.append((at, high, "the training loss climbs after it has fallen"))
    if not found:
        return None
    at, high, case = min(found)
    return Finding("train/loss", *train.point(at), high=round(high, 4), case=case)


def forgets(record: RunRecord) -> Finding | None:
    """Held-out accuracy is three standard errors below its best, and the held-out loss 0.05 above its best. (With the
    loss alone it would be overfitting: accuracy holds.)"""
    accuracy, loss = record["eval/accuracy"], record["eval/nll"]
    if len(accuracy) != len(loss):
        return None
    low = np.maximum.accumulate(accuracy.values) - 3 * _accuracy_error(record)
    bad = np.flatnonzero((accuracy.values < low) & (loss.values > np.minimum.accumulate(loss.values) + 0.05))
    return Finding("eval/accuracy", *accuracy.point(bad[0]), low=round(float(low[bad[0]]), 3)) if len(bad) else None


def not_learning(record: RunRecord) -> Finding | str | None:
    """The held-out loss is above 0.98 of its start at two evaluations, or at the last one of half of the training."""
    tag, held_out = _held_out(record)
    if len(held_out) < 2:
        return f"two values of {tag}"
    start = float(held_out.values[0])
    if start < _LEARNED:
        return f"a held-out loss to be lowered: {tag} is {start:.3g} before training"
    high = 0.98 * start
    bad = np.flatnonzero(held_out.values[1:] > high) + 1
    found = len(bad) > 1 or (held_out.values[-1] > high and _halfway(record))
    return Finding(tag, *held_out.point(bad[0]), high=high) if found else None


def overfitted(record: RunRecord) -> Finding | None:
    """The last two held-out losses are more than 0.1 nats above the best."""
    tag, held_out = _held_out(record)
    high = min(held_out.values, default=math.inf) + 0.1
    best = held_out.values.argmin() if len(held_out) else 0
    bad = held_out.values > high
    bad[:best] = False  # before the best
    return Finding(tag, *held_out.point(bad.argmax()), high=float(high)) if len(bad) > 1 and bad[-2:].all() else None


def never_ends(record: RunRecord) -> Finding | str | None:
    """Less than 0.95 of an SFT model's samples end with EOS, once half of the training is done.

    A model without EOS writes the next turn of the dialogue itself; one whose answers are long is only cut.
    """
    rate = record["resp/eos_rate"]
    if not len(rate):
        return None if record.config.get("dataset") == "demo-text" else "resp/eos_rate: this run drew no samples"
    if not _halfway(record):
        return _half_of(record)
    if rate.values[-1] >= ENDS.low:
        return None
    late = np.flatnonzero((rate.steps > 0) & (rate.values < ENDS.low))
    last = [row["response"] for row in record.samples if row.get("step") == record.samples[-1].get("step")]
    run_on = sum("Human:" in text for text in last)
    note = f"of the last {len(last)} samples {run_on} go on with a turn of the human"
    return Finding(
        "resp/eos_rate", *rate.point(late[0] if len(late) else -1), low=ENDS.low, notes=(note,) if last else (),
        case="no EOS" if run_on or rate.values[-1] < 0.5 else "cut",
    )  # fmt: skip


def _accuracy_error(record: RunRecord) -> float:
    """Standard error of a held-out accuracy near 0.5."""
    return math.sqrt(0.25 / max(1, int(record.config.get("eval_examples") or 256)))


def reward_at_chance(record: RunRecord) -> Finding | str | None:
    """Held-out accuracy of a reward model is that of chance, or no better than what the length alone would give."""
    accuracy, longer = record["eval/accuracy"], record["eval/longer_wins"]
    if not len(accuracy) or not _halfway(record):
        return "an evaluation after " + _half_of(record)
    chance, last = 0.5 + 2 * _accuracy_error(record), accuracy.values[-1]
    by_length = max(longer.values[-1], 1 - longer.values[-1]) if len(longer) else 0.0
    bar = max(chance, by_length)
    if last > bar:
        return None
    good = np.flatnonzero((accuracy.steps == 0) | (accuracy.values > bar))
    at = min(int(good[-1]) + 1 if len(good) else 0, len(accuracy) - 1)
    better = "no better than the length of the answers" if last > chance else "no better than chance"
    note = (
        f"chance over {record.config.get('eval_examples')} held-out prompts is up to {chance:.3f}, "
        f"the longest or the shortest wins {by_length:.3f}"
    )
    return Finding(
        "eval/accuracy", *accuracy.point(at), low=float(round(bar, 3)), notes=(note,),
        case="worse than chance" if last < 1 - chance else better,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# PPO
# ---------------------------------------------------------------------------------------------------------------------


def ratio_not_one(record: RunRecord) -> Finding | str | None:
    """Before the first step of an iteration the policy is not the one that sampled: approxkl of the first pass."""
    if int(record.config.get("minibatches") or 1) > 1:
        return "one minibatch a pass: with several, the first pass holds steps already taken"
    seen = _FIRST_PASS(record)
    if seen is None:
        return None
    first = record[seen.tag].values
    kl, drift = (max(record[tag].values[:1], default=0.0) for tag in ("objective/kl_k3", SAMPLER_DRIFT))
    note = (
        f"it is so in {(first > seen.high).sum()} of {len(first)} iterations; KL to the reference at iteration 1 is "
        f"{kl:.3g}, the sampler's log-probabilities are off by up to {drift:.3g}, the largest ratio is "
        f"{max(record['policy/ratio_max'].values, default=1):.3g}"
    )
    return replace(seen, notes=(note,))


def reward_model_at_chance(record: RunRecord) -> Finding | str | None:
    """What the reward model's own run says about its held-out accuracy."""
    config = record.config
    if config.get("critic") == "none" or (config.get("reward_fn") and not config.get("reward_fn_weight")):
        return None
    if record.reward is None:
        return "the reward model's run, which is not where it was (-c)"
    seen = reward_at_chance(record.reward)
    return replace(seen, of=record.reward) if isinstance(seen, Finding) else seen


def scores_alike(record: RunRecord) -> Finding | None:
    """Three iterations in a row, or all of fewer, have scores of a deviation below 0.05, where 1 is usual; those of a
    reward function alone, whose scale is its own, below a twentieth of their start, or what rounding makes."""
    tag, mean = "objective/score_sd", record["objective/score"].values
    deviation = record[tag].values
    if not len(deviation) or len(mean) != len(deviation):
        return None
    by_function = bool(record.config.get("reward_fn") and not record.config.get("reward_fn_weight"))
    rounding, start = 1e-6 * np.maximum(1, abs(mean)), 0.05 * float(np.median(deviation[:3]))
    low = np.maximum(rounding, start) if by_function else np.full(len(mean), 0.05)
    at = lasting(deviation < low, min(3, len(low)))
    if at is None:
        return None
    case = "response gets the same score"
    if at == 0:
        case = "reward of --reward-fn is the same" if by_function else "score of the reward model is the same"
    told = mean[at : at + 3]
    note = f"the score is {told[0]:.6g}"
    if not _constant(told):
        note = f"the score is alike within an iteration and differs between them: {', '.join(f'{x:.6g}' for x in told)}"
    return Finding(tag, *record[tag].point(at), low=float(low[at]), notes=(note,), case=case)


def steps_too_large(record: RunRecord) -> Finding | None:
    """One of four figures is outside for three iterations (the first one of a healthy run may be); the earliest."""
    tags = ("policy/approxkl", "policy/clipfrac", "policy/ratio_mean", "policy/ratio_max")
    shown = [seen for tag in tags if (seen := Sign(tag, ALARM[tag], in_a_row=3)(record))]
    if not shown:
        return None
    first, *others = sorted(shown, key=attrgetter("step"))
    return replace(first, notes=tuple(f"also outside: {seen.tag} from iteration {seen.step}" for seen in others))


def does_not_move(record: RunRecord) -> Finding | str | None:
    """After five iterations of the actor neither approxkl was above 1e-7 nor KL above 0.01 at any."""
    kl, approx = record["objective/kl_k3"], record["policy/approxkl"]
    moving = kl.values[kl.steps > int(record.config.get("critic_warmup") or 0)]
    if len(moving) < 5:
        return "five iterations"
    if moving.max() > 0.01 or max(approx.values, default=0) > 1e-7:
        return None
    return Finding("objective/kl_k3", *kl.point(-1), low=0.01)


def gold_falls(record: RunRecord) -> Finding | str | None:
    """Where a gold reward is known, the last evaluation has lost half of what gold had gained, or a quarter of it after
    the one before had lost a tenth, and the proxy has not fallen with it."""
    gold, proxy = record["eval/gold"], record["eval/score"]
    if not len(gold):
        return "eval/gold (--eval-reward-fn); without it, read samples.jsonl as it goes on"
    if len(gold) < 3 or len(proxy) != len(gold):
        return "three evaluations"
    if _constant(gold.values):
        return f"a gold reward that varies: eval/gold is always {gold.values[0]:.6g} (--eval-reward-fn)"
    peak = int(gold.values.argmax())
    if peak == 0 or not _gains(proxy) or proxy.values[-1] < proxy.values[peak] - 0.1:
        return None
    best = gold.values[peak]
    gained = best - gold.values[0]
    lost = (best - gold.values) / gained
    lost[:peak] = 0
    if lost[-1] <= 0.25 or (lost[-1] <= 0.5 and lost[-2] <= 0.1):
        return None
    note = (
        f"gold was best at iteration {gold.steps[peak]} with {best:.2f} and is {gold.values[-1]:.2f} at "
        f"the end; the score went from {proxy.values[peak]:.2f} to {proxy.values[-1]:.2f}"
    )
    at = (lost > 0.1).argmax()
    return Finding("eval/gold", *gold.point(at), low=round(float(best - 0.1 * gained), 3), notes=(note,))


def gold_never_rises(record: RunRecord) -> Finding | None:
    """The best gold reward is that of the start, and the trained one rises."""
    gold, proxy = record["eval/gold"], record["eval/score"]
    found = len(proxy) == len(gold) > 2 and not _constant(gold.values) and gold.values.argmax() == 0 and _gains(proxy)
    return Finding("eval/gold", *gold.point(1), low=float(gold.values[0])) if found else None


def _constant(values: np.ndarray) -> bool:
    """Whether values [N] differ by no more than rounding."""
    return bool(np.ptp(values) <= 1e-6 * max(1.0, abs(values).max()))


def _gains(proxy: Series) -> bool:
    """By 0.3 over the run: before that, gold moves by chance."""
    return proxy.values[-1] >= proxy.values[0] + 0.3


def kl_explodes(record: RunRecord) -> Finding | None:
    """KL above 30 nats, or doubled from one iteration to the next to above 10 nats; for three iterations."""
    kl, ceiling = record["objective/kl"], ALARM["objective/kl"].high
    for at in range(len(kl) - 2):
        lowest = kl.values[at : at + 3].min()
        doubled = at > 0 and lowest > max(10.0, 2 * kl.values[at - 1])
        if doubled or lowest > ceiling:
            return Finding("objective/kl", *kl.point(at), high=10.0 if doubled else ceiling)
    return None


def kl_without_score(record: RunRecord) -> Finding | str | None:
    """From the middle to the last third of the run, the KL rises by two nats to above 5 for less than 0.05 of score a
    nat. With a fixed beta a policy stops where a nat buys beta; 0.05 is the usual beta."""
    kl, score = record["objective/kl"], record["objective/score"]
    if len(kl) < 15 or len(score) != len(kl):
        return "15 iterations"
    third = len(kl) // 3
    middle, last = slice(third, 2 * third), slice(len(kl) - third, len(kl))
    before, after = float(kl.values[middle].mean()), kl.values[last].mean()
    nats, gain = after - before, score.values[last].mean() - score.values[middle].mean()
    if after < 5 or nats < 2 or gain / nats >= 0.05:
        return None
    note = (
        f"from the middle third to the last the KL rises by {nats:.1f} nats and the score by {gain:.2f}, "
        f"{gain / nats:.3f} a nat"
    )
    at = (kl.values > max(5.0, before)).argmax()
    return Finding("objective/kl", *kl.point(at), high=round(before, 2), notes=(note,))


def reward_falls(record: RunRecord) -> Finding | str | None:
    """What PPO maximises falls: means of five iterations, 20 iterations apart or against the start."""
    reward = record["objective/rlhf_reward"]
    if len(reward) < 8:
        return "eight iterations"
    smooth = trailing_mean(reward.values, 5)
    lows = [float(reward.values[:3].mean()) - 0.5, *(float(x) - 0.25 for x in smooth[-21:-20])]
    low = next((low for low in lows if smooth[-1] < low), None)
    if low is None:
        return None
    peak = int(smooth.argmax())
    at = peak + mean_outside(reward.values[peak:], 5, low=low)
    return Finding("objective/rlhf_reward", *reward.point(at), low=round(low, 3))


def length_grows(record: RunRecord) -> Finding | None:
    """A mean of five iterations is above 1.3 times the start's length, also at the end, and length and score correlate
    there."""
    seen = Sign("resp/len_mean", replace(KEEPS_LENGTH, low=None), mean=5, least=8, digits=1)(record)
    length, corr = record["resp/len_mean"].values, record["resp/len_score_corr"].values
    if not seen or len(corr) < 5 or length[-5:].mean() <= KEEPS_LENGTH.high * length[:3].mean():
        return None
    return seen if corr[-5:].mean() > ALARM["resp/len_score_corr"].high else None


def critic_is_blind(record: RunRecord) -> Finding | str | None:
    """After 50 iterations, or half of a shorter run but 20, the critic explains nothing: mean of the last ten < 0."""
    explained = record["val/explained_var"]
    needed = max(20, min(50, record.planned_steps // 2))
    if len(explained) < needed:
        return f"{needed} iterations"
    last = explained.values[-10:]
    at = (last < 0).argmax() - len(last)
    return Finding("val/explained_var", *explained.point(at), low=0.0, high=1.0) if last.mean() < 0 else None


def critic_off_scale(record: RunRecord) -> Finding | None:
    """From iteration 10, the means of values and returns are a deviation of the returns apart, or more than 0.3 of the
    values are clipped (means of five)."""
    tags = ("val/mean", "val/return_mean", "val/return_var", "val/clipfrac")
    values, returns, variance, clipped = (record[tag].values for tag in tags)
    if not len(values) == len(returns) == len(variance) == len(clipped):
        return None
    gap = abs(values - returns) / np.sqrt(variance + 1e-8)
    for tag, figures, high, case in (
        ("val/mean", gap, 1.0, "the critic's values are far from the returns"),
        ("val/clipfrac", clipped, ALARM["val/clipfrac"].high, "the value clip holds the critic back"),
    ):
        late = mean_outside(figures[10:], 5, high=high)
        if late is not None:
            at, told = late + 10, high if figures is clipped else None  # the gap is not the figure that is told
            note = f"the returns there have mean {returns[at]:.3g} and deviation {variance[at] ** 0.5:.3g}"
            return Finding(tag, *record[tag].point(at), high=told, notes=(note,), case=case)
    return None
