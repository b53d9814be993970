"""Causes that a run's own flags or figures point at. Rules have them among their causes; told where they hold."""

from __future__ import annotations

from experiments.doctor.checks import ratio_not_one
from experiments.doctor.record import RunRecord
from experiments.doctor.signs import Finding

_SUSPICIOUS_LR = 5.0  # times the preset's default
DROPOUT = "dropout is on in PPO -> dropout 0 in all four roles, in train() mode, too; attention included"
SCORE_COLUMN = "the score is read at a prompt or padding column -> see where with -t reward"
NEVER_LEARNED_TO_END = (
    "the SFT model never learned to end: EOS masked out of its targets, or forbidden in sampling -> "
    "run the doctor on the SFT run (-a); train it again with the EOS as a target"
)


def high_lr(record: RunRecord, settings: tuple[str, ...] = ("lr",)) -> str | None:
    """A learning rate far above the preset's default."""
    times, name = max((record.times_default(setting), setting) for setting in settings)
    if times < _SUSPICIOUS_LR:
        return None
    change = f"--{name.replace('_', '-')} {record.default(name):g} instead of {float(record.config[name]):g}"
    return f"the learning rate is {times:.3g} times the default of this preset -> {change}"


def low_lr(record: RunRecord) -> str | None:
    """A learning rate far below the preset's default."""
    if record.times_default("lr") > 1 / _SUSPICIOUS_LR:
        return None
    change = f"--lr {record.default('lr'):g} instead of {float(record.config['lr']):g}"
    return f"the learning rate is far below the default of this preset -> {change}"


def no_penalty(record: RunRecord) -> str | None:
    """A KL coefficient of 0, or of a tenth of the preset's default or less."""
    if record.times_default("kl_coef") > 0.1 or record.config.get("kl_target"):
        return None
    beta, usual = float(record.config["kl_coef"]), record.default("kl_coef")
    return f"nothing holds the policy near the SFT model: the KL coefficient is {beta:g} -> --kl-coef {usual:g}"


def penalty_pays(record: RunRecord) -> str | None:
    """The returns at the end are above the score by a part of the KL's price: the penalty counts as a reward. (Returns
    are above a score that has fallen, too, while the critic lags; then its values are above the returns.)"""
    tags = ("val/return_mean", "val/mean", "objective/score", "objective/kl")
    last = [record[tag].values[-5:] for tag in tags]
    if min(len(values) for values in last) < 5:
        return None
    returns, values, score, kl = (float(figures.mean()) for figures in last)
    price = kl * float(record["objective/kl_coef"].values[-1])
    if price < 0.2 or returns < max(values, score + 0.25 * price):
        return None
    return (
        f"the KL is paid for: the returns are {returns - score:.2f} above the score, and it should cost {price:.2f} -> "
        "the sign of the penalty in per_token_rewards of utils/loss.py"
    )


def many_epochs(record: RunRecord) -> str | None:
    """More than one pass over the data."""
    epochs = record.config.get("epochs", 1)
    return f"{epochs} passes over the data -> fewer --epochs" if epochs > 1 else None


def fp16(record: RunRecord) -> str | None:
    """The precision with the smallest range."""
    half = record.precision == "fp16"
    return "fp16 has overflowed -> --dtype fp32, or bf16 where the device has it" if half else None


def function_pays_length(record: RunRecord) -> str | None:
    """A reward function, where score and length correlate."""
    name = record.config.get("reward_fn")
    return f"--reward-fn {name} pays for length -> print what it gives a short and a long answer" if name else None


def cuts_are_free(record: RunRecord) -> str | None:
    """No penalty for a missing EOS."""
    free = not record.config.get("missing_eos_penalty")
    return "nothing is taken from a response that is cut -> --missing-eos-penalty 1" if free else None


def steps_on_a_rollout(record: RunRecord) -> str:
    """So many that each may be small and the sum is not."""
    steps = int(record.config.get("ppo_epochs") or 4) * int(record.config.get("minibatches") or 1)
    return f"{steps} steps on one rollout -> fewer --ppo-epochs or --minibatches; --kl-stop 0.02"


def dropout(record: RunRecord) -> str | None:
    """Two passes over one rollout differ before any step."""
    return DROPOUT if isinstance(ratio_not_one(record), Finding) else None


def never_learned_to_end(record: RunRecord) -> str | None:
    """Less than half of the responses end in the first iteration."""
    rate = record["resp/eos_rate"].values
    return NEVER_LEARNED_TO_END if len(rate) and rate[0] < 0.5 else None
