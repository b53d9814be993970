"""Quick looks: on every kind of checkpoint, with every mask right, and one line for wrong input."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
from every_family import EVERY, TINY

from config.model_configs import CONFIGS
from config.user_error import UserError
from experiments import loss_example, quick_looks
from experiments.main import QUICK_LOOKS, Parser
from models.families import load_checkpoint, new_model
from models.weights.checkpoint import save_model
from utils.demo import facts
from utils.runs.folder import REPO
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

FAMILIES = EVERY
PROMPT = "\n\nHuman: What is the capital of Italy?\n\nAssistant:"
ESCAPE = "\033["


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's tokenizer."""
    return get_tokenizer("demo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer, family):
    """A folder of runs with a model of every role, and a Hugging Face folder."""
    root = tmp_path_factory.mktemp("runs")
    config = CONFIGS[family](**TINY[family] | dict(n_layer=1, vocab_size=1024, init_std=0.3))
    description = {"template": PromptTemplate().to_dict(), "stage": "x", "step": 3, "normalised": {"step": 3}}
    for role, name in (("lm", "sft_tiny"), ("reward", "rm_tiny"), ("critic", "critic_tiny")):
        torch.manual_seed(0)
        folder = root / f"{name}_20260101000000" / "final"
        model = new_model(config, role)
        save_model(model, folder, description)
        tokenizer.save(folder)
        if role == "lm":
            model.save_pretrained(root / "hf")
            tokenizer.export_huggingface(root / "hf")
    return root


def look(task, *words):
    """Run a task in this process."""
    return getattr(quick_looks, f"look_at_{task}")(Parser(prog=task), [str(word) for word in words])


@pytest.fixture
def terminal(monkeypatch):
    """Standard output as a terminal without NO_COLOR."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


# gpt ------------------------------------------------------------------------------------------------------------------


def test_gpt_prints_prompts_samples_and_counts(runs, capsys, tokenizer):
    flags = ("--runs-dir", runs, "--max-new-tokens", 9, "--count", 2, "--device", "cpu")
    assert look("gpt", "-m", "sft_tiny", *flags, "--prompt", "Human: hi", "--prompt", "What is two plus two?") == 0
    shown = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"prompt \d: (\d+) tokens", shown)]
    texts = ["\n\nHuman: hi\n\nAssistant:", "\n\nHuman: What is two plus two?\n\nAssistant:"]
    assert counts == [len(tokenizer.encode(text)) for text in texts]
    samples = re.findall(r"-- sample (\d): (\d+) tokens, (ended|cut at 9)", shown)
    assert [k for k, *_ in samples] == ["1", "2", "1", "2"]
    assert all(int(n) == 9 if how != "ended" else int(n) <= 9 for _, n, how in samples)
    assert ESCAPE not in shown


@pytest.mark.parametrize(("dataset", "told"), [
    (None, True), ("demo", True), ("demo-text", True), ("sums.jsonl", False), ("hh", False),
])  # fmt: skip
def test_gpt_tells_what_a_model_of_the_demo_knows(runs, capsys, dataset, told):
    """Once, on stderr; not of a model that has only the demo's vocabulary and was trained on other data."""
    record = runs / "sft_tiny_20260101000000" / "hyperparams.json"
    if dataset:
        record.write_text(json.dumps({"config": {"dataset": dataset}}))
    words = ("-m", "sft_tiny", "--runs-dir", runs, "--max-new-tokens", 2, "--device", "cpu", "--count", 3)
    assert look("gpt", *words) == 0
    record.unlink(missing_ok=True)
    note = capsys.readouterr().err
    assert note == (f"note: {facts.world_in_a_line()}\n" if told else "")


def test_what_the_demo_is_said_to_know_is_so():
    """In the note and in the README: the questions are those of facts, word for word, and the count is right."""
    questions = {facts.question(fact, 0) for fact in facts.FACTS}
    readme = re.search(r"The demo's models know.*?\.\n\[", (REPO / "README.md").read_text(), re.S)[0].replace("\n", " ")
    for text in (facts.world_in_a_line(), readme):
        asked = re.findall(r'"([^"]+)"', text)
        assert len(asked) == 3 and set(asked) <= questions and f"{len(facts.FACTS)} facts" in text
    assert len(readme.partition("(")[2].partition(")")[0].split(",")) == len({fact.category for fact in facts.FACTS})


def test_gpt_is_reproducible_and_the_seed_matters(runs, capsys):
    def sample(*words):
        look("gpt", "-m", "sft_tiny", "--runs-dir", runs, "--temperature", 1, "--device", "cpu", *words)
        return capsys.readouterr().out

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    greedy = ("--temperature", 0, "--max-new-tokens", 5)
    assert sample(*greedy, "--seed", 1) == sample(*greedy, "--seed", 2)
    assert sample(*greedy) == sample("--temperature", 1, "--top-k", 1, "--max-new-tokens", 5)


def test_gpt_reads_our_checkpoints_and_hugging_face_folders_alike(runs, capsys):
    flags = ("--temperature", 0, "--max-new-tokens", 6, "--device", "cpu", "--runs-dir", runs)
    shown = set()
    for model in ("sft_tiny", runs / "sft_tiny_20260101000000", runs / "sft_tiny_20260101000000/final", runs / "hf"):
        look("gpt", "-m", model, *flags)
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1


def test_raw_prompts_are_left_alone(runs, capsys, tokenizer):
    look("gpt", "-m", "sft_tiny", "--runs-dir", runs, "--raw", "--prompt", "Once upon", "--device", "cpu")
    assert f"prompt 1: {len(tokenizer.encode('Once upon'))} tokens\nOnce upon\n" in capsys.readouterr().out


def test_models_that_cannot_speak(runs):
    for stem in ("rm_tiny", "critic_tiny"):
        with pytest.raises(UserError, match="an SFT or PPO model is needed"):
            look("gpt", "-m", stem, "--runs-dir", runs)
    with pytest.raises(UserError, match="-m sft_typo: no such run or folder; runs in .*critic_tiny, rm_tiny, sft_tiny"):
        look("gpt", "-m", "sft_typo", "--runs-dir", runs)


def test_hub_failures_name_the_flag(runs):
    with pytest.raises(UserError, match="^-m gpt2-xl: cannot be loaded from Hugging Face"):
        look("gpt", "-m", "gpt2-xl", "--runs-dir", runs)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--temperature", "-1"], "--temperature: -1 is not a number of 0.0 or more"),
        (["--temperature", "nan"], "--temperature: nan is not a number"),
        (["--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--top-p", "0"], "--top-p: 0 is not above 0 and at most 1"),
        (["--top-p", "x"], "--top-p: invalid float value: 'x'"),
        (["--top-k", "1.5"], "--top-k: invalid int value: '1.5'"),
        (["--count", "0"], "--count: 0 is not a number of 1 or more"),
        (
            ["--max-new-tokens", "60"],
            "--max-new-tokens 60: with a prompt of 15 tokens at most 49 fit the context of 64",
        ),
        (["--prompt", ""], "--prompt: is empty"),
        (["--raw", "--prompt", ""], "--prompt: is empty"),
        (["--prompt", "Human: a\n\nAssistant: b"], "--prompt: ends inside a reply"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; flags: --count"),
    ],
)
def test_wrong_flags_of_gpt(runs, words, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        look("gpt", "-m", "sft_tiny", "--runs-dir", runs, "--device", "cpu", *words)


# reward ---------------------------------------------------------------------------------------------------------------


def test_reward_scores_are_those_of_single_rows_best_first(runs, capsys, tokenizer):
    answers = ["Rome.", "The capital of Italy is Rome. Have a nice day.", ""]
    words = [word for answer in answers for word in ("--response", answer)]
    look("reward", "-m", "rm_tiny", "--runs-dir", runs, "--prompt", PROMPT.strip(), "--device", "cpu", *words)
    shown = capsys.readouterr().out
    model = load_checkpoint(runs / "rm_tiny_20260101000000/final", "reward").eval()
    expected = {}
    for answer in answers:
        ids = tokenizer.encode(PROMPT) + tokenizer.encode(f" {answer}" if answer else "") + [tokenizer.eos_id]
        with torch.no_grad():
            score = float(model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)))
        expected[answer] = (f"{score:+.3f}", len(ids) - 1)
    lines = re.findall(r"^ +([+-]\d+\.\d+)  (.*)  \[\d+ tokens, read at column (\d+) \(EOS\)\]$", shown, re.M)
    assert {text: (score, int(column)) for score, text, column in lines} == expected
    assert [float(score) for score, *_ in lines] == sorted((float(s) for s, _ in expected.values()), reverse=True)
    assert "SFT samples had mean 0 and deviation 1" in shown


def test_reward_without_eos_is_read_at_the_last_token(runs, capsys):
    words = ("--runs-dir", runs, "--prompt", "Hi", "--device", "cpu", "--response", "Rome.", "--no-eos")
    look("reward", "-m", "rm_tiny", *words)
    assert "('.')]" in capsys.readouterr().out


def test_wrong_input_of_reward(runs):
    flags = ("--runs-dir", runs, "--prompt", "Hi", "--device", "cpu")
    with pytest.raises(UserError, match="-m sft_tiny: .* holds no reward model"):
        look("reward", "-m", "sft_tiny", *flags, "--response", "x")
    with pytest.raises(UserError, match="--response: with the prompt it has .* the context is 64"):
        look("reward", "-m", "rm_tiny", *flags, "--response", "word " * 100)
    with pytest.raises(UserError, match="--response: is empty"):
        look("reward", "-m", "rm_tiny", *flags, "--response", "", "--no-eos")
    with pytest.raises(UserError, match="arguments are required: --response"):
        look("reward", "-m", "rm_tiny", *flags)


# dataset --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A file of six ranked rows, and an own token cache."""
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Question {i}?", "completions": ["Good.", "Less good.", "Bad, and long."]} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_dataset_shows_every_token_of_each_stage(rows, capsys):
    words = ("--dataset", rows, "--tokenizer", "demo", "--rows", 2)
    look("dataset", *words, "--stage", "rm")
    shown = capsys.readouterr().out
    assert len(re.findall(r"row \d rank [123]: ", shown)) == 6
    assert re.search(r"batch \[6, \d+\]", shown)
    assert r"Assistant:| Bad, and long.[EOS]" in shown
    assert "[EOS][PAD x " in shown

    look("dataset", *words, "--stage", "sft")
    shown = capsys.readouterr().out
    total, prompt, response, first, last = map(
        int, re.search(r"row 0: (\d+) tokens \((\d+) prompt \+ (\d+) response.*columns (\d+) to (\d+)", shown).groups()
    )
    assert total == prompt + response == last + 1 and first == prompt
    assert r"Assistant:| Good.[EOS]" in shown

    look("dataset", *words, "--stage", "ppo")
    shown = capsys.readouterr().out
    assert "EOS]" not in shown.replace(quick_looks._LEGEND, "") and "answered from the last column" in shown


def test_plain_text_is_trained_on_from_its_second_token(capsys):
    look("dataset", "--dataset", "demo-text", "--rows", 1)
    assert "trained on columns 1 to" in capsys.readouterr().out


def test_render_row_marks_prompt_response_eos_and_padding(terminal, tokenizer):
    prompt, response = tokenizer.encode("A?"), tokenizer.encode(" B\n")
    ids = torch.tensor([*prompt, *response, tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id])
    att = ids != tokenizer.pad_id
    shown = quick_looks.render_row(ids, att, len(prompt), tokenizer)
    assert (
        shown
        == f"{ESCAPE}2mA?{ESCAPE}0m|{ESCAPE}32m B\\n{ESCAPE}0m{ESCAPE}7m[EOS]{ESCAPE}0m{ESCAPE}90m[PAD x 2]{ESCAPE}0m"
    )


def test_render_row_puts_left_padding_on_the_left_and_shows_every_eos(tokenizer):
    ids = torch.tensor([tokenizer.pad_id, *tokenizer.encode("A?")])
    att = ids != tokenizer.pad_id
    assert quick_looks.render_row(ids, att, len(ids), tokenizer) == "[PAD x 1]A?|"
    twice = torch.tensor([*tokenizer.encode("A"), tokenizer.eos_id, tokenizer.eos_id])
    shown = quick_looks.render_row(twice, torch.ones(3, dtype=torch.bool), 1, tokenizer)
    assert shown == "A|[EOS][EOS]"


def test_no_color_switches_colours_off(terminal, monkeypatch):
    assert quick_looks._paint("x", "32") != "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert quick_looks._paint("x", "32") == "x"


def test_wrong_input_of_dataset(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 3}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: \"response\" is a number"):
        look("dataset", "--dataset", bad, "--tokenizer", "demo")
    with pytest.raises(UserError, match="--dataset nope: not known"):
        look("dataset", "--dataset", "nope")
    with pytest.raises(UserError, match="--stage: invalid choice: 'x'"):
        look("dataset", "--stage", "x")
    with pytest.raises(UserError, match="--tokenizer nope: no such run or folder"):
        look("dataset", "--tokenizer", "nope", "--runs-dir", tmp_path)


# tokenizer and loss ---------------------------------------------------------------------------------------------------


def test_tokenizer_shows_ids_and_round_trip(capsys, tokenizer):
    text = "Zo\u00eb <|endoftext|>\n"
    look("tokenizer", "--text", text)
    shown = capsys.readouterr().out
    ids = [int(i) for i in re.findall(r"^ +(\d+)  ", shown, re.M)]
    assert ids == tokenizer.encode(text) and tokenizer.eos_id not in ids
    assert "round trip: the same text" in shown and "EOS is not among the ids" in shown
    assert "part of a character" in shown and "EOS is 1023; PAD is 1024" in shown


def test_tokenizer_of_a_run_a_checkpoint_and_a_folder(runs, capsys):
    shown = set()
    for name in ("demo", "sft_tiny", runs / "rm_tiny_20260101000000/final", runs / "hf"):
        look("tokenizer", "--tokenizer", name, "--runs-dir", runs, "--text", "x\u4e2d")
        shown.add(capsys.readouterr().out.split("\n", 1)[1])
    assert len(shown) == 1
    with pytest.raises(UserError, match="--tokenizer sft_typo: no such run .* gpt2 and demo are known by name"):
        look("tokenizer", "--tokenizer", "sft_typo", "--runs-dir", runs)


def test_loss_example_matches_independent_arithmetic():
    text = "\n".join(loss_example.loss_example())
    assert "the mean of the pairs: 0.2512" in text
    table = [[float(x) for x in line.split()] for line in text.splitlines() if re.match(r"\s+[0-3]\s+-", line)]
    rollout, update = np.array([row for row in table if len(row) == 10]), np.array([r for r in table if len(r) == 9])
    assert rollout.shape == (4, 10) and update.shape == (4, 9)
    _, logp, ref, kl, reward, _, delta, advantage, white, _ = rollout.T
    np.testing.assert_allclose(kl, logp - ref, atol=1e-4)
    np.testing.assert_allclose(reward, -0.05 * kl + [0, 0, 0, 1], atol=1e-4)
    discounted = [sum(0.95 ** (s - t) * delta[s] for s in range(t, 4)) for t in range(4)]
    np.testing.assert_allclose(advantage, discounted, atol=2e-4)
    np.testing.assert_allclose(white, (advantage - advantage.mean()) / advantage.std(), atol=1e-3)
    _, new, ratio, a, policy, clipped, v, r, value = update.T
    np.testing.assert_allclose(ratio, np.exp(new - logp), atol=1e-4)
    np.testing.assert_allclose(policy, np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2)), atol=2e-4)
    np.testing.assert_array_equal(clipped, -a * np.clip(ratio, 0.8, 1.2) > -a * ratio)
    old = rollout[:, 5]
    errors = np.maximum((v - r) ** 2, (np.clip(v, old - 0.2, old + 0.2) - r) ** 2)
    np.testing.assert_allclose(value, errors / 2, atol=2e-4)
    means = [float(x) for x in re.search(r"policy loss (\S+), clip .* value loss (\d\.\d+)", text).groups()]
    np.testing.assert_allclose(means, [policy.mean(), value.mean()], atol=2e-4)


def test_every_task_prints_its_help(capsys):
    for task in QUICK_LOOKS:
        with pytest.raises(SystemExit) as stop:
            look(task, "--help")
        assert stop.value.code == 0
        assert "usage:" in capsys.readouterr().out
    assert isinstance(Parser(), argparse.ArgumentParser)
