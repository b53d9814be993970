"""The doctor's rules for PPO runs, first half: what the loop rests on, the reward, the size of the steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.doctor.record import RunRecord, Series
from experiments.doctor.rules import (
    Cause,
    Finding,
    Unclear,
    high_lr,
    lasting,
    likeliest_first,
    low_lr,
    reward_at_chance,
)

SAMPLER_DRIFT = "time/sampler_vs_train_logp_max"
_PASS_1 = "policy/approxkl_epoch1"
# Half the squared difference of two log-probabilities that rounding alone may cause: 1e-5 in fp32, 2e-2 in half.
_ROUNDING = {"fp32": 1e-10, "bf16": 2e-4, "fp16": 2e-4}
_DROPOUT = Cause("dropout is on in PPO", "dropout 0 in all four roles, in train() mode, too; attention included")


# ---------------------------------------------------------------------------------------------------------------------
# What the loop rests on
# ---------------------------------------------------------------------------------------------------------------------


def ratio_not_one(record: RunRecord) -> Finding | Unclear | None:
    """Before the first step of an iteration the policy is the one that sampled: approxkl of the first pass is 0."""
    if int(record.config.get("minibatches") or 1) > 1:
        return Unclear("ratio-not-one", "one minibatch a pass: with several, the first pass holds steps already taken")
    first, limit = record[_PASS_1], _ROUNDING[record.precision]
    bad = np.flatnonzero(first.values > limit)
    if not len(bad):
        return None
    at = int(bad[0])
    ratio = record["val/ratio_max"]
    return Finding(
        "ratio-not-one", "the importance ratio is not 1 before the first step of an iteration", _PASS_1,
        int(first.steps[at]), float(first.values[at]), 0.0, limit,
        (_DROPOUT,
         Cause("old and new log-probabilities come from different forwards: positions, temperature, micro-batches, "
               "sampler's cache", "take the old ones by the training forward, before the first step"),
         Cause("weights changed between rollout and update", "look at what was edited in src/training")),
        (f"it is so in {len(bad)} of {len(first)} iterations; KL to the reference at iteration 1 is "
         f"{_first(record['objective/kl_k3']):.3g}, the sampler's log-probabilities are off by up to "
         f"{_first(record[SAMPLER_DRIFT]):.3g}, the largest ratio is {max(ratio.values, default=1):.3g}",),
        beside=(SAMPLER_DRIFT, "objective/kl_k3"),
    )  # fmt: skip


def kl_at_start(record: RunRecord) -> Finding | None:
    """At iteration 1 policy and reference are one model: k3, which no token can make negative, is 0."""
    kl = record["objective/kl_k3"]
    limit = 1e-6 if record.precision == "fp32" else 2e-2
    if not len(kl) or kl.steps[0] != 1 or kl.values[0] <= limit:
        return None
    return Finding(
        "kl-not-zero-at-start", "policy and reference differ before any training", "objective/kl_k3", 1,
        float(kl.values[0]), 0.0, limit,
        likeliest_first(
            [noise(record)],
            [Cause("two different checkpoints", "start actor and reference from one -a"),
             Cause("an adapter is on in the reference, or does not start at 0", "look at share_base in models/lora.py"),
             Cause("another temperature in one of the two forwards", "one function for both log-probabilities")],
        ),
        beside=("objective/kl",),
    )  # fmt: skip


def sampler_differs(record: RunRecord) -> Finding | None:
    """Sampler and training forward give one log-probability: within 1e-4 in fp32, 5e-2 in half precision."""
    drift = record[SAMPLER_DRIFT]
    limit = 1e-4 if record.precision == "fp32" else 5e-2
    at = lasting(drift.values > limit, min(3, len(drift)))
    if at is None or not len(drift):
        return None
    return Finding(
        "sampler-differs", "responses are not sampled from the distribution that is trained", SAMPLER_DRIFT,
        int(drift.steps[at]), float(drift.values[at]), 0.0, limit,
        likeliest_first(
            [noise(record)],
            [Cause("top-k, top-p or another temperature in the sampler", "sample at --temperature alone"),
             Cause("other position ids or padding in one of the forwards", "positions count real tokens only"),
             Cause("the sampler's cache or stale weights", "compare one response token by token")],
        ),
        beside=("objective/kl",),
    )  # fmt: skip


def entropy_negative(record: RunRecord) -> Finding | None:
    """-log p of what was sampled is never negative."""
    entropy = record["objective/entropy"]
    bad = np.flatnonzero(entropy.values < 0)
    if not len(bad):
        return None
    return Finding(
        "entropy-negative", "the entropy of the samples is negative", "objective/entropy", int(entropy.steps[bad[0]]),
        float(entropy.values[bad[0]]), 0.0, None,
        (Cause("masked log-probabilities hold a filler other than 0 and are summed", "mask before every sum"),),
    )  # fmt: skip


def ends_at_start(record: RunRecord) -> Finding | None:
    """The SFT model's responses, which are those of iteration 1, end: at least 0.95 of them."""
    rate = record["resp/eos_rate"]
    if not len(rate) or rate.steps[0] != 1 or rate.values[0] >= 0.95:
        return None
    masked = Cause(
        "the SFT model never learned to end: EOS masked out of its targets, or forbidden in sampling",
        "run the doctor on the SFT run (-a); train it again with the EOS as a target",
    )
    short = Cause(
        "the responses are cut before they can end", "raise --response-length; compare with the data's lengths"
    )
    never = rate.values[0] < 0.5
    return Finding(
        "never-ends", "the policy does not end its answers, from the start", "resp/eos_rate", int(rate.steps[0]),
        float(rate.values[0]), 0.95, None, (masked, short) if never else (short, masked), beside=("resp/len_mean",),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The reward
# ---------------------------------------------------------------------------------------------------------------------


def reward_model_at_chance(record: RunRecord) -> Finding | Unclear | None:
    """What the reward model's own run says about its held-out accuracy."""
    config = record.config
    if config.get("critic") == "none" or (config.get("reward_fn") and not config.get("reward_fn_weight")):
        return None
    if record.reward is None:
        return Unclear("reward-at-chance", "the reward model's run, which is not where it was (-c)")
    found = reward_at_chance(record.reward)
    if not isinstance(found, Finding):
        return found
    causes = (
        Cause(
            f"the reward it climbs says nothing: {found.title}", "run the doctor on the run of -c, and train it again"
        ),
        *found.causes,
    )
    return replace(found, title=f"{found.title} on held-out pairs", causes=causes, of=record.reward)


def reward_not_normalised(record: RunRecord) -> Finding | None:
    """Scores start at mean 0 and deviation 1: at iteration 1 within 0.5 and within a factor of 2."""
    mean, sd = record["objective/score"], record["objective/score_sd"]
    if record.config.get("reward_fn") or not len(mean) or not len(sd) or mean.steps[0] != 1:
        return None
    causes = (
        Cause("PPO samples in another way than the reward model was normalised",
              "the same --temperature and --response-length in both stages"),
        Cause("a step checkpoint that was not normalised", "give -c a run, its final/ or its best/"),
        Cause("another SFT model than the one the scale was measured on", "the same run in -a and in train_rm's -p"),
    )  # fmt: skip
    if not 0.5 <= sd.values[0] <= 2:
        return Finding(
            "reward-not-normalised", "the scores do not start at deviation 1", "objective/score_sd", 1,
            float(sd.values[0]), 0.5, 2.0, causes,
        )  # fmt: skip
    if abs(mean.values[0]) > 0.5:
        return Finding(
            "reward-not-normalised", "the scores do not start at mean 0", "objective/score", 1, float(mean.values[0]),
            -0.5, 0.5, causes,
        )  # fmt: skip
    return None


def score_constant(record: RunRecord) -> Finding | None:
    """Scores of different answers differ: deviation above 0.05; below for three iterations is a finding."""
    sd = record["objective/score_sd"]
    at = lasting(sd.values < 0.05, 3)
    if at is None:
        return None
    column = Cause("the score is read at a prompt or padding column", "see where with -t reward")
    collapsed = Cause("the policy gives one answer to everything", "raise --kl-coef, lower --lr")
    return Finding(
        "score-constant", "every response gets the same score", "objective/score_sd", int(sd.steps[at]),
        float(sd.values[at]), 0.05, None, (column, collapsed) if at == 0 else (collapsed, column),
        beside=("resp/duplicate_rate",),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------


def steps_too_large(record: RunRecord) -> Finding | None:
    """approxkl below 0.03, clip fraction below 0.3, mean ratio within 0.05 of 1, largest ratio below 10; three
    iterations outside are a finding, for the first one of a healthy run may be."""
    ranges = {
        "policy/approxkl": (None, 0.03), "policy/clipfrac": (None, 0.3), "val/ratio_mean": (0.95, 1.05),
        "val/ratio_max": (None, 10.0),
    }  # fmt: skip
    found = []
    for order, (tag, (low, high)) in enumerate(ranges.items()):
        series = record[tag]
        at = lasting((series.values > high) | (series.values < (low if low is not None else -np.inf)), 3)
        if at is not None:
            found.append((int(series.steps[at]), order, tag, float(series.values[at]), low, high))
    if not found:
        return None
    step, _, tag, value, low, high = min(found)
    minibatches = int(record.config.get("minibatches") or 1)
    return Finding(
        "steps-too-large", "the policy moves too far in one iteration", tag, step, value, low, high,
        likeliest_first(
            [noise(record), high_lr(record, "lr", "critic_lr")],
            [Cause("the learning rate is too high", "lower --lr; --warmup-iterations"),
             Cause(f"{int(record.config.get('ppo_epochs') or 4) * minibatches} steps on one rollout",
                   "fewer --ppo-epochs or --minibatches; --kl-stop 0.02"),
             Cause("epsilon of Adam too small for the first small gradients", "--adam-eps 1e-5")],
        ),
        tuple(f"also outside: {other[2]} from iteration {other[0]}" for other in sorted(found)[1:]),
        beside=("val/ratio_mean", "objective/kl"),
    )  # fmt: skip


def does_not_move(record: RunRecord) -> Finding | Unclear | None:
    """After five iterations of the actor something has changed: approxkl above 1e-7 or KL above 0.01 at some point."""
    kl, approx = record["objective/kl_k3"], record["policy/approxkl"]
    moving = kl.steps > int(record.config.get("critic_warmup") or 0)
    if moving.sum() < 5:
        return Unclear("does-not-move", "five iterations")
    if kl.values[moving].max() > 0.01 or max(approx.values, default=0) > 1e-7:
        return None
    return Finding(
        "does-not-move", "the policy stays what it was", "objective/kl_k3", int(kl.steps[-1]), float(kl.values[-1]),
        0.01, None,
        likeliest_first(
            [low_lr(record)],
            [Cause("the learning rate is too low; adapters need that of their preset", "raise --lr, or leave it away"),
             Cause("the adapter is not active in the training forward, or frozen", "--freeze auto"),
             Cause("advantages are all 0: the reward says nothing", "look at objective/score_sd")],
        ),
        beside=("policy/approxkl",),
    )  # fmt: skip


def noise(record: RunRecord) -> Cause | None:
    """Dropout, when two passes over one rollout differ before any step."""
    return _DROPOUT if isinstance(ratio_not_one(record), Finding) else None


def _first(series: Series) -> float:
    return float(series.values[0]) if len(series) else 0.0
