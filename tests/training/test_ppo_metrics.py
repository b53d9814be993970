"""The figures of a PPO iteration: all of them are there, finite, and mean what their names say."""

import math

import numpy as np
import pytest
import torch
from setups import prompt_examples, read_metrics
from torch import nn

from training.engine.runtime import adamw
from training.loop import EVALUATION_SAMPLES, row_seeds
from training.ppo_metrics import (
    add_all,
    explained_variance,
    loss_metrics,
    rollout_metrics,
    update_ratios,
    value_metrics,
)
from utils.loss import policy_loss, value_loss

PHASES = ("rollout", "score", "reference", "update")
KEYS = {
    "objective": {
        "kl", "kl_k3", "kl_per_token", "score", "score_sd", "score_p5", "score_p95", "rlhf_reward", "kl_coef",
        "entropy",
    },
    "policy": {
        "entropy", "approxkl", "approxkl_epoch1", "approxkl_epoch2", "clipfrac", "kl_stopped", "ratio_mean",
        "ratio_var", "ratio_max", "sampler_vs_train_logp_max",
    },
    "loss": {"policy", "value"},
    "val": {"explained_var", "explained_var_mse", "clipfrac", "mean", "return_mean", "return_var", "advantage_var"},
    "lr": {"actor", "critic"},
    "grad_norm": {"actor", "critic"},
    "update_ratio": {"actor", "critic"},
    "resp": {
        "len_mean", "len_p50", "len_p95", "len_score_corr", "eos_rate", "distinct_2", "repetition", "duplicate_rate",
    },
    "time": {"tokens_per_s"}
    | {f"{phase}_{what}" for phase in PHASES for what in ("s", "share", "tokens_per_s")},
    "train": {"optimizer_steps"},
}  # fmt: skip
EVAL_KEYS = {"eval/score", "eval/kl", "eval/rlhf_reward", "eval/len_mean", "eval/eos_rate", "eval/gold"}


def long_answers(prompts, responses) -> list[float]:
    return [float(len(r)) for r in responses]


def test_all_figures_are_logged_and_finite(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(
        actor=make_model("actor", seed=5), reference=make_model("actor", seed=5), eval_reward_fn=long_answers,
        iterations=3, global_batch_size=16, eval_every=2,
    )  # fmt: skip
    assert trainer.fit() == 0
    lines = read_metrics(trainer.run)
    steps = [line for line in lines if "objective/kl" in line]
    evaluations = [line for line in lines if "eval/kl" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and [line["step"] for line in evaluations] == [0, 2, 3]
    expected = {f"{group}/{key}" for group, keys in KEYS.items() for key in keys}
    for line in steps:
        assert set(line) == expected | {"step", "time"}
        assert all(value is not None and math.isfinite(value) for value in line.values()), line
        assert line["objective/entropy"] > 0 and line["policy/entropy"] > 0 and line["objective/kl_k3"] >= 0
        assert 0 < line["resp/eos_rate"] < 1 and 0 <= line["policy/clipfrac"] <= 1
        assert line["policy/sampler_vs_train_logp_max"] < 1e-4
        assert line["policy/approxkl_epoch1"] == 0 < line["policy/approxkl_epoch2"]
    for line in evaluations:
        assert set(line) == EVAL_KEYS | {"step", "time"}
        assert line["eval/gold"] == pytest.approx(line["eval/len_mean"] - line["eval/eos_rate"])
    assert evaluations[0]["eval/kl"] == 0


def test_held_out_figures_are_those_of_the_rows(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(
        actor=make_model("actor", seed=5), reference=make_model("actor", seed=2), kl_coef=0.3, eval_examples=10,
        missing_eos_penalty=2.0,
    )  # fmt: skip
    trainer.kl_coef = 9.0  # an adaptive coefficient has moved; evaluations go on with the first one
    trainer.evaluate()
    (line,) = read_metrics(trainer.run)
    experience = trainer.rollouts.sample(list(trainer.validation), row_seeds(0, EVALUATION_SAMPLES, 10))
    trainer.rollouts.evaluate_roles(experience, [np.arange(10)])
    kl = (experience.logp - experience.logp_ref).sum(1)
    assert 0 < int(experience.ended.sum()) < 10 and float(kl.mean()) > 1
    reward = experience.scores - 2.0 * ~experience.ended - 0.3 * kl
    expected = {"score": experience.scores, "kl": kl, "rlhf_reward": reward, "len_mean": experience.n.float()}
    for key, values in expected.items():
        assert line[f"eval/{key}"] == pytest.approx(float(values.mean()), rel=1e-4), key


def test_rollout_figures_are_those_of_the_rows(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(actor=make_model("actor", seed=5), reference=make_model("actor", seed=2))
    experience = trainer.rollouts.sample(list(prompt_examples(14)), list(range(14)))
    trainer.rollouts.evaluate_roles(experience, [np.arange(14)])
    penalised = experience.scores - 1.0 * ~experience.ended
    figures = {k: float(v) for k, v in rollout_metrics(experience, penalised, 0.3).items()}
    rows = [(experience.logp[i, :n].double(), experience.logp_ref[i, :n].double()) for i, n in enumerate(experience.n)]
    kl = torch.stack([(a - b).sum() for a, b in rows])
    lengths, scores = experience.n.double(), experience.scores.double()
    expected = {
        "objective/kl": kl.mean(),
        "objective/kl_k3": torch.stack([(torch.exp(b - a) - 1 + a - b).sum() for a, b in rows]).mean(),
        "objective/kl_per_token": kl.sum() / lengths.sum(),
        "objective/score": scores.mean(),
        "objective/score_sd": scores.std(correction=0),
        "objective/score_p5": scores.quantile(0.05),
        "objective/score_p95": scores.quantile(0.95),
        "objective/rlhf_reward": (penalised - 0.3 * kl).mean(),
        "objective/kl_coef": 0.3,
        "objective/entropy": -torch.stack([a.sum() for a, _ in rows]).mean(),
        "policy/entropy": sum(experience.entropy[i, :n].sum() for i, n in enumerate(experience.n)) / lengths.sum(),
        "resp/len_mean": lengths.mean(),
        "resp/len_p50": lengths.quantile(0.5),
        "resp/len_p95": lengths.quantile(0.95),
        "resp/len_score_corr": np.corrcoef(lengths, scores)[0, 1],
        "resp/eos_rate": experience.ended.float().mean(),
        "policy/sampler_vs_train_logp_max": max(
            (a - experience.sampler_logp[i, : len(a)]).abs().max() for i, (a, _) in enumerate(rows)
        ),
    }
    for key, value in expected.items():
        assert figures[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


def test_garbage_behind_the_end_changes_no_figure(ppo_trainer, make_model) -> None:
    trainer = ppo_trainer(actor=make_model("actor", seed=5))
    experience = trainer.rollouts.sample(list(prompt_examples(14)), list(range(14)))
    trainer.rollouts.evaluate_roles(experience, [np.arange(14)])
    returns = experience.values + 0.1

    def figures() -> dict[str, float]:
        return {
            key: float(value)
            for key, value in (
                rollout_metrics(experience, experience.scores, 0.1)
                | value_metrics(experience.values, returns, returns, experience.rmask)
            ).items()
        }

    before = figures()
    for name in ("logp", "logp_ref", "values", "entropy", "sampler_logp"):
        getattr(experience, name)[~experience.rmask] = 1e3
    returns[~experience.rmask] = -1e3
    assert (~experience.rmask).any() and figures() == before


def test_statistics_of_a_padded_row_have_no_sentinel() -> None:
    """Log-probabilities [-1, -2, -1] and 50 pads are 4 nats, whatever stands at the pads."""
    logp = torch.full((1, 53), 1.0)
    logp[0, :3] = torch.tensor([-1.0, -2.0, -1.0])
    mask = torch.arange(53)[None] < 3
    stats = policy_loss(logp, logp + torch.where(mask, 0.0, 9.0), torch.ones(1, 53), mask, 0.2, 3).stats.means()
    assert float(stats["ratio_mean"]) == 1.0 == float(stats["ratio_max"])
    assert float(stats["approx_kl"]) == 0.0


def test_explained_variance_in_both_forms() -> None:
    R, V = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.1, 1.9, 3.2, 3.8]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    figures = value_metrics(V, R, R, mask)
    assert float(figures["val/explained_var"]) == pytest.approx(0.98) == float(figures["val/explained_var_mse"])
    figures = value_metrics(R + 5, R, R, mask)
    assert float(figures["val/explained_var"]) == 1.0 and float(figures["val/explained_var_mse"]) == pytest.approx(
        -19.0
    )


def test_explained_variance_is_masked() -> None:
    mask = torch.arange(5) < torch.tensor([1, 5, 2, 4])[:, None]
    values, returns = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, r = values[mask], returns[mask]
    by_variance, by_error = explained_variance(values, returns, mask)
    torch.testing.assert_close(by_variance, 1 - (r - v).var(correction=0) / r.var(correction=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_error, 1 - (r - v).square().mean() / r.var(correction=0), rtol=0, atol=1e-12)


def test_explained_variance_of_a_constant_critic_is_0_and_of_constant_returns_undefined() -> None:
    R, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert [float(x) for x in explained_variance(torch.full((1, 4), 2.5), R, mask)] == [0.0, 0.0]
    assert all(math.isnan(float(x)) for x in explained_variance(R, torch.zeros(1, 4), mask))


def test_statistics_of_parts_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    old, new, A, V0, V, R = torch.randn(6, 8, 5)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5, 1, 2])[:, None]

    def stats(rows: slice):
        a = policy_loss(new[rows], old[rows], A[rows], mask[rows], 0.2, 9).stats
        return a, value_loss(V[rows], V0[rows], R[rows], mask[rows], 0.2, 9).stats

    parts = loss_metrics(*(x.means() for x in add_all([stats(slice(0, 1)), stats(slice(1, 6)), stats(slice(6, 8))])))
    whole = loss_metrics(*(x.means() for x in stats(slice(0, 8))))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, msg=key)
    ratio = (new - old)[mask].exp()
    torch.testing.assert_close(whole["policy/ratio_mean"], ratio.mean())
    torch.testing.assert_close(whole["policy/ratio_var"], ratio.var(correction=0))
    torch.testing.assert_close(whole["policy/ratio_max"], ratio.max())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_ratios_are_those_of_the_steps_taken(weight_decay: float) -> None:
    torch.manual_seed(0)
    groups = {role: [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))] for role in ("actor", "critic")}
    named = [{"name": role, "params": params, "lr": 1e-2} for role, params in groups.items()]
    optimizer = adamw(named, (0.9, 0.999), 1e-5, weight_decay, torch.device("cpu"))
    for step in range(3):
        before = {name: [p.detach().clone() for p in params] for name, params in groups.items()}
        loss = sum(((i + step + 1) * p.square()).sum() for ps in groups.values() for i, p in enumerate(ps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, ratio in update_ratios(optimizer).items():
            moved = torch.cat([(a - b).flatten() for a, b in zip(before[name], groups[name])]).norm()
            size = torch.cat([p.flatten() for p in groups[name]]).norm()
            torch.testing.assert_close(ratio, moved.detach() / size.detach(), rtol=2e-3, atol=0)
