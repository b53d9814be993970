"""The demo's judgement and what it prints, on runs of tiny models and on figures made by hand."""

import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import SETTINGS, make_runs, save, tiny

from config.configs import PPOConfig, stage_defaults
from experiments import main
from experiments.demo import judge as demo_judge
from experiments.demo import run as demo
from experiments.demo.judge import judge_demo, read_rows, summarise
from experiments.demo.run import failures, stages
from experiments.demo.table import judged_table, results_table, seed_table
from experiments.graded_answers import Graded
from experiments.main import Parser
from inference.answers import TextModel
from utils.demo.gold import gold_reward
from utils.demo.world import best_possible_accuracy
from utils.runs.folder import REPO
from utils.statistics import paired_bootstrap, seed_bootstrap, win_scores
from utils.template import PromptTemplate

pytestmark = pytest.mark.slow


def graded(gold, tokens):
    gold = np.array(gold, dtype=float)
    return Graded(gold, gold / 2, gold * 0 + 3, np.array(tokens), np.array([True] * 3 + [False]))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """`judge_demo` of tiny models, by a gold reward in which no two of them are alike; the PPO run's folder."""
    root = tmp_path_factory.mktemp("runs")
    ppo = make_runs(root)
    torch.manual_seed(1)
    vanilla = tiny()
    for parameter in vanilla.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save(vanilla, root / "sft_v_20260101000000/final", "sft", 5)
    lines = [{"step": s, "val/explained_var": s / 10} for s in (1, 2, 3, 4)] + [{"step": 5, "eval/kl": 1}]
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sft, rm = (ppo.parent / name for name in ("sft_t_20260101000000", "rm_t_20260101000001"))
    runs = {"vanilla": root / "sft_v_20260101000000", "sft": sft, "rm": rm, "ppo": ppo}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_judge, "gold_reward", lambda prompts, texts: [sum(map(ord, text)) % 97 for text in texts])
        return judge_demo(runs, 12, 0, "test"), ppo


def test_judging_a_run(result):
    found, ppo = result
    order = ["vanilla", "sft", "sft_greedy", "best_of_4", "best_of_16", "ppo", "ppo_greedy"]
    assert list(found["systems"]) == order and (found["prompts"], found["split"]) == (12, "test")
    assert len({tuple(sorted(figures)) for figures in found["systems"].values()}) == 1
    assert list(found["per_prompt"]) == order
    systems = found["systems"]
    assert systems["sft"]["win_rate"] is None and systems["sft"]["kl"] == 0 and systems["ppo"]["kl"] > 1
    assert systems["best_of_16"]["proxy"] > systems["best_of_4"]["proxy"] > systems["sft"]["proxy"]
    assert [systems[name]["kl"] for name in ("best_of_4", "sft_greedy", "ppo_greedy")] == [None, None, None]
    assert found["explained_var"] == pytest.approx(0.35)
    assert 0.3 < found["reward_model"]["accuracy"] < 0.7 and found["reward_model"]["pairs"] > 500
    json.dumps({**found, "seconds": {}}, allow_nan=False)


def test_the_picture_shares_the_samples_of_the_table(result):
    found, ppo = result
    assert found["overoptimisation"] == str(ppo / "overoptimisation.png")
    figures = json.loads((ppo / "overoptimisation.json").read_text())
    policy, best = figures["ppo"][-1], figures["best_of_n"][-1]
    assert (policy["step"], best["n"], figures["judge"]) == (6, 16, "gold")
    for reward in ("proxy", "gold"):
        above = figures["sft"][reward]["mean"]
        assert policy[reward] + above == pytest.approx(found["systems"]["ppo"][reward])
        assert best[reward] + above == pytest.approx(found["systems"]["best_of_16"][reward])
    assert policy["kl"] == pytest.approx(found["systems"]["ppo"]["kl"])


def test_every_system_is_judged_against_sft(result):
    found, _ = result
    sft, vanilla = found["per_prompt"]["sft"], found["per_prompt"]["vanilla"]
    assert found["systems"]["sft"]["win_rate"] is None
    others = [name for name in found["systems"] if name != "sft"]
    against = {
        other: [win_scores(found["per_prompt"][name], other_golds).mean() for name in others]
        for other, other_golds in (("sft", sft), ("vanilla", vanilla))
    }
    assert [found["systems"][name]["win_rate"] for name in others] == against["sft"]
    assert against["sft"] != against["vanilla"]


def test_the_split_decides_prompts_and_pairs(monkeypatch):
    asked, read = [], []
    monkeypatch.setattr(demo_judge, "text_model", lambda run: TextModel(None, None, PromptTemplate()))
    monkeypatch.setattr(demo_judge, "load_reward_model", lambda *_: None)
    monkeypatch.setattr(demo_judge.PPORun, "read", lambda run: SimpleNamespace(config=SETTINGS))
    monkeypatch.setattr(demo_judge, "proxy_of", lambda *_: None)

    class Stop(Exception):
        pass

    def stop(self, *_, **__):
        asked.append(list(self.prompts))
        raise Stop

    monkeypatch.setattr(demo_judge.Grader, "grade", stop)
    monkeypatch.setattr(demo_judge, "score_texts", lambda *_: gold_reward)
    monkeypatch.setattr(demo_judge, "read_rows", lambda path: read.append(path.name) or read_rows(path)[:4])
    for split in ("validation", "test"):
        with pytest.raises(Stop):
            judge_demo(dict.fromkeys(("sft", "rm", "ppo"), Path("x")), 5, 0, split)
        rows = read_rows(demo_judge.DEMO / f"prompts-{split}.jsonl.gz")
        assert asked.pop() == [row["prompt"] for row in rows[:5]]
        demo_judge.grade_reward_model(TextModel(None, None, PromptTemplate()), None, split)
        assert read.pop() == f"pairs-{split}.jsonl.gz"


def test_what_it_prints(result):
    found = {"seed": 3, "seconds": {}, **result[0]}
    assert [line.split(" |")[0][2:] for line in seed_table(found).splitlines()[3:10]] == list(found["systems"])
    closing = judged_table(found)
    assert [line.split(" |")[0] for line in closing.splitlines() if " vs SFT" in line] == [
        "| PPO vs SFT", "| best of 4 vs SFT", "| best of 16 vs SFT",
    ]  # fmt: skip
    win = found["systems"]["ppo"]
    assert f"{win['win_rate']:.3f} ({win['win_rate_ci'][0]:.3f} to {win['win_rate_ci'][1]:.3f})" in closing
    ppo, best = (np.array(found["per_prompt"][name]) for name in ("ppo", "best_of_16"))
    low, high = paired_bootstrap(ppo, best)
    assert f"{(ppo - best).mean():+.2f} ({low:.2f} to {high:.2f})" in closing


def results_of(golds):
    """Results of `judge_demo` by hand: {system: [S, N] gold rewards}."""
    figures = {"win_rate": 0.5, "proxy": 1.0, "kl": 2.0, "eos_rate": 1.0}
    reward_model = {"accuracy": 0.8, "best_possible": 0.85, "noise_free_accuracy": 0.9}
    return [
        {
            "seed": seed, "split": "test", "prompts": len(golds["sft"][0]), "reward_model": reward_model,
            "systems": dict.fromkeys(golds, figures),
            "per_prompt": {name: list(scores[seed]) for name, scores in golds.items()},
        }
        for seed in range(len(golds["sft"]))
    ]  # fmt: skip


def test_intervals_of_the_results_are_over_seeds_and_prompts():
    """Seeds that differ more than prompts do make the interval wide; resampled prompts alone would not see it."""
    sft, ppo = np.zeros((3, 50)), np.repeat([[1.0], [2.0], [3.0]], 50, axis=1)
    text = results_table(results_of({"sft": sft, "ppo": ppo, "best_of_16": ppo - 0.5}))
    line = next(line for line in text.splitlines() if line.startswith("| **PPO, sampled**"))
    low, high = seed_bootstrap(ppo)
    assert f"| 2.00 ({low:.2f} to {high:.2f}) | 1.000 (1.000 to 1.000) |" in line
    assert (low, high) == (1.0, 3.0) and "over seeds and prompts" in text
    assert "less that of best of 16, on the same prompts: 0.50 (0.50 to 0.50); by seed +0.50 / +0.50 / +0.50" in text
    sft_line = next(line for line in text.splitlines() if line.startswith("| SFT, sampled"))
    assert sft_line.split("|")[3].strip() == ""
    one = results_table(
        results_of({name: golds[:1] for name, golds in (("sft", sft), ("ppo", ppo), ("best_of_16", ppo))})
    )
    assert "over prompts, for three seeds are needed" in one and "1.00 (1.00 to 1.00)" in one


def test_judging_only_trains_nothing(result, tmp_path, monkeypatch):
    def train(*_, **__):
        raise AssertionError("a script was started")

    monkeypatch.setattr(demo, "run_stage", train)
    monkeypatch.setattr(demo, "newest_run", lambda run, _: Path(run))
    judged = []
    monkeypatch.setattr(demo, "judge_demo", lambda *flags: judged.append(flags) or result[0])
    words = ["--seeds", "4", "--variants", "lora", "--prompts", "12", "--split", "test", "--judge-only"]
    demo.run_results(Parser(), [*words, "--runs-dir", str(tmp_path)])
    (runs, prompts, seed, split) = judged[0]
    assert (runs["ppo_lora"], prompts, seed, split) == (Path("ppo_demo_s4_lora"), 12, 4, "test")


def test_the_demo_ends_with_table_and_picture(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_stage", lambda stage, *_: 1.0)
    monkeypatch.setattr(demo.Stolen, "share", lambda self: 0.125)
    splits = []
    monkeypatch.setattr(demo, "judge_demo", lambda runs, prompts, seed, split: splits.append(split) or result[0])
    ppo = shutil.copytree(result[1], tmp_path / "ppo_demo_s0_20260101000000")
    words = ["--runs-dir", str(tmp_path), "--prompts", "12"]
    assert demo.run_demo(Parser(), words) == 1  # tiny models did not learn anything
    assert splits == ["validation"]
    shown = capsys.readouterr().out
    assert "minutes (" in shown and "; 12.5% of the machine's time went to other guests" in shown
    parts = ("| PPO vs SFT |", f"picture: {tmp_path}/demo.png", "what to do next", "\nFAILED:")
    places = [shown.index(part) for part in parts]
    assert places == sorted(places)
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("    ")]
    assert [ppo in map(Path, words) for words in commands] == [True, True, False]
    for words in commands:  # they are as good as their first words, and the tasks take their flags
        assert Path(words[0]).is_file() and os.access(words[0], os.X_OK)
    for words in commands[:2]:
        assert REPO / words[1] == REPO / "src/experiments/main.py"
        monkeypatch.setattr("sys.argv", [words[1], *words[2:]])
        assert main.main() in (0, 3)
    assert "What is the capital of Italy?" in capsys.readouterr().out
    assert commands[2][1:] == ["--logdir", str(tmp_path)]
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
    rows = demo_judge.read_rows(demo_judge.DEMO / "pairs-validation.jsonl.gz")
    different = np.mean([row["gold_chosen"] != row["gold_rejected"] for row in rows])
    assert found["noise_free_accuracy"] == pytest.approx(1 - (1 - different) / 2)
    assert found["best_possible"] == pytest.approx(best_possible_accuracy(rows))
    assert found["accuracy"] == pytest.approx(found["best_possible"], abs=0.05)

    def opposite(prompts, texts):
        return [-gold for gold in gold_reward(prompts, texts)]

    monkeypatch.setattr(demo_judge, "score_texts", lambda model, machine: opposite)
    wrong = demo_judge.grade_reward_model(TextModel(None, None, PromptTemplate()), None)
    assert wrong["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert wrong["noise_free_accuracy"] == pytest.approx(1 - found["noise_free_accuracy"])


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
            "sft": {"gold": -0.5}, "ppo": {"gold": 2.0, "win_rate_ci": (0.85, 0.95), "kl": 2.0, "eos_rate": 1.0},
            "best_of_16": {"gold": 1.9},
        },
    }  # fmt: skip
    assert failures(good) == []
    bad = json.loads(json.dumps(good))
    bad["systems"]["ppo"] |= {"gold": 0.9, "win_rate_ci": (0.7, 0.9), "kl": 30.0, "eos_rate": 0.5}
    bad["reward_model"]["noise_free_accuracy"] = 0.6
    assert [line.split()[0] for line in failures(bad)] == ["reward", "PPO's", "PPO's", "PPO's", "PPO", "only"]
    beaten = json.loads(json.dumps(good))
    beaten["systems"]["best_of_16"]["gold"] = 2.1
    assert failures(beaten) == ["PPO's gold reward 2.00 is not above best-of-16's 2.10"]


def test_flags_go_to_every_script():
    plan = demo.stages("x", ("kl0", "lora"), ("--dtype", "bf16"))
    assert len(plan) == 6 and all(stage.flags[-2:] == ("--dtype", "bf16") for stage in plan)
    assert [stage.flags[:-2] for stage in plan] == [stage.flags for stage in demo.stages("x", ("kl0", "lora"))]
