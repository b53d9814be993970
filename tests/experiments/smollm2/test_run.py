"""`-t smollm2`: its texts and rewards, its commands, how it judges, and what it says, on tiny models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import make_runs

from config.command_line import parse_cli
from config.configs import PPOConfig, RMConfig, SFTConfig
from config.user_error import UserError
from experiments.graded_answers import text_model
from experiments.main import Parser
from experiments.overoptimisation.run import PPORun
from experiments.smollm2 import continuations, judge, report, run
from experiments.smollm2.continuations import whole_sentences
from inference.answers import Answer, Machine, Sampling
from utils.data.files import read_rows
from utils.data.splits import SplitOptions
from utils.reward_function import load_reward_function
from utils.template import PromptTemplate

OPENINGS = [data["prompt"] for _, data in read_rows(run.OPENINGS)]
CONFIGS = {"train_sft.py": SFTConfig, "train_rm.py": RMConfig, "train_ppo.py": PPOConfig}


def test_openings_are_many_short_and_in_every_split():
    assert len(OPENINGS) == len(set(OPENINGS)) >= 300
    assert all(3 <= len(text.split()) <= 12 and text == text.strip() for text in OPENINGS)
    assert not any(text.endswith((".", "!", "?")) for text in OPENINGS)
    template = PromptTemplate()
    parts = SplitOptions().parts(SplitOptions().point(template.opening(template.prompt(text))) for text in OPENINGS)
    assert min(list(parts.values()).count(part) for part in ("validation", "test")) >= 20


@pytest.mark.parametrize("name", ["vader", "textblob"])
def test_rewards_tell_praise_from_blame(name):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("textblob")
    reward = load_reward_function(f"{run.REWARDS}:{name}", "--reward-fn")
    praise, nothing, blame = reward(["x"] * 3, ["it was wonderful.", "it has two doors.", "it was awful."])
    assert praise > 0.5 and nothing == 0 and blame < -0.5


def test_openings_are_neutral():
    """By the reward of training; otherwise it would matter that it is not shown the opening."""
    pytest.importorskip("vaderSentiment")
    scores = load_reward_function(f"{run.REWARDS}:vader", "--reward-fn")(OPENINGS, OPENINGS)
    assert np.mean(np.abs(scores) < 0.5) > 0.85 and abs(np.mean(scores)) < 0.15


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" we all liked it. Then it", "we all liked it."),
        ('She said "it is so good!" and left', 'She said "it is so good!"'),
        ("It cost 3.50 in the shop today", ""),
        ("\n\nIt was a long day. So\n\nThe end of it.", "It was a long day."),
        ("We liked it.", ""),
        ("'s bill was far too high.", ""),
        ("", ""),
    ],
)
def test_a_continuation_ends_with_a_sentence(text, kept):
    assert whole_sentences(text) == kept


def test_continuations_are_of_the_bare_opening(tmp_path, monkeypatch):
    asked = []

    def answer(source, prompts, name, sampling, machine, draw):
        asked.append((prompts, sampling, draw))
        said = [("we all liked it. And", "no")[(i + draw) % 2] for i in range(len(prompts))]
        return [Answer(prompt, text) for prompt, text in zip(prompts, said)]

    class Found:
        def tokenizer(self, flag):
            return type("Tokens", (), {"vocab_size": 7}), ""

    monkeypatch.setattr(continuations, "describe_pretrained", lambda model: Found())
    monkeypatch.setattr(continuations, "load_pretrained", lambda model, vocab_size: torch.nn.Identity())
    monkeypatch.setattr(continuations, "sample_answers", answer)
    openings = tmp_path / "openings.txt"
    openings.write_text("The soup\nThe bill\n")
    count = continuations.write_continuations("folder", openings, 9, 3, Machine(), tmp_path / "new/rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new/rows.jsonl").read_text().splitlines()]
    assert count == 2 and rows == [{"prompt": p, "response": "we all liked it."} for p in ("The soup", "The bill")]
    assert asked == [(["The soup", "The bill"], Sampling(0.7, 9, 3), draw) for draw in (0, 1)]


def pair(i, words="no"):
    first = f"\n\nHuman: question {i}\n\nAssistant:"
    return {"chosen": f"{first} yes {i}", "rejected": f"{first} {words}"}


def test_reward_model_and_judge_share_no_conversation(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [row for i in range(90) for row in (pair(i), pair(i, "never"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"chosen": 1}\nnot json\n')
    paths = run.divide(str(file), tmp_path / "out")
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, rows))
    openings = [{row["chosen"].split("\n\n")[1] for row in part} for part in parts]
    assert not openings[0] & openings[1] and 50 < len(openings[0]) < 70
    shown = run.pairs_of(paths[1])
    assert len(shown) == len(parts[1]) and shown[0][0][1].startswith(" yes ") and shown[0][1][1] in (" no", " never")


def test_a_file_without_pairs_is_told(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="has no pairs for a reward model and a judge"):
        run.divide(str(file), tmp_path)


@pytest.mark.parametrize(
    "stages",
    [
        run.sentiment_stages("s", "folder", "cpu", Path("rows.jsonl")),
        run.preference_stages("s", "folder", "cuda", Path("a.jsonl"), Path("b.jsonl")),
    ],
    ids=["sentiment", "preferences"],
)
def test_every_stage_is_a_command_that_its_script_takes(stages):
    for stage in stages:
        config = parse_cli(CONFIGS[stage.script], list(stage.flags))
        assert config.config == "smollm2-135m/lora"
    assert stages[-1].script == "train_ppo.py" and config.iterations <= config.keep * config.save_every


@pytest.mark.parametrize("part", ["sentiment", "preferences"])
def test_a_gpu_gets_more_rollouts_of_the_same_recipe(part):
    sizes = [parse_cli(PPOConfig, list(run.ppo_flags_of(part, device))) for device in ("cpu", "cuda", "mps")]
    rollouts = [config.iterations * config.global_batch_size for config in sizes]
    assert rollouts[0] < rollouts[1] == rollouts[2] and len({config.lr for config in sizes}) == 1


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder that looks like the model's; every stage is written down instead of run."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name)
    return str(tmp_path / "model")


def test_the_stages_run_in_order_and_other_flags_go_to_ppo(model, tmp_path, monkeypatch, capsys):
    done = []
    result = {"ppo": {"kl": 3.0}, "perplexity_ratio": 1.1, "gain": 1.4}
    monkeypatch.setattr(run, "run_stage", lambda stage, seed, *_, **__: done.append((stage, seed)) or 1.0)
    monkeypatch.setattr(run, "write_continuations", lambda *_: 5)
    monkeypatch.setattr(run, "judge_sentiment", lambda stem, *_: result)
    monkeypatch.setattr(run, "write_results", lambda *_: None)
    words = ["--model", model, "--seeds", "3", "4", "--device", "cpu", "--runs-dir", str(tmp_path), "--kl-coef", "0.2"]
    assert run.run(Parser(), words) == 0
    assert [(stage.name, seed) for stage, seed in done] == [("SFT", 3), ("PPO", 3), ("SFT", 4), ("PPO", 4)]
    sft, ppo = (stage.flags for stage, _ in done[:2])
    assert ppo[-6:] == ("--device", "cpu", "--dtype", "fp32", "--kl-coef", "0.2")
    assert sft[-4:] == ("--device", "cpu", "--dtype", "fp32")
    assert "RLHF worked" in capsys.readouterr().out
    result["gain"] = 0.9
    assert run.run(Parser(), [*words, "--judge-only"]) == 1 and len(done) == 4
    assert "FAILED: seed 3: gold rose by 0.90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model .*nowhere: holds no model.*-t fetch smollm2"),
        (["--part", "preferences"], "--dataset is needed; give pairs"),
        (["--part", "preferences", "--dataset", "nope.jsonl"], "--dataset nope.jsonl: no such file"),
        (["--part", "both"], "invalid choice"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(words, message, model):
    with pytest.raises(UserError, match=message):
        run.run(Parser(), [*(["--model", model] if "--model" not in words else []), *words])


def test_a_missing_lexicon_names_the_file_of_pins(model, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-smollm2.txt"):
        run.check_inputs(model, "sentiment", "")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run whose first checkpoint is the SFT model and whose others are further and further away."""
    ppo = PPORun.read(make_runs(tmp_path_factory.mktemp("runs")))
    start = text_model(ppo.sft)
    prompts = [start.template.prompt(f"Where is the home of {animal}?") for animal in ("a bear", "a hen", "an ant")]
    examiner = judge.Examiner(
        start, lambda answers, _: np.array([float(len(a.text)) for a in answers]),
        lambda prompts, texts: [sum(map(ord, text)) % 97 for text in texts], prompts, 4, Sampling(0.9, 8), Machine(),
    )  # fmt: skip
    return judge.judge_run(ppo, examiner, tell=lambda line: None), examiner


def test_the_start_model_is_at_no_distance_from_itself(judged):
    result, examiner = judged
    first, *_, last = result["course"]
    assert result["sft"]["kl"] == 0 and abs(first["kl"]) < 1e-4 < 0.1 < last["kl"]
    assert first["gold"] == result["sft"]["gold"] and first["perplexity"] == pytest.approx(result["sft"]["perplexity"])
    assert last["perplexity"] > result["sft"]["perplexity"] and result["ppo"] is last
    json.dumps(result, allow_nan=False)


def test_figures_follow_their_definitions(judged):
    result, examiner = judged
    answers = examiner.examine(examiner.start, "x")
    assert answers.gold.shape == (3, 4) and len(answers.answers) == 12
    nats = -judge.answer_logprobs(examiner.start.model, answers.answers, 1024, 1.0, Machine(), "x")
    assert result["sft"]["perplexity"] == pytest.approx(np.exp(nats.sum() / answers.tokens.sum()), rel=1e-5)
    assert result["gain"] == pytest.approx((result["ppo"]["gold"] - answers.gold.mean()) / answers.gold.std())
    assert [s["prompt"] for s in result["samples"]] == examiner.prompts
    assert result["samples"][1]["sft"] == answers.answers[4].text


def test_the_best_answer_is_chosen_by_the_proxy_and_graded_by_gold(judged):
    result, examiner = judged
    answers = examiner.examine(examiner.start, "x")
    by_hand = [gold[int(proxy.argmax())] for gold, proxy in zip(answers.gold, answers.proxy)]
    assert result["best_of"]["gold"] == pytest.approx(np.mean(by_hand))
    assert result["best_of"]["proxy"] == answers.proxy.max(1).mean() > result["sft"]["proxy"]


def test_samples_are_spread_over_the_prompts_and_not_chosen(judged):
    _, examiner = judged
    few = examiner.examine(examiner.start, "x")
    many = replace(few, answers=few.answers * 7, gold=np.tile(few.gold, (7, 1)))
    shown = judge.samples(many, many, 4)
    assert len(shown) == 10 and {s["prompt"] for s in shown} == set(examiner.prompts)


def test_accuracy_counts_ties_as_half_and_length_apart():
    pairs = [(("p", " a long one"), ("p", " b")), (("p", " c"), ("p", " d")), (("p", " e"), ("p", " f longer"))]
    scores = {" a long one": 1, " b": 0, " c": 1, " d": 1, " e": 0, " f longer": 2}
    found = judge.pair_accuracy(lambda prompts, texts: [scores[text] for text in texts], pairs)
    assert (found["pairs"], found["accuracy"], found["longer_wins"]) == (3, 0.5, 0.5)


def figures(**changed):
    pairs = {"pairs": 9, "accuracy": 0.62, "accuracy_ci": [0.6, 0.7], "longer_wins": 0.45, "longer_wins_ci": [0.4, 0.5]}
    one = dict.fromkeys(("proxy", "gold", "tokens", "perplexity", "distinct_2", "ended", "gold_sd", "proxy_sd"), 1.0)
    one |= {"kl": 5.0, **{f"{name}_ci": [0.5, 1.5] for name in ("proxy", "gold", "kl")}}
    sample = {"prompt": "\n\nHuman: a | b\n\nAssistant:", "sft": "x\ny", "ppo": "z", "sft_gold": 0.1, "ppo_gold": 0.2}
    return {
        "seed": 1, "split": "test", "prompts": 20, "draws": 8, "temperature": 1.0, "tokens": 48, "correlation": 0.4,
        "sft": one, "best_of": one, "ppo": one, "course": [{"step": 5, **one}],
        "gain": 1.2, "gain_ci": [1, 1.4], "win_rate": 0.8, "win_rate_ci": [0.7, 0.9], "perplexity_ratio": 1.1,
        "reward_model": pairs, "judge": pairs, "samples": [sample],
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("part", "changed", "complaint"),
    [
        ("sentiment", {}, None),
        ("preferences", {}, None),
        ("sentiment", {"gain": 0.99}, "gold rose by 0.99"),
        ("sentiment", {"perplexity_ratio": 2.1}, "2.10 times"),
        ("preferences", {"ppo": {"kl": 15.1}}, "15.1 nats"),
        ("preferences", {"win_rate_ci": [0.5, 0.6]}, "lower end at 0.50"),
        ("preferences", {"reward_model": {"accuracy": 0.54, "longer_wins": 0.45}}, "by length alone it is 0.550"),
    ],
)
def test_the_verdict_asks_for_every_target(part, changed, complaint):
    failed = report.verdict(part, figures(**changed))
    assert failed == [] if complaint is None else (len(failed) == 1 and complaint in failed[0])


@pytest.mark.parametrize("part", ["sentiment", "preferences"])
def test_table_figures_and_picture_are_written(part, tmp_path, capsys):
    run.write_results(part, [figures(), figures(seed=2)], "a machine", tmp_path)
    text = (tmp_path / f"{part}.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows if line.startswith(("| 1", "| 2"))} <= {12, 6}
    assert "| a \\| b | x y | 0.10 | z | 0.20 |" in rows and ("pairs it never saw" in text) == (part == "preferences")
    assert json.loads((tmp_path / f"{part}.json").read_text())["machine"] == "a machine"
    assert (tmp_path / f"{part}.png").stat().st_size > 5000 and text in capsys.readouterr().out
