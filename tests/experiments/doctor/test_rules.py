"""Every rule of the doctor on figures made by hand: it fires on its symptom at the right step, and not just inside."""

from pathlib import Path

import numpy as np
import pytest

from experiments.doctor.record import RunRecord, Series
from experiments.doctor.run import Unclear, examine
from experiments.doctor.signs import Finding, lasting, trailing_mean

N = 30
ITERATIONS = np.arange(1, N + 1)
LOGGED = range(10, 101, 10)


def make(stage, figures, finished=True, precision="fp32", samples=(), reward=None, **config):
    """A record; a figure is an array over all steps 1, 2, ..., or a dict step -> value."""
    series = {}
    for tag, values in figures.items():
        steps = list(values) if isinstance(values, dict) else range(1, len(values) + 1)
        values = list(values.values()) if isinstance(values, dict) else values
        series[tag] = Series(np.array(list(steps)), np.array(values, dtype=float))
    settings = {"config": "gpt2-nano", "lr": DEFAULT_LR[stage], "eval_examples": 1000, **config}
    return RunRecord(Path("runs/x"), stage, settings, precision, series, list(samples), finished, reward)


DEFAULT_LR = {"sft": 0.003, "rm": 0.001, "ppo": 0.0003}


def level(value, n=N):
    return np.full(n, float(value))


def ppo_figures(n=N):
    """A healthy PPO run: KL to 2 nats, score to one deviation."""
    progress = np.minimum(1, np.arange(n) / 12)
    evaluations = dict(zip((0, 10, 20, 30), (0, 0.8, 1, 1)))
    return {
        "objective/kl": 2 * progress, "objective/kl_k3": 2 * progress, "objective/score": progress,
        "objective/score_sd": 1 - 0.4 * progress, "objective/rlhf_reward": 0.8 * progress,
        "objective/kl_coef": level(0.1, n), "objective/entropy": 7 - 2.5 * progress,
        "policy/entropy": 0.5 - 0.2 * progress, "policy/approxkl": level(0.002, n),
        "policy/approxkl_epoch1": level(0, n), "policy/clipfrac": level(0.02, n), "policy/ratio_mean": level(1, n),
        "policy/ratio_max": level(2, n), "val/explained_var": level(0.5, n), "val/mean": progress,
        "val/return_mean": progress, "val/return_var": level(0.4, n), "val/clipfrac": level(0.02, n),
        "resp/len_mean": level(15, n), "resp/len_score_corr": level(0, n), "resp/eos_rate": level(1, n),
        "resp/distinct_2": level(0.25, n), "resp/repetition": level(0.01, n), "resp/duplicate_rate": level(0.1, n),
        "grad_norm/actor": level(0.2, n), "grad_norm/critic": level(0.1, n),
        "policy/sampler_vs_train_logp_max": level(3e-6, n), "eval/score": evaluations,
        "eval/gold": {step: 0.3 + 2 * x for step, x in evaluations.items()}, "eval/kl": evaluations,
    }  # fmt: skip


def ppo(changes=None, **config):
    settings = dict(
        iterations=N, kl_coef=0.1, critic_lr=0.0005, minibatches=1, reward_fn="f.py:f", missing_eos_penalty=1
    )
    return make("ppo", ppo_figures() | (changes or {}), **{**settings, **config})


def at(value, *steps, tag):
    """The healthy figure with another value at some steps."""
    values = np.array(ppo_figures()[tag], dtype=float)
    values[[step - 1 for step in steps]] = value
    return {tag: values}


def codes(record):
    return [finding.code for finding in examine(record)[0]]


def test_the_healthy_figures_are_healthy_and_all_judged():
    assert examine(ppo()) == ([], [])


GROWTH = np.linspace(1, 2, N)
RISE = np.maximum(0, ITERATIONS - 5.0)
# changes, flags, code, first step; and the same just inside the range
PPO_CASES = [
    (at(1e-6, 4, tag="policy/approxkl_epoch1"), {}, "ratio-not-one", 4, at(1e-12, 4, tag="policy/approxkl_epoch1")),
    (at(0.01, 1, tag="objective/kl_k3"), {}, "kl-not-zero-at-start", 1, at(1e-8, 1, tag="objective/kl_k3")),
    ({"policy/sampler_vs_train_logp_max": level(1e-3)}, {}, "sampler-differs", 1,
     at(1e-3, 5, 7, tag="policy/sampler_vs_train_logp_max")),
    (at(-0.1, 9, tag="objective/entropy"), {}, "entropy-negative", 9, at(0.1, 9, tag="objective/entropy")),
    ({"resp/eos_rate": level(0.2)}, {}, "never-ends", 1, {"resp/eos_rate": level(0.96)}),
    ({"resp/eos_rate": np.r_[level(1, 10), level(0.8, 20)]}, {}, "stops-ending", 11,
     at(0.5, 10, 11, 14, tag="resp/eos_rate")),
    ({"objective/score_sd": level(3)}, {"reward_fn": ""}, "reward-not-normalised", 1,
     {"objective/score_sd": level(1.8)}),
    (at(0.8, 1, tag="objective/score"), {"reward_fn": ""}, "reward-not-normalised", 1,
     at(-0.4, 1, tag="objective/score")),
    ({"objective/score_sd": np.r_[level(1, 9), level(0.01, 21)]}, {}, "score-constant", 10,
     at(0.01, 10, 11, tag="objective/score_sd")),
    ({"objective/score_sd": level(0)}, {}, "score-constant", 1, {"objective/score_sd": level(0.001)}),
    ({"objective/score_sd": level(1e-3), "objective/score": level(1e4)}, {}, "score-constant", 1,
     {"objective/score_sd": level(1), "objective/score": level(1e4)}),
    ({"objective/score_sd": level(0.01)}, {"reward_fn": ""}, "score-constant", 1,
     at(0, 1, 2, tag="objective/score_sd")),
    ({"objective/score_sd": level(0.01)}, {"reward_fn_weight": 0.5}, "score-constant", 1,
     {"objective/score_sd": level(0.1)}),
    (at(0.05, 6, 7, 8, tag="policy/approxkl"), {}, "steps-too-large", 6, at(0.05, 1, 2, tag="policy/approxkl")),
    (at(0.4, 6, 7, 8, tag="policy/clipfrac"), {}, "steps-too-large", 6, at(0.4, 6, 8, 10, tag="policy/clipfrac")),
    (at(0.9, 2, 3, 4, tag="policy/ratio_mean"), {}, "steps-too-large", 2, at(0.96, 2, 3, 4, tag="policy/ratio_mean")),
    (at(50, 2, 3, 4, tag="policy/ratio_max"), {}, "steps-too-large", 2, at(50, 1, 20, tag="policy/ratio_max")),
    ({"objective/kl": level(0), "objective/kl_k3": level(0), "policy/approxkl": level(0)}, {}, "does-not-move", 30,
     {"objective/kl": level(0), "objective/kl_k3": level(0), "policy/approxkl": level(1e-5)}),
    ({"objective/kl": np.r_[level(2, 20), level(35, 10)]}, {}, "kl-explodes", 21, {"objective/kl": 0.25 * ITERATIONS}),
    ({"objective/kl": np.r_[level(6, 20), level(14, 10)]}, {}, "kl-explodes", 21,
     {"objective/kl": np.r_[level(6, 20), level(11, 10)], "objective/score": np.r_[level(0, 20), level(1, 10)]}),
    ({"objective/kl": np.r_[level(0, 10), level(-1, 20)]}, {}, "kl-negative", 11, {"objective/kl": level(-0.3)}),
    ({"objective/kl": RISE}, {}, "kl-without-score", 16, {"objective/kl": RISE, "objective/score": 0.1 * RISE}),
    ({"eval/gold": dict(zip((0, 10, 20, 30), (0, 2, 1.7, 1.2)))}, {}, "over-optimised", 20,
     {"eval/gold": dict(zip((0, 10, 20, 30), (0, 2, 1.9, 1.6)))}),
    ({"eval/gold": dict(zip((0, 10, 20, 30), (1, 0.9, 0.8, 0.9)))}, {}, "over-optimised", 10,
     {"eval/gold": dict(zip((0, 10, 20, 30), (1, 0.9, 0.8, 1.1)))}),
    ({"objective/rlhf_reward": np.linspace(0, -1, N)}, {}, "reward-falls", None,
     {"objective/rlhf_reward": np.linspace(0, -0.2, N)}),
    ({"objective/rlhf_reward": np.r_[np.linspace(0, 1, 5), np.linspace(1, 0.5, 25)]}, {}, "reward-falls", None,
     {"objective/rlhf_reward": np.r_[np.linspace(0, 1, 5), np.linspace(1, 0.9, 25)]}),
    ({"resp/len_mean": np.r_[level(15, 10), level(2, 20)]}, {}, "length-collapses", 11,
     {"resp/len_mean": np.r_[level(15, 10), level(8, 20)]}),
    ({"resp/len_mean": 15 * GROWTH, "resp/len_score_corr": level(0.7)}, {}, "length-grows", None,
     {"resp/len_mean": 15 * GROWTH, "resp/len_score_corr": level(0.3)}),
    ({"policy/entropy": np.r_[level(0.5, 10), level(0.05, 20)]}, {}, "entropy-collapses", 11,
     {"policy/entropy": np.r_[level(0.5, 10), level(0.2, 20)]}),
    ({"resp/distinct_2": np.r_[level(0.3, 10), level(0.1, 20)]}, {}, "text-degenerates", 11,
     {"resp/distinct_2": np.r_[level(0.3, 10), level(0.2, 20)]}),
    ({"resp/repetition": np.r_[level(0, 10), level(0.5, 20)]}, {}, "text-degenerates", 11,
     {"resp/repetition": np.r_[level(0, 10), level(0.2, 20)]}),
    ({"objective/kl_coef": 0.1 * 1.2**ITERATIONS}, {"kl_target": 6.0}, "kl-coef-saturates", None,
     {"objective/kl_coef": 0.1 * 1.02**ITERATIONS}),
    ({"val/explained_var": level(-0.2)}, {}, "critic-blind", 21, at(-0.5, *range(1, 20), tag="val/explained_var")),
    ({"val/mean": ppo_figures()["val/return_mean"] + 2}, {}, "critic-off-scale", 11,
     {"val/mean": ppo_figures()["val/return_mean"] + 0.3}),
    ({"val/clipfrac": level(0.5)}, {}, "critic-off-scale", 11, {"val/clipfrac": np.r_[level(0.5, 8), level(0, 22)]}),
    (at(9, 12, 20, 25, tag="grad_norm/actor"), {}, "gradient-spikes", 12, at(9, 12, 20, tag="grad_norm/actor")),
    # From nothing to something is no spike: a critic's warm-up, a constant reward, and what rounding leaves of one.
    (at(9, 12, 20, 25, tag="grad_norm/critic"), {}, "gradient-spikes", 12,
     {"grad_norm/actor": np.r_[level(0, 10), level(0.2, 20)]}),
    (at(9, 12, 20, 25, tag="grad_norm/actor"), {}, "gradient-spikes", 12,
     {"grad_norm/actor": np.r_[level(0, 7), 0.7, 0, 0, 0.6, 0, 0, 0.5, level(0, 16)]}),
    (at(9, 12, 20, 25, tag="grad_norm/actor"), {}, "gradient-spikes", 12,
     {"grad_norm/actor": np.r_[level(1e-9, 7), 0.7, 1e-9, 1e-9, 0.6, 1e-9, 1e-9, 0.5, level(1e-9, 16)]}),
    (at(9, 12, 20, 25, tag="grad_norm/actor"), {}, "gradient-spikes", 12,
     {"grad_norm/actor": np.r_[level(1e-4, 8), level(0.2, 22)]}),
    (at(np.nan, 7, tag="policy/approxkl"), {}, "not-a-number", 7, at(np.nan, 7, tag="resp/len_score_corr")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "config", "code", "step", "inside"), PPO_CASES)
def test_a_symptom_of_ppo(changes, config, code, step, inside):
    findings, _ = examine(ppo(changes, **config))
    found = next(f for f in findings if f.code == code)
    assert step is None or found.step == step
    assert found.causes and all(cause.why and cause.change for cause in found.causes)
    outside = (found.low is not None and found.value < found.low) or (
        found.high is not None and found.value > found.high
    )
    # Of NaN nothing can be said, and values are judged by their distance to the returns.
    assert outside == (np.isfinite(found.value) and found.tag != "val/mean")
    assert code not in codes(ppo(inside, **config))


CONSTANT = {"objective/score_sd": level(0), "val/explained_var": level(-0.2), "val/return_var": level(0)}


@pytest.mark.parametrize(("figures", "config", "title", "cause", "note"), [
    ({}, {}, "every reward of --reward-fn is the same", "the function gives all responses one number", "score is 0.5"),
    ({"objective/score": ITERATIONS % 3}, {}, "every reward of --reward-fn is the same", "the function gives",
     "alike within an iteration and differs between them: 1, 2, 0"),
    ({}, {"reward_fn": ""}, "every score of the reward model is the same", "the reward model tells no", "is 0.5"),
    ({"objective/score_sd": np.r_[level(1, 5), level(0, 25)]}, {}, "every response gets the same score",
     "the policy gives one answer", "is 0.5"),
])  # fmt: skip
def test_a_constant_reward_is_called_by_its_name(figures, config, title, cause, note):
    """And it is what is wrong: what the critic makes of it, and a scale that is none, are not told."""
    (found,), _ = examine(ppo(CONSTANT | {"objective/score": level(0.5)} | figures, **config))
    assert (found.code, found.title) == ("score-constant", title)
    assert found.causes[0].why.startswith(cause) and note in found.notes[0]


def test_a_run_of_two_iterations_tells_a_constant_reward():
    short = {tag: values[:2] for tag, values in ppo_figures().items() if isinstance(values, np.ndarray)}
    record = make("ppo", short | {"objective/score_sd": level(0, 2)}, iterations=2, reward_fn="f.py:f", minibatches=1)
    assert codes(record) == ["score-constant"]


@pytest.mark.parametrize("gold", [(1, 1, 1, 1), (1, 1 + 1e-9, 1, 1 - 1e-9), (1e6, 1e6 + 0.01, 1e6, 1e6)])
def test_a_gold_reward_that_is_constant_judges_nothing(gold):
    findings, unclear = examine(ppo({"eval/gold": dict(zip((0, 10, 20, 30), gold))}))
    assert findings == [] and unclear[0].code == "over-optimised" and "a gold reward that varies" in unclear[0].missing


@pytest.mark.parametrize("stage,tag", [("sft", "eval/loss"), ("rm", "eval/nll")])
def test_what_was_learned_before_cannot_be_lowered(stage, tag):
    figures = {tag: dict(zip((0, 50, 100), (0.002, 0.002, 0.003))), "train/loss": level(0.002, 100)}
    findings, unclear = examine(make(stage, figures, epochs=1))
    assert "not-learning" not in [f.code for f in findings]
    assert "a held-out loss to be lowered" in next(u.missing for u in unclear if u.code == "not-learning")


def test_the_flags_of_a_run_decide_which_cause_comes_first():
    changes = at(0.05, 6, 7, 8, tag="policy/approxkl")
    assert "30 times" in examine(ppo(changes, lr=0.009))[0][0].causes[0].why
    assert "30 times" in examine(ppo(changes, critic_lr=0.015))[0][0].causes[0].why
    assert "30 times" not in examine(ppo(changes))[0][0].causes[0].why
    rising = {"objective/kl": RISE}
    assert examine(ppo(rising, kl_coef=0.0))[0][0].causes[0].change == "--kl-coef 0.08"
    assert "coefficient is" not in examine(ppo(rising))[0][0].causes[0].why
    assert "coefficient is" not in examine(ppo(rising, kl_coef=0.0, kl_target=6.0))[0][0].causes[0].why
    still = {"objective/kl": level(0), "objective/kl_k3": level(0), "policy/approxkl": level(0)}
    assert examine(ppo(still, lr=1e-6))[0][0].causes[0].change == "--lr 0.0003 instead of 1e-06"


def test_length_is_paid_by_what_gives_the_reward():
    grows = {"resp/len_mean": 15 * GROWTH, "resp/len_score_corr": level(0.7)}
    assert "--reward-fn f.py:f" in examine(ppo(grows))[0][0].causes[0].why
    assert "reward model" in examine(ppo(grows, reward_fn=""))[0][0].causes[0].why


def test_returns_above_the_score_betray_a_kl_that_is_paid_for():
    """A penalty of the wrong sign; not a score that has fallen before the critic sees it."""
    rising = {"objective/kl": RISE, "objective/score": level(0.5), "val/mean": level(0.8)}
    for returns, values, first in ((2.0, 0.8, True), (0.6, 0.8, False), (2.0, 2.2, False)):
        figures = rising | {"val/return_mean": level(returns), "val/mean": level(values)}
        finding = examine(ppo(figures))[0][0]
        assert ("sign of the penalty" in finding.causes[0].change) == first, (returns, values, finding)
    free = rising | {"val/return_mean": level(2.0), "objective/kl_coef": level(0)}
    assert examine(ppo(free, kl_coef=0.0))[0][0].causes[0].change == "--kl-coef 0.08"


def test_what_is_one_fault_is_told_once():
    """Cases of one code, and what only follows from a finding that was made already."""
    both = {"resp/distinct_2": np.r_[level(0.3, 10), level(0.1, 20)], "resp/repetition": level(0.5) * (ITERATIONS > 5)}
    assert codes(ppo(both)) == ["text-degenerates"]
    scale = at(3, 1, tag="objective/score_sd") | at(0.8, 1, tag="objective/score")
    found = [f for f in examine(ppo(scale, reward_fn=""))[0] if f.code == "reward-not-normalised"]
    assert [f.tag for f in found] == ["objective/score_sd"]
    assert codes(ppo({"resp/eos_rate": level(0.2)})) == ["never-ends"]
    shrinks_then_grows = np.r_[level(15, 10), level(2, 10), level(40, 10)]
    assert codes(ppo({"resp/len_mean": shrinks_then_grows, "resp/len_score_corr": level(0.7)})) == ["length-collapses"]


def test_some_rules_ask_for_a_flag():
    rising = {"objective/kl_coef": 0.1 * 1.2**ITERATIONS}
    assert codes(ppo(rising, kl_target=6.0)) == ["kl-coef-saturates"] and codes(ppo(rising)) == []
    scale = {"objective/score_sd": level(3)}
    assert codes(ppo(scale)) == [] and codes(ppo(scale, reward_fn="", critic="none")) == ["reward-not-normalised"]


def test_dropout_is_named_where_the_first_ratio_betrays_it():
    drift = {"policy/sampler_vs_train_logp_max": level(1e-2)}
    findings, _ = examine(ppo(drift))
    assert "dropout" not in findings[0].causes[0].why  # the forward repeats itself: the sampler is what differs
    findings, _ = examine(ppo(drift | {"policy/approxkl_epoch1": level(1e-3)}))
    assert [f.code for f in findings] == ["ratio-not-one", "sampler-differs"]
    assert all("dropout" in f.causes[0].why for f in findings)


def test_half_precision_has_wider_ranges():
    noisy = {"policy/approxkl_epoch1": level(1e-5), "policy/sampler_vs_train_logp_max": level(1e-2)}
    noisy["objective/kl_k3"] = np.maximum(ppo_figures()["objective/kl_k3"], 1e-3)
    assert codes(ppo(noisy)) == ["ratio-not-one", "kl-not-zero-at-start", "sampler-differs"]
    assert codes(ppo(noisy, precision="bf16")) == []


def test_gold_may_move_by_chance_while_the_score_stands_still():
    still = {
        "eval/gold": dict(zip((0, 10, 20, 30), (1, 1.1, 1, 0.9))),
        "eval/score": dict.fromkeys((0, 10, 20, 30), 0.1),
    }
    assert examine(ppo(still))[0] == []
    rising = {"eval/score": dict(zip((0, 10, 20, 30), (0, 0.3, 0.5, 0.6)))}
    assert codes(ppo(still | rising)) == ["over-optimised"]


def test_several_minibatches_leave_the_first_ratio_unclear():
    findings, unclear = examine(ppo({"policy/approxkl_epoch1": level(1e-3)}, minibatches=4))
    assert findings == [] and [u.code for u in unclear] == ["ratio-not-one"]


def test_a_short_run_says_what_it_cannot_tell():
    short = ppo().up_to(4)
    findings, unclear = examine(short)
    assert findings == [] and short.last_step == 4
    missing = {u.code: u.missing for u in unclear}
    assert {"does-not-move", "kl-negative", "kl-without-score", "critic-blind", "over-optimised"} <= set(missing)
    assert missing["kl-without-score"] == "15 iterations"
    without = ppo_figures()
    del without["eval/gold"]
    _, unclear = examine(make("ppo", without, iterations=N, reward_fn="f.py:f"))
    assert [u.code for u in unclear] == ["over-optimised"] and "--eval-reward-fn" in unclear[0].missing


def test_warm_up_of_the_critic_is_not_standing_still():
    still = {"objective/kl": level(0), "objective/kl_k3": level(0), "policy/approxkl": level(0)}
    assert "does-not-move" in codes(ppo(still))
    assert "does-not-move" not in codes(ppo(still, critic_warmup=28))


def rm_figures(accuracy=0.8, nll=0.45, start=0.9):
    steps = (0, 50, 100)
    return {
        "norm/raw_sd": {0: 0.6, 100: 1.1}, "eval/accuracy": dict(zip(steps, (0.5, accuracy - 0.02, accuracy))),
        "eval/nll": dict(zip(steps, (start, nll + 0.02, nll))), "eval/margin_sd": dict(zip(steps, (1.3, 1.5, 1.6))),
        "eval/ece": dict(zip(steps, (0.2, 0.03, 0.02))), "eval/length_corr": dict(zip(steps, (0, -0.3, -0.3))),
        "eval/longer_wins": dict.fromkeys(steps, 0.4), "train/loss": dict.fromkeys(range(10, 101, 10), 0.5),
        "train/grad_norm": dict.fromkeys(range(10, 101, 10), 0.8), "train/epoch": {s: s / 100 for s in LOGGED},
    }  # fmt: skip


def rm(changes=None, finished=True, epochs=1, **config):
    return make("rm", rm_figures() | (changes or {}), finished=finished, epochs=epochs, max_steps=0, **config)


RM_CASES = [
    (rm_figures(accuracy=0.51, nll=0.693), "reward-at-chance", "no better than chance"),
    (rm_figures(accuracy=0.3, nll=0.9), "reward-at-chance", "worse than chance"),
    (rm_figures(accuracy=0.59), "reward-at-chance", "no better than the length"),
    ({"norm/raw_sd": {0: 0.6, 100: 1e-5}}, "score-constant", "same score"),
    ({"eval/margin_sd": {0: 7.0, 100: 2.0}}, "scale-off", "too far apart"),
    ({"eval/nll": {0: 0.9, 50: 0.5, 100: 0.6}, "eval/accuracy": {0: 0.5, 50: 0.75, 100: 0.68}}, "forgets", "loses"),
    ({"train/loss": dict(zip(LOGGED, [1.5] + [0.5] * 9))}, "diverges", "model worse"),
    ({"eval/nll": {0: 0.6, 50: 0.62, 100: 0.61}}, "not-learning", "no lower than before"),
    ({"eval/nll": {0: 0.9, 30: 0.4, 60: 0.52, 100: 0.6}}, "overfitted", "rises again"),
    ({"eval/ece": {0: 0.3, 50: 0.2, 100: 0.2}}, "miscalibrated", "surer"),
    ({"eval/length_corr": {0: 0, 50: 0.9, 100: 0.9}}, "length-bias", "length"),
    ({"train/loss": {s: np.nan if s == 50 else 0.5 for s in LOGGED}}, "not-a-number", "NaN"),
]


@pytest.mark.parametrize(("changes", "code", "title"), RM_CASES)
def test_a_symptom_of_a_reward_model(changes, code, title):
    findings, _ = examine(rm(changes))
    found = next(f for f in findings if f.code == code)
    assert title in found.title and found.causes


def test_healthy_reward_models():
    assert examine(rm()) == ([], [])
    assert codes(rm(rm_figures(accuracy=0.62))) == []  # above the better of length (0.6) and chance (0.53)
    assert codes(rm({"eval/margin_sd": {0: 2.5, 100: 6.0}})) == []
    assert codes(rm({"eval/nll": {0: 0.9, 50: 0.5, 100: 0.6}})) == []  # accuracy holds
    assert codes(rm({"eval/accuracy": {0: 0.5, 50: 0.8, 100: 0.76}, "eval/nll": {0: 0.9, 50: 0.5, 100: 0.56}})) == []


def test_accuracy_waits_for_half_of_the_run():
    early = rm(rm_figures(accuracy=0.51, nll=0.6), finished=False, epochs=4)
    findings, unclear = examine(early)
    assert findings == [] and [u.code for u in unclear] == ["reward-at-chance"] and "400" in unclear[0].missing
    start = early.up_to(0)
    assert start.planned_steps == 0 and examine(start)[0] == []


def test_ppo_asks_its_reward_model():
    config = dict(reward_fn="", critic="rm_x")
    findings, _ = examine(ppo(reward=rm(rm_figures(accuracy=0.5, nll=0.693)), **config))
    assert findings[0].code == "reward-at-chance" and findings[0].of.stage == "rm"
    assert "train it again" in findings[0].causes[0].change
    assert examine(ppo(reward=rm(), **config)) == ([], [])
    findings, unclear = examine(ppo(**config))
    assert findings == [] and [u.code for u in unclear] == ["reward-at-chance"]
    assert examine(ppo(reward=rm(rm_figures(accuracy=0.5)), reward_fn="f.py:f")) == ([], [])  # not what it climbs


def sft_figures(**changes):
    steps = (0, 50, 100)
    figures = {
        "eval/loss": dict(zip(steps, (3.0, 0.8, 0.6))), "resp/eos_rate": dict(zip(steps, (0.2, 0.97, 1))),
        "resp/repetition": dict(zip(steps, (0.5, 0.02, 0.02))), "train/loss": {s: 60 / (s + 30) for s in LOGGED},
        "train/grad_norm": dict.fromkeys(range(10, 101, 10), 0.5), "train/epoch": {s: s / 100 for s in LOGGED},
    }  # fmt: skip
    return figures | changes


def sft(changes=None, samples=(), finished=True, **config):
    settings = dict(epochs=1, max_steps=0, dataset="demo")
    return make("sft", sft_figures() | (changes or {}), finished, samples=samples, **{**settings, **config})


SFT_CASES = [
    ({"resp/eos_rate": {0: 0, 50: 0.0, 100: 0.0}}, "never-ends", 50),
    ({"eval/loss": {0: 3.0, 50: 3.2, 100: 2.99}}, "not-learning", 50),
    ({"train/loss": dict(zip(LOGGED, [2, 1, 0.5, 0.5, 0.5, 0.5, 2, 2, 2, 2]))}, "diverges", 70),
    ({"train/loss": dict(zip(LOGGED, [3.4, 3.6, 2, 1, 1, 1, 1, 1, 1, 1]))}, "diverges", 20),
    ({"eval/loss": {0: 3.0, 30: 0.6, 60: 0.8, 100: 0.9}}, "overfitted", 60),
    ({"resp/repetition": {0: 0.0, 50: 0.5, 100: 0.5}}, "repeats-itself", 50),
]


@pytest.mark.parametrize(("changes", "code", "step"), SFT_CASES)
def test_a_symptom_of_sft(changes, code, step):
    findings, _ = examine(sft(changes))
    assert [f.code for f in findings] == [code] and findings[0].step == step


def test_healthy_sft():
    assert examine(sft()) == ([], [])
    text = {tag: s for tag, s in sft_figures().items() if not tag.startswith("resp/")}
    assert examine(make("sft", text, epochs=1, max_steps=0, dataset="demo-text")) == ([], [])
    unclear = examine(make("sft", text, epochs=1, max_steps=0, dataset="mine.jsonl"))[1]
    assert [u.code for u in unclear] == ["never-ends"]


def test_samples_tell_a_masked_eos_from_samples_that_are_cut():
    some = {"resp/eos_rate": {0: 0.2, 50: 0.7, 100: 0.8}}
    runs_on = [{"step": 100, "prompt": "p", "response": " Yes.\n\nHuman: And then?"}] * 3
    plain = [{"step": 100, "prompt": "p", "response": " A long story"}] * 3
    assert "no target" in examine(sft(some, runs_on))[0][0].causes[0].why
    assert "cut" in examine(sft(some, plain))[0][0].causes[0].why
    none = {"resp/eos_rate": {0: 0.2, 50: 0.0, 100: 0.0}}
    assert "no target" in examine(sft(none, plain))[0][0].causes[0].why


def test_lasting():
    assert lasting(np.array([True, False, True, True, True]), 2) == 2
    assert lasting(np.array([True, False, True]), 2) is None
    assert lasting(np.zeros(0, dtype=bool), 1) is None


def test_trailing_mean():
    assert trailing_mean(np.array([1.0, 2, 3, 6]), 3).tolist() == pytest.approx([2, 11 / 3])


def test_kinds():
    findings, unclear = examine(ppo(at(0.05, 6, 7, 8, tag="policy/approxkl")).up_to(9))
    assert all(isinstance(f, Finding) for f in findings) and all(isinstance(u, Unclear) for u in unclear)
    assert findings and unclear
