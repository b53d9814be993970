"""The doctor's table: what is looked for in a run of each stage, in the order of the causes.

A fault high up (dropout on, say) brings others further down with it. The ranges are alarms and not goals;
docs/doctor.md says in words when each finding is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.doctor import checks, suspects
from experiments.doctor.ranges import ALARM, ENDS, SAMPLER_DRIFT, SAMPLER_FP32, SAMPLER_HALF, Range
from experiments.doctor.record import RunRecord
from experiments.doctor.signs import Finding, Sign
from experiments.doctor.suspects import DROPOUT, NEVER_LEARNED_TO_END, SCORE_COLUMN

Causes = tuple[str | Callable[[RunRecord], str | None], ...]


@dataclass(frozen=True)
class Rule:
    """A row of the table. Of several rows with one code, which are cases of one fault, the first that shows is told.

    Attributes:
        code: short name, the same in docs/doctor.md and in the picture's file name.
        title: one sentence.
        check: where it shows; a `Sign` where that can say it, else a function (see checks.py).
        causes: "why -> what to change", likeliest first, and suspects, which give such a text for some runs only; by
            the case that the check tells, where they depend on it.
        beside: tags that belong into the picture beside the figure; those that were not logged are left out.
        given: a flag that the run must have set.
        unless: flags that it must not have set, and findings that it must not have.
    """

    code: str
    title: str
    check: Callable[[RunRecord], Finding | str | None]
    causes: Causes | dict[str, Causes]
    beside: tuple[str, ...] = ()
    given: str = ""
    unless: tuple[str, ...] = ()


def _repetition(values: np.ndarray) -> Range:
    """As much as at the start is no fault of PPO."""
    return Range(high=max(0.3, 2 * float(values[0])))


def _entropy(values: np.ndarray) -> Range:
    """A quarter of the start, and 0.1 nats where it was more."""
    start = float(values[0])
    return Range(low=max(0.1, 0.25 * start) if start > 0.1 else 0.25 * start)


def _kl_coef(values: np.ndarray) -> Range:
    """Within a factor of ten of the start."""
    return Range(float(values[0]) / 10, float(values[0]) * 10)


HIGH_LR, LOW_LR, EITHER_LR = suspects.high_lr, suspects.low_lr, partial(suspects.high_lr, settings=("lr", "critic_lr"))
NO_PENALTY, PAID_KL, NOISE = suspects.no_penalty, suspects.penalty_pays, suspects.dropout
FIRST, BEFORE, AFTER = (1, 1), (0, 0), (1, math.inf)  # iteration 1; the evaluation before training; those after it
_ODD_ROWS = "single rows are unlike all others -> look at the data with -t dataset"
_TOO_FAR = (
    HIGH_LR, "the learning rate is too high, or the warm-up too short -> lower --lr, raise --warmup-steps",
    "the batches are too small -> raise --global-batch-size", _ODD_ROWS,
)  # fmt: skip
_OTHER_SCALE = (
    "PPO samples in another way than the reward model was normalised -> "
    "the same --temperature and --response-length in both stages",
    "a step checkpoint that was not normalised -> give -c a run, its final/ or its best/",
    "another SFT model than the one the scale was measured on -> the same run in -a and in train_rm's -p",
)
_ALIKE = (
    NO_PENALTY, HIGH_LR, "beta too small, or too long a run -> raise --kl-coef, fewer --iterations",
    "the reward model pays for a phrase -> read samples.jsonl; -t reward with and without it",
)  # fmt: skip
_EOS_MASKED = (
    "the EOS is no target of the loss: masked as padding, or missing in the rows -> "
    "look for the EOS in -t dataset; take labels from lengths, never from the PAD id"
)
_SAMPLES_CUT = "the samples are cut before they can end -> raise --sample-tokens; compare with the data's lengths"
_TOO_SHORT = "too little training -> more --epochs"
_MIXED_UP = "chosen and rejected are mixed up in the data, or say nothing -> look at pairs with -t dataset --stage rm"
_AT_CHANCE: dict[str, Causes] = {
    "worse than chance": (
        HIGH_LR, LOW_LR,
        "chosen and rejected are swapped -> swap them in the data; look at -t dataset --stage rm"),
    "no better than chance": (
        HIGH_LR, LOW_LR, _MIXED_UP, SCORE_COLUMN, "too few rows or steps -> more data; more --max-steps"),
    "no better than the length of the answers": (
        HIGH_LR, LOW_LR, "too few rows or steps to learn more than the length -> more data; more --max-steps",
        _MIXED_UP),
}  # fmt: skip
_SCORES_ALIKE: dict[str, Causes] = {
    "reward of --reward-fn is the same": (
        "the function gives all responses one number -> print what it returns for two unlike responses",
        "it is a reward that no response has earned yet -> easier prompts, or a part of it for a part of the answer"),
    "score of the reward model is the same": (
        "the reward model tells no answers apart -> run the doctor on the run of -c; -t reward on an obvious pair",
        SCORE_COLUMN, suspects.never_learned_to_end),
    "response gets the same score": (
        NO_PENALTY, HIGH_LR, "the policy gives one answer to everything -> raise --kl-coef, lower --lr"),
}  # fmt: skip
_IT_CLIMBS = (
    "the reward it climbs says nothing: the reward model is {case} -> "
    "run the doctor on the run of -c, and train it again"
)

_NOT_A_NUMBER = Rule(
    "not-a-number", "a figure is NaN or infinite", checks.not_a_number,
    (EITHER_LR, suspects.fp16, "the learning rate is too high, or warm-up too short -> lower --lr",
     "a reward function or a row of the data gives values that are not finite -> "
     "look at the rows with -t dataset; print what --reward-fn returns"),
)  # fmt: skip
_DIVERGES = Rule("diverges", "{case}", checks.diverges, _TOO_FAR, ("eval/loss", "eval/nll", "train/grad_norm"))
_NOT_LEARNING = Rule(
    "not-learning", "the held-out loss is no lower than before training", checks.not_learning,
    (HIGH_LR, LOW_LR, "the learning rate is too low or too high -> another --lr",
     "nothing that matters is trained -> --freeze none, or a larger --lr for adapters",
     "the data is not what it should be -> look at it with -t dataset"),
    ("train/loss",),
)  # fmt: skip
_OVERFITTED = Rule(
    "overfitted", "the held-out loss rises again", checks.overfitted,
    (suspects.many_epochs, HIGH_LR,
     "too many steps for so little data -> take best/ of this run; fewer --epochs or a lower --lr"),
    ("train/loss",),
)  # fmt: skip
_GRADIENT_SPIKES = Rule(
    "gradient-spikes", "{case} jumps again and again to more than ten times its usual size", checks.gradient_spikes,
    (HIGH_LR, "the learning rate is too high for this batch size -> lower --lr, raise --global-batch-size", _ODD_ROWS),
)  # fmt: skip

_SFT = (
    _NOT_A_NUMBER, _DIVERGES, _NOT_LEARNING,
    Rule("never-ends", "the model does not end its answers", checks.never_ends,
         {"no EOS": (_EOS_MASKED, _SAMPLES_CUT, _TOO_SHORT), "cut": (_SAMPLES_CUT, _TOO_SHORT, _EOS_MASKED)},
         ("resp/len_mean",)),
    _OVERFITTED,
    Rule("repeats-itself", "the samples repeat themselves",
         Sign("resp/repetition", Range(high=0.3), in_a_row=2, at_end=True, steps=AFTER),
         (HIGH_LR, "the samples never end and loop -> see never-ends",
          "the data repeats itself, or too little training -> look at it with -t dataset; more --epochs")),
    _GRADIENT_SPIKES,
)  # fmt: skip

_RM = (
    _NOT_A_NUMBER,
    Rule("score-constant", "every answer gets the same score",
         Sign("norm/raw_sd", Range(low=1e-3), at_end=True),
         (SCORE_COLUMN, "the head is not trained -> --freeze none; a larger --lr")),
    Rule("scale-off", "the scores are too far apart before any training",
         Sign("eval/margin_sd", Range(high=3.0), steps=BEFORE),
         ("the head starts too large, or its output was not normalised at the start -> "
          "initialise it with deviation 1/sqrt(d + 1); more --normalise-prompts",)),
    Rule("reward-at-chance", "the reward model is {case}", checks.reward_at_chance, _AT_CHANCE, ("eval/nll",)),
    _DIVERGES,
    Rule("forgets", "the reward model loses accuracy while it trains", checks.forgets, _TOO_FAR,
         ("eval/nll", "train/loss")),
    _NOT_LEARNING,
    Rule("length-bias", "the scores are little more than the length of the answer",
         Sign("eval/length_corr", Range(-0.8, 0.8), in_a_row=2, at_end=True, steps=AFTER),
         ("in the data the longer (or the shorter) answer nearly always wins -> "
          "balance the pairs by length; compare eval/longer_wins",)),
    _OVERFITTED,
    Rule("miscalibrated", "the reward model is far surer, or less sure, than it is right",
         Sign("eval/ece", Range(high=0.15), in_a_row=2, at_end=True, steps=AFTER),
         (HIGH_LR, suspects.many_epochs, "overfitting -> --epochs 1, a lower --lr, more data"),
         ("eval/margin_sd",)),
    _GRADIENT_SPIKES,
)  # fmt: skip

_PPO = (
    _NOT_A_NUMBER,
    # What the loop rests on
    Rule("ratio-not-one", "the importance ratio is not 1 before the first step of an iteration", checks.ratio_not_one,
         (DROPOUT,
          "old and new log-probabilities come from different forwards: positions, temperature, micro-batches, "
          "sampler's cache -> take the old ones by the training forward, before the first step",
          "weights changed between rollout and update -> look at what was edited in src/training"),
         (SAMPLER_DRIFT, "objective/kl_k3")),
    Rule("kl-not-zero-at-start", "policy and reference differ before any training",
         Sign("objective/kl_k3", Range(high=1e-6), half=2e-2, floor=0.0, steps=FIRST),
         (NOISE, "two different checkpoints -> start actor and reference from one -a",
          "an adapter is on in the reference, or does not start at 0 -> look at share_base in models/lora.py",
          "another temperature in one of the two forwards -> one function for both log-probabilities"),
         ("objective/kl",)),
    Rule("sampler-differs", "responses are not sampled from the distribution that is trained",
         Sign(SAMPLER_DRIFT, SAMPLER_FP32, half=SAMPLER_HALF.high, floor=0.0, in_a_row=3, or_all=True),
         (NOISE, "top-k, top-p or another temperature in the sampler -> sample at --temperature alone",
          "other position ids or padding in one of the forwards -> positions count real tokens only",
          "the sampler's cache or stale weights -> compare one response token by token"),
         ("objective/kl",)),
    Rule("entropy-negative", "the entropy of the samples is negative",
         Sign("objective/entropy", ALARM["objective/entropy"]),
         ("masked log-probabilities hold a filler other than 0 and are summed -> mask before every sum",)),
    Rule("never-ends", "the policy does not end its answers, from the start",
         Sign("resp/eos_rate", Range(low=ENDS.low), steps=FIRST),
         (suspects.never_learned_to_end,
          "the responses are cut before they can end -> raise --response-length; compare with the data's lengths",
          NEVER_LEARNED_TO_END),
         ("resp/len_mean",)),
    # The reward
    Rule("reward-at-chance", "the reward model is {case} on held-out pairs", checks.reward_model_at_chance,
         {case: (_IT_CLIMBS, *causes) for case, causes in _AT_CHANCE.items()}, ("eval/nll",)),
    Rule("score-constant", "every {case}", checks.scores_alike, _SCORES_ALIKE,
         ("objective/score", "resp/duplicate_rate")),
    Rule("reward-not-normalised", "the scores do not start at deviation 1",
         Sign("objective/score_sd", Range(0.5, 2.0), steps=FIRST), _OTHER_SCALE,
         unless=("reward_fn", "score-constant")),
    Rule("reward-not-normalised", "the scores do not start at mean 0",
         Sign("objective/score", Range(-0.5, 0.5), steps=FIRST), _OTHER_SCALE,
         unless=("reward_fn", "score-constant")),
    # The size of the steps
    Rule("steps-too-large", "the policy moves too far in one iteration", checks.steps_too_large,
         (NOISE, EITHER_LR, "the learning rate is too high -> lower --lr; --warmup-iterations",
          suspects.steps_on_a_rollout, "epsilon of Adam too small for the first small gradients -> --adam-eps 1e-5"),
         ("policy/ratio_mean", "objective/kl")),
    Rule("does-not-move", "the policy stays what it was", checks.does_not_move,
         (LOW_LR, "the learning rate is too low; adapters need that of their preset -> raise --lr, or leave it away",
          "the adapter is not active in the training forward, or frozen -> --freeze auto",
          "advantages are all 0: the reward says nothing -> look at objective/score_sd"),
         ("policy/approxkl",)),
    # The policy
    Rule("over-optimised", "the gold reward falls while the trained one does not", checks.gold_falls,
         (PAID_KL, NO_PENALTY, HIGH_LR,
          "beta is too small for so long a run -> raise --kl-coef; fewer --iterations; an earlier checkpoint",
          "the reward model is weak where the policy has gone -> more and newer preference data for it"),
         ("eval/score", "eval/kl")),
    Rule("over-optimised", "the trained reward rises and the gold reward never does", checks.gold_never_rises,
         (PAID_KL, NO_PENALTY, "the reward model does not measure what gold does: at chance, or swapped -> "
                      "run the doctor on the run of -c; main.py -t reward on an obvious pair"),
         ("eval/score", "eval/kl")),
    Rule("kl-explodes", "the KL to the SFT model explodes", checks.kl_explodes,
         (PAID_KL, NO_PENALTY, HIGH_LR, "beta is too small -> raise --kl-coef, or set --kl-target",
          "steps too large -> lower --lr",
          "the reward is not normalised -> look at objective/score_sd of iteration 1"),
         ("objective/score",)),
    Rule("kl-negative", "the KL to the SFT model is negative",
         Sign("objective/kl", Range(low=ALARM["objective/kl"].low), mean=5, least=5, missing="five iterations"),
         (NOISE, "samples do not come from the distribution that is scored: top-k, top-p, another temperature -> "
                 "sample at --temperature alone; look at policy/sampler_vs_train_logp_max",
          "PAD tokens are counted -> mask after the first EOS",
          "the sampler has stale weights -> sample with the policy that is trained"),
         (SAMPLER_DRIFT,)),
    Rule("kl-without-score", "the KL goes on rising and the score hardly does", checks.kl_without_score,
         (PAID_KL, NO_PENALTY, HIGH_LR,
          "beta is too small: nothing holds the policy -> raise --kl-coef, or set --kl-target",
          "the reward model has nothing more to say -> fewer --iterations; take an earlier checkpoint"),
         ("objective/score",)),
    Rule("reward-falls", "the reward with its KL penalty falls", checks.reward_falls,
         (PAID_KL, EITHER_LR, "steps too large -> lower --lr, fewer --ppo-epochs",
          "the KL costs more than the score gives -> lower --kl-coef",
          "the critic misleads: look at val/explained_var -> --critic-warmup, another --critic-lr"),
         ("objective/score", "objective/kl")),
    Rule("stops-ending", "fewer and fewer responses end",
         Sign("resp/eos_rate", Range(low=0.9), in_a_row=3, least=4),
         (HIGH_LR, NO_PENALTY, suspects.cuts_are_free,
          "the reward model likes length -> look at length_corr and longer_wins of its run",
          "the penalty for a missing EOS is small against the scores -> raise --missing-eos-penalty"),
         ("resp/len_mean",), unless=("never-ends",)),
    Rule("length-collapses", "the responses shrink to almost nothing",
         Sign("resp/len_mean", Range(low=1 / 3, of="times the start"), mean=5, least=8, digits=1),
         (HIGH_LR, "the KL costs more for each token than the score gives -> lower --kl-coef",
          "the reward model likes short answers -> look at length_corr and longer_wins of its run"),
         ("resp/len_score_corr", "objective/score")),
    Rule("length-grows", "the responses grow, and length is what is paid", checks.length_grows,
         (NO_PENALTY, suspects.function_pays_length,
          "the reward model likes length -> balance its pairs by length; look at its length_corr",
          "cut responses lose too little -> raise --missing-eos-penalty"),
         ("resp/len_score_corr", "resp/eos_rate"), unless=("length-collapses",)),
    Rule("entropy-collapses", "the policy has stopped to explore",
         Sign("policy/entropy", _entropy, mean=3, least=4, digits=3),
         (HIGH_LR, NO_PENALTY, "beta too small, or too long a run -> raise --kl-coef, fewer --iterations",
          "learning rate too high, or temperature too low -> lower --lr; --temperature 1"),
         ("resp/distinct_2",)),
    Rule("text-degenerates", "the responses become alike or repeat themselves",
         Sign("resp/distinct_2", Range(low=0.5, of="times the start"), mean=5, least=8, digits=3), _ALIKE,
         ("resp/duplicate_rate", "objective/score")),
    Rule("text-degenerates", "the responses become alike or repeat themselves",
         Sign("resp/repetition", _repetition, mean=5, least=8), _ALIKE, ("resp/duplicate_rate", "objective/score")),
    Rule("kl-coef-saturates", "the adaptive KL coefficient runs away", Sign("objective/kl_coef", _kl_coef, in_a_row=3),
         ("--kl-target cannot be reached -> set it near the KL that the run shows",
          "the controller is too fast or too slow -> --kl-horizon"),
         ("objective/kl",), given="kl_target"),
    # The critic
    Rule("critic-blind", "the critic explains less than a constant would", checks.critic_is_blind,
         (EITHER_LR, "the critic learns too slowly or too fast -> --critic-lr; --critic-warmup 5",
          "the value clip is too tight for the reward's scale -> --value-clip-eps 0, or a normalised reward",
          "the score is placed on a column that is not trained -> score and value at the same last token"),
         ("loss/value", "val/clipfrac"), unless=("score-constant",)),
    Rule("critic-off-scale", "{case}", checks.critic_off_scale,
         (EITHER_LR, "the value clip is too tight for the reward's scale -> raise --value-clip-eps, or give 0",
          "the critic does not start on the scale of the reward -> -c with its gain and bias",
          "the critic learns too slowly -> raise --critic-lr; --critic-warmup 5"),
         ("val/return_mean", "val/mean", "val/clipfrac"), unless=("score-constant",)),
    _GRADIENT_SPIKES,
)  # fmt: skip

RULES: dict[str, tuple[Rule, ...]] = {"sft": _SFT, "rm": _RM, "ppo": _PPO}
