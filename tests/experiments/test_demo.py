"""The demo's judgement and what it prints, on runs of tiny models and on figures made by hand."""

import json

import numpy as np
import pytest
from tiny_runs import make_runs

from config.configs import PPOConfig, stage_defaults
from experiments import demo, demo_judge
from experiments.demo import failures, judged_table, stages, table
from experiments.demo_judge import judge_demo, summarise
from experiments.graded_answers import Graded
from inference.answers import TextModel
from utils.demo_gold import gold_reward
from utils.demo_world import best_possible_accuracy
from utils.template import PromptTemplate


def graded(gold, tokens):
    gold = np.array(gold, dtype=float)
    return Graded(gold, gold / 2, gold * 0 + 3, np.array(tokens), np.array([True] * 3 + [False]))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """`judge_demo` of tiny models, vanilla and SFT being one; the PPO run with its folder."""
    ppo = make_runs(tmp_path_factory.mktemp("runs"))
    lines = [{"step": s, "val/explained_var": s / 10} for s in (1, 2, 3, 4)] + [{"step": 5, "eval/kl": 1}]
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sft, rm = (ppo.parent / name for name in ("sft_t_20260101000000", "rm_t_20260101000001"))
    return judge_demo({"vanilla": sft, "sft": sft, "rm": rm, "ppo": ppo}, 12, 0), ppo


def test_judging_a_run(result):
    found, ppo = result
    order = ["vanilla", "sft", "sft_greedy", "best_of_4", "best_of_16", "ppo", "ppo_greedy"]
    assert list(found["systems"]) == order and found["prompts"] == 12
    systems = found["systems"]
    assert systems["sft"]["win_rate"] is None and systems["sft"]["kl"] == 0 and systems["ppo"]["kl"] > 1
    assert systems["best_of_16"]["proxy"] > systems["best_of_4"]["proxy"] > systems["sft"]["proxy"]
    assert [systems[name]["kl"] for name in ("best_of_4", "sft_greedy")] == [None, None]
    assert found["explained_var"] == pytest.approx(0.35)
    assert 0.3 < found["reward_model"]["accuracy"] < 0.7 and found["reward_model"]["pairs"] > 500
    json.dumps({**found, "seconds": {}}, allow_nan=False)


def test_the_picture_shares_the_samples_of_the_table(result):
    found, ppo = result
    assert found["overoptimisation"] == str(ppo / "overoptimisation.png")
    figures = json.loads((ppo / "overoptimisation.json").read_text())
    policy, best = figures["ppo"][-1], figures["best_of_n"][-1]
    assert (policy["step"], best["n"]) == (6, 16)
    for reward in ("proxy", "gold"):
        above = figures["sft"][reward]["mean"]
        assert policy[reward] + above == pytest.approx(found["systems"]["ppo"][reward])
        assert best[reward] + above == pytest.approx(found["systems"]["best_of_16"][reward])
    assert policy["kl"] == pytest.approx(found["systems"]["ppo"]["kl"])


def test_what_it_prints(result):
    found = {"seed": 3, "seconds": {}, **result[0]}
    assert table([found]).count("\n| 3 | ") == 8  # seven systems and the reward model
    closing = judged_table(found)
    assert [line.split(" |")[0] for line in closing.splitlines() if " vs SFT" in line] == [
        "| PPO vs SFT", "| best of 4 vs SFT", "| best of 16 vs SFT",
    ]  # fmt: skip
    win = found["systems"]["ppo"]
    assert f"{win['win_rate']:.3f} ({win['win_rate_ci'][0]:.3f} to {win['win_rate_ci'][1]:.3f})" in closing


def test_the_demo_ends_with_table_and_picture(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_stage", lambda stage, *_: 1.0)
    monkeypatch.setattr(demo, "judge_demo", lambda runs, prompts, seed: result[0])
    assert demo.run_demo(0, str(tmp_path), 12) == 1  # tiny models did not learn anything
    shown = capsys.readouterr().out
    places = [shown.index(part) for part in ("| PPO vs SFT |", f"picture: {result[1]}", "FAILED:")]
    assert places == sorted(places)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["systems"] == json.loads(json.dumps(result[0]["systems"]))


def test_wins_against_the_baseline():
    found = summarise(graded([1, 2, 0, 5], [4, 5, 6, 7]), graded([0, 2, 1, 4], [4, 5, 6, 7]))
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (2, 1, 1, 0.625)
    assert found["lc_win_rate"] == pytest.approx(0.625)  # equal lengths
    assert (found["gold"], found["proxy"], found["tokens"], found["eos_rate"]) == (2, 1, 5.5, 0.75)
    all_one_longer = summarise(graded([1, 2, 0, 5], [5, 6, 7, 8]), graded([0, 2, 1, 4], [4, 5, 6, 7]))
    assert all_one_longer["lc_win_rate"] is None


def test_reward_model_accuracy_keeps_pairs_together(monkeypatch):
    """A reward model that is the gold reward orders every noise-free pair, and as many labels as are not noise."""
    monkeypatch.setattr(demo_judge, "score_texts", lambda model, machine: gold_reward)
    found = demo_judge.grade_reward_model(TextModel(None, None, PromptTemplate()), None)
    rows = demo_judge.read_rows(demo_judge.DEMO / "pairs-test.jsonl.gz")
    different = np.mean([row["gold_chosen"] != row["gold_rejected"] for row in rows])
    assert found["noise_free_accuracy"] == pytest.approx(1 - (1 - different) / 2)
    assert found["best_possible"] == pytest.approx(best_possible_accuracy(rows))
    assert found["accuracy"] == pytest.approx(found["best_possible"], abs=0.05)


def test_ppo_keeps_ten_checkpoints_for_the_picture():
    plan = {stage.name: stage.flags for stage in stages("x", ("kl0",))}
    save_every, every, keep, kept = plan["PPO"][-4:]
    assert (save_every, keep, kept) == ("--save-every", "--keep", "10")
    assert 10 * int(every) == stage_defaults(PPOConfig, "gpt2-nano").iterations
    assert plan["PPO, KL coefficient 0"][-2:] == ("--kl-coef", "0")


def test_failures_name_what_was_missed():
    good = {
        "reward_model": {"noise_free_accuracy": 0.9},
        "systems": {
            "sft": {"gold": 0.5}, "ppo": {"gold": 2.0, "win_rate_ci": (0.8, 0.9), "kl": 2.0, "eos_rate": 1.0},
        },
    }  # fmt: skip
    assert failures(good) == []
    bad = json.loads(json.dumps(good))
    bad["systems"]["ppo"] |= {"gold": 1.0, "win_rate_ci": (0.6, 0.7), "kl": 30.0, "eos_rate": 0.5}
    bad["reward_model"]["noise_free_accuracy"] = 0.6
    assert len(failures(bad)) == 5


def test_flags_go_to_every_script():
    plan = demo.stages("x", ("kl0", "lora"), ("--dtype", "bf16"))
    assert len(plan) == 6 and all(stage.flags[-2:] == ("--dtype", "bf16") for stage in plan)
    assert [stage.flags[:-2] for stage in plan] == [stage.flags for stage in demo.stages("x", ("kl0", "lora"))]
