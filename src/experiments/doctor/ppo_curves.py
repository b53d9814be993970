"""The doctor's rules for PPO runs, second half: how policy and critic develop over the iterations."""

from __future__ import annotations

import numpy as np

from experiments.doctor.ppo_loop import SAMPLER_DRIFT, noise
from experiments.doctor.record import RunRecord, Series
from experiments.doctor.rules import (
    Cause,
    Finding,
    Unclear,
    high_lr,
    lasting,
    likeliest_first,
    mean_outside,
    trailing_mean,
)

# ---------------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------------


def kl_explodes(record: RunRecord) -> Finding | None:
    """KL below 30 nats, and no doubling from one iteration to the next above 10 nats; for three iterations."""
    kl = record["objective/kl"]
    before = np.concatenate([[np.inf], kl.values[:-1]])
    above = lasting(kl.values > 30, 3)
    jumps = [
        i
        for i in range(len(kl) - 2)
        if kl.values[i : i + 3].min() > max(10.0, 2 * before[i]) and np.isfinite(before[i])
    ]
    found = [(i, high) for i, high in ((above, 30.0), (jumps[0] if jumps else None, 10.0)) if i is not None]
    if not found:
        return None
    at, high = min(found)
    return Finding(
        "kl-explodes", "the KL to the SFT model explodes", "objective/kl", int(kl.steps[at]), float(kl.values[at]),
        None, high,
        likeliest_first(
            [_no_penalty(record), high_lr(record)],
            [Cause("beta is too small", "raise --kl-coef, or set --kl-target"), Cause("steps too large", "lower --lr"),
             Cause("the reward is not normalised", "look at objective/score_sd of iteration 1")],
        ),
        beside=("objective/score",),
    )  # fmt: skip


def kl_negative(record: RunRecord) -> Finding | Unclear | None:
    """The KL is positive up to sampling noise: a mean over five iterations above -0.5."""
    kl = record["objective/kl"]
    if len(kl) < 5:
        return Unclear("kl-negative", "five iterations")
    at = mean_outside(kl.values, 5, low=-0.5)
    if at is None:
        return None
    return Finding(
        "kl-negative", "the KL to the SFT model is negative", "objective/kl", int(kl.steps[at]), float(kl.values[at]),
        -0.5, None,
        likeliest_first(
            [noise(record)],
            [Cause("samples do not come from the distribution that is scored: top-k, top-p, another temperature",
                   "sample at --temperature alone; look at time/sampler_vs_train_logp_max"),
             Cause("PAD tokens are counted", "mask after the first EOS"),
             Cause("the sampler has stale weights", "sample with the policy that is trained")],
        ),
        beside=(SAMPLER_DRIFT,),
    )  # fmt: skip


def over_optimised(record: RunRecord) -> Finding | Unclear | None:
    """Where a gold reward is known, it does not fall while the trained one holds.

    Found when the last evaluation has lost half of what gold had gained, or a quarter of it after the one before had
    lost a tenth, and the proxy has not fallen with it; also when gold never has gained. In both cases the proxy must
    have gained 0.3 over the run: before that, gold moves by chance.
    """
    gold, proxy = record["eval/gold"], record["eval/score"]
    if not len(gold):
        return Unclear("over-optimised", "eval/gold (--eval-reward-fn); without it, read samples.jsonl as it goes on")
    if len(gold) < 3 or len(proxy) != len(gold):
        return Unclear("over-optimised", "three evaluations")
    if proxy.values[-1] < proxy.values[0] + 0.3:
        return None
    causes = likeliest_first(
        [_no_penalty(record), high_lr(record)],
        [Cause("beta is too small for so long a run", "raise --kl-coef; fewer --iterations; an earlier checkpoint"),
         Cause("the reward model is weak where the policy has gone", "more and newer preference data for it")],
    )  # fmt: skip
    peak = int(gold.values.argmax())
    gained = gold.values[peak] - gold.values[0]
    if peak == 0 or gained <= 0:
        return _gold_never_rises(record, gold)
    lost = (gold.values[peak] - gold.values) / gained
    lost[:peak] = 0
    bad = lost[-1] > 0.5 or (lost[-1] > 0.25 and lost[-2] > 0.1)
    if not bad or proxy.values[-1] < proxy.values[peak] - 0.1:
        return None
    at = int(np.flatnonzero(lost > 0.1)[0])
    return Finding(
        "over-optimised", "the gold reward falls while the trained one does not", "eval/gold", int(gold.steps[at]),
        float(gold.values[at]), round(float(gold.values[peak] - 0.1 * gained), 3), None, causes,
        (f"gold was best at iteration {gold.steps[peak]} with {gold.values[peak]:.2f} and is {gold.values[-1]:.2f} at "
         f"the end; the score went from {proxy.values[peak]:.2f} to {proxy.values[-1]:.2f}",),
        beside=("eval/score", "eval/kl"),
    )  # fmt: skip


def _gold_never_rises(record: RunRecord, gold: Series) -> Finding:
    """The case in which the best gold reward is that of the start."""
    return Finding(
        "over-optimised", "the trained reward rises and the gold reward never does", "eval/gold", int(gold.steps[1]),
        float(gold.values[1]), float(gold.values[0]), None,
        likeliest_first(
            [_no_penalty(record)],
            [Cause("the reward model does not measure what gold does: at chance, or swapped",
                   "run the doctor on the run of -c; main.py -t reward on an obvious pair")],
        ),
        beside=("eval/score", "eval/kl"),
    )  # fmt: skip


def kl_without_score(record: RunRecord) -> Finding | Unclear | None:
    """From the middle to the last third of the run, the KL buys score: above 5 nats, at least 0.05 for each nat more.

    With a fixed beta a policy stops where a nat buys beta; 0.05 is the usual beta.
    """
    kl, score = record["objective/kl"], record["objective/score"]
    if len(kl) < 15 or len(score) != len(kl):
        return Unclear("kl-without-score", "15 iterations")
    third = len(kl) // 3
    middle, last = slice(third, 2 * third), slice(len(kl) - third, len(kl))
    nats = kl.values[last].mean() - kl.values[middle].mean()
    gain = score.values[last].mean() - score.values[middle].mean()
    if kl.values[last].mean() < 5 or nats < 2 or gain / nats >= 0.05:
        return None
    at = int(np.flatnonzero(kl.values > max(5.0, float(kl.values[middle].mean())))[0])
    return Finding(
        "kl-without-score", "the KL goes on rising and the score hardly does", "objective/kl", int(kl.steps[at]),
        float(kl.values[at]), None, round(float(kl.values[middle].mean()), 2),
        likeliest_first(
            [_no_penalty(record), high_lr(record)],
            [Cause("beta is too small: nothing holds the policy", "raise --kl-coef, or set --kl-target"),
             Cause("the reward model has nothing more to say", "fewer --iterations; take an earlier checkpoint")],
        ),
        (f"from the middle third to the last the KL rises by {nats:.1f} nats and the score by {gain:.2f}, "
         f"{gain / nats:.3f} a nat",),
        beside=("objective/score",),
    )  # fmt: skip


def reward_falls(record: RunRecord) -> Finding | Unclear | None:
    """What PPO maximises does not fall: means of five iterations, 20 iterations apart and against the start."""
    reward = record["objective/rlhf_reward"]
    if len(reward) < 8:
        return Unclear("reward-falls", "eight iterations")
    smooth = trailing_mean(reward.values, 5)
    start = float(reward.values[:3].mean())
    later = smooth[20:] < smooth[:-20] - 0.25 if len(smooth) > 20 else np.zeros(0, dtype=bool)
    fallen = smooth[-1] < start - 0.5
    if not fallen and not (len(later) and later[-1]):
        return None
    low = start - 0.5 if fallen else float(smooth[-21]) - 0.25
    begin = int(smooth.argmax())
    at = begin + mean_outside(reward.values[begin:], 5, low=low)
    return Finding(
        "reward-falls", "the reward with its KL penalty falls", "objective/rlhf_reward", int(reward.steps[at]),
        float(reward.values[at]), round(low, 3), None,
        likeliest_first(
            [high_lr(record, "lr", "critic_lr")],
            [Cause("steps too large", "lower --lr, fewer --ppo-epochs"),
             Cause("the KL costs more than the score gives", "lower --kl-coef"),
             Cause("the critic misleads: look at val/explained_var", "--critic-warmup, another --critic-lr")],
        ),
        beside=("objective/score", "objective/kl"),
    )  # fmt: skip


def stops_ending(record: RunRecord) -> Finding | None:
    """The share of responses that end does not fall below 0.9 over three iterations once it was above 0.95."""
    rate = record["resp/eos_rate"]
    if len(rate) < 4 or rate.values[0] < 0.95:
        return None
    at = lasting(rate.values < 0.9, 3)
    if at is None:
        return None
    return Finding(
        "stops-ending", "fewer and fewer responses end", "resp/eos_rate", int(rate.steps[at]), float(rate.values[at]),
        0.9, None,
        likeliest_first(
            [high_lr(record), _no_penalty(record),
             Cause("nothing is taken from a response that is cut", "--missing-eos-penalty 1")
             if not record.config.get("missing_eos_penalty") else None],
            [Cause("the reward model likes length", "look at length_corr and longer_wins of its run"),
             Cause("the penalty for a missing EOS is small against the scores", "raise --missing-eos-penalty")],
        ),
        beside=("resp/len_mean",),
    )  # fmt: skip


def length_changes(record: RunRecord) -> Finding | None:
    """Responses keep their length: a mean of five iterations above a third of the start's, and not above 1.3 times it
    with a correlation of length and score above 0.5."""
    length, corr = record["resp/len_mean"], record["resp/len_score_corr"]
    if len(length) < 8:
        return None
    start = float(length.values[:3].mean())
    at = mean_outside(length.values, 5, low=start / 3)
    if at is not None:
        return Finding(
            "length-collapses", "the responses shrink to almost nothing", "resp/len_mean", int(length.steps[at]),
            float(length.values[at]), round(start / 3, 1), None,
            likeliest_first(
                [high_lr(record)],
                [Cause("the KL costs more for each token than the score gives", "lower --kl-coef"),
                 Cause("the reward model likes short answers", "look at length_corr and longer_wins of its run")],
            ),
            beside=("resp/len_score_corr", "objective/score"),
        )  # fmt: skip
    at = mean_outside(length.values, 5, high=1.3 * start)
    if at is not None and length.values[-5:].mean() > 1.3 * start and len(corr) >= 5 and corr.values[-5:].mean() > 0.5:
        return Finding(
            "length-grows", "the responses grow, and length is what is paid", "resp/len_mean", int(length.steps[at]),
            float(length.values[at]), None, round(1.3 * start, 1),
            likeliest_first(
                [_no_penalty(record)],
                [Cause("the reward model likes length", "balance its pairs by length; look at its length_corr"),
                 Cause("cut responses lose too little", "raise --missing-eos-penalty")],
            ),
            beside=("resp/len_score_corr", "resp/eos_rate"),
        )  # fmt: skip
    return None


def entropy_collapses(record: RunRecord) -> Finding | None:
    """Entropy per token above 0.1 nats and above a quarter of its start, as a mean of three iterations."""
    entropy = record["policy/entropy"]
    if len(entropy) < 4:
        return None
    low = max(0.1, 0.25 * float(entropy.values[0])) if entropy.values[0] > 0.1 else 0.25 * float(entropy.values[0])
    at = mean_outside(entropy.values, 3, low=low)
    if at is None:
        return None
    return Finding(
        "entropy-collapses", "the policy has stopped to explore", "policy/entropy", int(entropy.steps[at]),
        float(entropy.values[at]), round(low, 3), None,
        likeliest_first(
            [high_lr(record), _no_penalty(record)],
            [Cause("beta too small, or too long a run", "raise --kl-coef, fewer --iterations"),
             Cause("learning rate too high, or temperature too low", "lower --lr; --temperature 1")],
        ),
        beside=("resp/distinct_2",),
    )  # fmt: skip


def text_degenerates(record: RunRecord) -> Finding | None:
    """Responses stay varied: distinct bigrams above half of their start, repeated tokens below 0.3 (means of five)."""
    distinct, repetition = record["resp/distinct_2"], record["resp/repetition"]
    if len(distinct) < 8 or len(repetition) < 8:
        return None
    half, often = 0.5 * float(distinct.values[:3].mean()), max(0.3, 2 * float(repetition.values[0]))
    few, loops = mean_outside(distinct.values, 5, low=half), mean_outside(repetition.values, 5, high=often)
    if few is None and loops is None:
        return None
    series, tag, low, high, at = (
        (distinct, "resp/distinct_2", round(half, 3), None, few)
        if few is not None
        else (repetition, "resp/repetition", None, often, loops)
    )
    return Finding(
        "text-degenerates", "the responses become alike or repeat themselves", tag, int(series.steps[at]),
        float(series.values[at]), low, high,
        likeliest_first(
            [_no_penalty(record), high_lr(record)],
            [Cause("beta too small, or too long a run", "raise --kl-coef, fewer --iterations"),
             Cause("the reward model pays for a phrase", "read samples.jsonl; -t reward with and without it")],
        ),
        beside=("resp/duplicate_rate", "objective/score"),
    )  # fmt: skip


def kl_coef_saturates(record: RunRecord) -> Finding | None:
    """An adaptive beta settles: within a factor of ten of where it started."""
    beta = record["objective/kl_coef"]
    if not record.config.get("kl_target") or not len(beta) or beta.values[0] <= 0:
        return None
    times = beta.values / beta.values[0]
    at = lasting((times > 10) | (times < 0.1), 3)
    if at is None:
        return None
    start = float(beta.values[0])
    return Finding(
        "kl-coef-saturates", "the adaptive KL coefficient runs away", "objective/kl_coef", int(beta.steps[at]),
        float(beta.values[at]), start / 10, start * 10,
        (Cause("--kl-target cannot be reached", "set it near the KL that the run shows"),
         Cause("the controller is too fast or too slow", "--kl-horizon")),
        beside=("objective/kl",),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The critic
# ---------------------------------------------------------------------------------------------------------------------


def critic_is_blind(record: RunRecord) -> Finding | Unclear | None:
    """After 50 iterations, or half of a shorter run but 20, the critic explains something: mean of the last ten > 0."""
    explained = record["val/explained_var"]
    needed = max(20, min(50, record.planned_steps // 2))
    if len(explained) < needed:
        return Unclear("critic-blind", f"{needed} iterations")
    if explained.values[-10:].mean() >= 0:
        return None
    at = len(explained) - 10 + int(np.flatnonzero(explained.values[-10:] < 0)[0])
    return Finding(
        "critic-blind", "the critic explains less than a constant would", "val/explained_var",
        int(explained.steps[at]), float(explained.values[at]), 0.0, 1.0,
        likeliest_first(
            [high_lr(record, "critic_lr", "lr")],
            [Cause("the critic learns too slowly or too fast", "--critic-lr; --critic-warmup 5"),
             Cause("the value clip is too tight for the reward's scale", "--value-clip-eps 0, or a normalised reward"),
             Cause("the score is placed on a column that is not trained", "score and value at the same last token")],
        ),
        beside=("loss/value", "val/clipfrac"),
    )  # fmt: skip


def critic_off_scale(record: RunRecord) -> Finding | None:
    """From iteration 10, values and returns have one mean: apart by less than a deviation of the returns (mean of
    five); and fewer than 0.3 of the values are clipped."""
    values, returns, spread = record["val/mean"], record["val/return_mean"], record["val/return_var"]
    clipped = record["val/clipfrac"]
    if not len(values) == len(returns) == len(spread) == len(clipped) or len(values) < 15:
        return None
    gap = abs(values.values - returns.values) / np.sqrt(spread.values + 1e-8)
    for tag, figures, high, title in (
        ("val/mean", gap, 1.0, "the critic's values are far from the returns"),
        ("val/clipfrac", clipped.values, 0.3, "the value clip holds the critic back"),
    ):
        late = mean_outside(figures[10:], 5, high=high)
        if late is not None:
            at, series = late + 10, record[tag]
            return Finding(
                "critic-off-scale", title, tag, int(series.steps[at]), float(series.values[at]), None,
                None if tag == "val/mean" else high,
                likeliest_first(
                    [high_lr(record, "critic_lr", "lr")],
                    [Cause("the value clip is too tight for the reward's scale", "raise --value-clip-eps, or give 0"),
                     Cause("the critic does not start on the scale of the reward", "-c with its gain and bias"),
                     Cause("the critic learns too slowly", "raise --critic-lr; --critic-warmup 5")],
                ),
                (f"the returns there have mean {returns.values[at]:.3g} and deviation {spread.values[at] ** 0.5:.3g}",),
                beside=("val/return_mean", "val/mean", "val/clipfrac"),
            )  # fmt: skip
    return None


def _no_penalty(record: RunRecord) -> Cause | None:
    """A KL coefficient of 0, or of a tenth of the preset's default or less."""
    if record.times_default("kl_coef") > 0.1 or record.config.get("kl_target"):
        return None
    beta = float(record.config["kl_coef"])
    change = f"--kl-coef {record.default('kl_coef'):g}"
    return Cause(f"nothing holds the policy near the SFT model: the KL coefficient is {beta:g}", change)
