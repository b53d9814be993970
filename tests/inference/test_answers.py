"""Answers and what is measured on them: held against plain one-row arithmetic."""

import json
import math
import random

import numpy as np
import pytest
import torch

from config.user_error import UserError
from inference import answers as module
from inference.answers import (
    Answer,
    Machine,
    Sampling,
    TextModel,
    answer_logprobs,
    best_of,
    kl_to_sft,
    prompt_tokens,
    read_answers,
    sample_answers,
    score_answers,
    score_texts,
    system_figures,
)
from utils.template import PromptTemplate
from utils.tokenizer import get_tokenizer

TEMPLATE, MACHINE = PromptTemplate(), Machine(batch_size=3)
PROMPTS = [
    TEMPLATE.prompt(text) for text in ("What is tea?", "How many legs does a crab have? I forgot.", "Hi!", "Why?")
]
SAMPLING = Sampling(0.8, 7, seed=3)


@pytest.fixture(scope="module")
def build(make_model):
    """`build(role, seed)`: a tiny model with the demo's tokenizer."""
    tokenizer = get_tokenizer("demo")
    sizes = dict(vocab_size=1024, embedding_rows=1024, block_size=96, std=0.15)
    return lambda role="lm", seed=0, **options: TextModel(
        make_model(role, seed, **{**sizes, **options}), tokenizer, TEMPLATE
    )


@pytest.fixture(scope="module")
def answers(build):
    """Some that ended and some that were cut."""
    source = build()
    found = sample_answers(source, PROMPTS * 3, "sft", SAMPLING, MACHINE)
    eos = source.tokenizer.eos_id
    ended = [Answer(a.prompt, a.text, a.prompt_ids, np.array([*a.ids[:3], eos]), True) for a in found[:5]]
    return ended + found[5:]


def same(a, b) -> bool:
    return all(x.text == y.text and np.array_equal(x.ids, y.ids) and x.ended == y.ended for x, y in zip(a, b))


def test_a_machine_is_what_the_flags_say():
    machine = Machine.chosen("cpu", "bf16", 4, 3)
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    assert (machine.device, machine.batch_size) == (torch.device("cpu"), 4)
    assert machine.describe() == f"cpu ({torch.get_num_threads()} threads), bf16"
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    exact = Machine.chosen("cpu", "auto", 4, 3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item()) and exact.dtype == "fp32"
    with exact.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(UserError, match="--dtype fp16: needs CUDA"):
        Machine.chosen("cpu", "fp16", 4, 3)


def test_answers_are_what_the_model_said_after_the_prompt(build):
    source = build()
    for prompt, answer in zip(PROMPTS, sample_answers(source, PROMPTS, "sft", SAMPLING, MACHINE)):
        assert answer.prompt == prompt and answer.prompt_ids.tolist() == source.tokenizer.encode(prompt)
        assert answer.tokens == len(answer.ids) <= 7 and answer.ended == (answer.ids[-1] == source.tokenizer.eos_id)
        assert answer.text == source.tokenizer.decode(answer.ids).strip()
        assert answer.ended or answer.tokens == 7


def test_line_ends_make_no_other_answer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response": f"a{end}b"}) + "\n" for end in ("\n", "\r\n", "\r")))
    prompt = PromptTemplate().format(["q"])
    assert [answer.text for answer in read_answers(path, [prompt], PromptTemplate(), "--system")] == ["a\nb"]


def test_answers_depend_on_seed_name_draw_and_place_alone(build):
    source = build()
    first = sample_answers(source, PROMPTS, "sft", SAMPLING, MACHINE)
    assert same(first, sample_answers(source, PROMPTS, "sft", SAMPLING, Machine(batch_size=1)))
    longer = sample_answers(source, PROMPTS + ["\n\nHuman: more\n\nAssistant:"], "sft", SAMPLING, MACHINE)
    assert same(first, longer[: len(PROMPTS)])
    for other in (
        sample_answers(source, PROMPTS, "ppo", SAMPLING, MACHINE),
        sample_answers(source, PROMPTS, "sft", SAMPLING, MACHINE, draw=1),
        sample_answers(source, PROMPTS, "sft", Sampling(0.8, 7, seed=4), MACHINE),
    ):
        assert not same(first, other)
    greedy = Sampling(0.0, 7)
    assert same(*(sample_answers(source, PROMPTS, name, greedy, MACHINE) for name in ("a", "b")))


def test_long_prompts_lose_their_beginning_and_are_counted(build):
    source = build(block_size=20)
    rows, cut = prompt_tokens(source, PROMPTS, 7)
    whole = [source.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert cut == sum(len(ids) > 13 for ids in whole) > 0
    assert [row.tolist() for row in rows] == [ids[-13:] for ids in whole]
    assert len(sample_answers(source, PROMPTS, "sft", SAMPLING, MACHINE)) == len(PROMPTS)
    with pytest.raises(UserError, match="--max-new-tokens 20: the context is 20 tokens"):
        prompt_tokens(source, PROMPTS, 20)


def plain_logprob(model, answer: Answer, temperature: float) -> float:
    ids = torch.tensor([*answer.prompt_ids, *answer.ids])[None]
    logp = torch.log_softmax(model(ids)[0].double() / temperature, -1)
    P = len(answer.prompt_ids)
    return sum(logp[P - 1 + t, token].item() for t, token in enumerate(answer.ids))


@torch.no_grad()
def test_log_probabilities_are_those_of_each_row_alone(build, answers):
    for temperature in (1.0, 0.6):
        model = build(seed=5).model
        expected = [plain_logprob(model, a, temperature) for a in answers]
        found = answer_logprobs(model, answers, 1024, temperature, MACHINE, "x")
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_log_probabilities_are_the_samplers_own(build, monkeypatch):
    seen = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
    source = build()
    found = sample_answers(source, PROMPTS, "sft", SAMPLING, Machine(batch_size=9))
    order = np.argsort([-len(a.prompt_ids) for a in found], kind="stable")
    sampled = seen[0].logprobs.double().sum(1).numpy()
    np.testing.assert_allclose(answer_logprobs(source.model, found, 1024, 0.8, MACHINE, "x")[order], sampled, atol=2e-4)


def test_kl_is_the_mean_log_ratio_at_the_sampling_temperature(build, answers):
    policy, sft = build(seed=1), build(seed=2)
    found = kl_to_sft(policy, sft, answers, 0.8, MACHINE, "ppo")
    with torch.no_grad():
        expected = [plain_logprob(policy.model, a, 0.8) - plain_logprob(sft.model, a, 0.8) for a in answers]
    np.testing.assert_allclose(found, expected, atol=4e-4)
    assert kl_to_sft(sft, sft, answers, 0.8, MACHINE, "sft").tolist() == [0.0] * len(answers)
    assert np.abs(kl_to_sft(build(seed=2), sft, answers, 0.8, MACHINE, "copy")).max() < 1e-4


def test_kl_is_not_defined_for_greedy_answers_and_other_tokenizers(build, answers):
    policy, sft = build(seed=1), build(seed=2)
    assert kl_to_sft(policy, sft, answers, 0.0, MACHINE, "ppo") is None

    class Other:
        def identity(self):
            return {"sha256": "other"}

    assert kl_to_sft(TextModel(policy.model, Other(), TEMPLATE), sft, answers, 0.8, MACHINE, "ppo") is None


def plain_score(rm, prompt_ids, ids) -> float:
    row = torch.tensor([*prompt_ids, *ids])[None]
    with torch.no_grad():
        return rm.model(row, torch.ones_like(row, dtype=torch.bool)).item()


def test_scores_are_read_at_the_last_token_that_was_sampled(build, answers):
    rm = build("reward", seed=7)
    found = score_answers(rm, answers, MACHINE, "sft", own_ids=True)
    np.testing.assert_allclose(found, [plain_score(rm, a.prompt_ids, a.ids) for a in answers], atol=1e-4)


def test_texts_are_scored_as_training_joins_them(build):
    rm = build("reward", seed=7)
    encode, eos = rm.tokenizer.encode, rm.tokenizer.eos_id
    texts = ["Tea is a drink.", "", "A crab has ten legs."]
    expected = [plain_score(rm, encode(p), [*encode(TEMPLATE.response(t)), eos]) for p, t in zip(PROMPTS, texts)]
    np.testing.assert_allclose(score_texts(rm, MACHINE)(PROMPTS[:3], texts), expected, atol=1e-4)
    found = score_answers(rm, [Answer(p, t) for p, t in zip(PROMPTS, texts)], MACHINE, "file", own_ids=False)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_longer_than_the_reward_models_context_are_cut(build):
    rm = build("reward", seed=7, block_size=12)
    prompt, ids = np.arange(10), np.arange(20, 25)
    found = score_answers(rm, [Answer("", "", prompt, ids), Answer("", "", prompt, np.arange(40))], MACHINE, "x", True)
    expected = [plain_score(rm, prompt[3:], ids), plain_score(rm, prompt[-1:], np.arange(11))]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_best_of_n_takes_the_best_of_the_first_n():
    samples = [[Answer("p", f"{draw}-{i}") for i in range(3)] for draw in range(4)]
    proxy = np.array([[1.0, 0, 5], [2, 0, 4], [0, 9, 3], [7, 8, 6]])
    assert [a.text for a in best_of(samples, proxy, 2)] == ["1-0", "0-1", "0-2"]
    assert [a.text for a in best_of(samples, proxy, 4)] == ["3-0", "2-1", "3-2"]


@pytest.fixture
def write(tmp_path):
    def make(*rows) -> str:
        path = tmp_path / "made.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def test_answers_from_a_file_are_matched_by_prompt(write):
    path = write(
        {"prompt": "Hi!", "response": " Hello. \n", "x": 1},
        {"prompt": PROMPTS[0], "response": "A drink."},
        {"prompt": "not asked", "response": "x"},
        {"prompt": "Human: Hi!\n\nAssistant:", "response": "Hello."},
        {"prompt": "Why?", "response": ""},
    )
    found = read_answers(path, [PROMPTS[0], PROMPTS[2], PROMPTS[3]], TEMPLATE, "--system x")
    assert [a.text for a in found] == ["A drink.", "Hello.", ""]
    assert all(a.ids is None and a.ended is None and a.tokens is None for a in found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Hi!", "response": "a"}], r'--system x: .* no answer to 1 of the 2 prompts.*"Human: What is tea'),
        ([{"prompt": "Hi!"}], r'made.jsonl:1: has no text as "response"'),
        ([{"prompt": "Hi!", "response": 3}], r'made.jsonl:1: has no text as "response"'),
        (
            [{"prompt": "Hi!", "response": "a"}, {"prompt": "Hi! ", "response": "b"}],
            "made.jsonl:2: a second, different",
        ),
        ([{"response": "a"}], "made.jsonl:1: "),
        (["text"], "made.jsonl:1: "),
    ],
)
def test_wrong_files_of_answers(write, rows, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(*rows), [PROMPTS[0], PROMPTS[2]], TEMPLATE, "--system x")


def test_figures_of_a_system():
    words = ["a b a b a b a b", "c d", ""]
    rows = [Answer("p", text, np.arange(2), np.arange(n), ended) for text, n, ended in zip(words, (9, 3, 1), (1, 0, 1))]
    kl, proxy, gold = np.array([1.0, 2, 6]), np.array([1.0, 2, 3]), np.array([2.0, 1, 0])
    figures = system_figures(rows, kl, proxy, gold)
    assert figures["n"] == 3 and figures["eos_rate"] == pytest.approx(2 / 3)
    assert figures["mean_length"] == pytest.approx(10 / 3) and figures["mean_tokens"] == pytest.approx(13 / 3)
    assert figures["distinct_2"] == pytest.approx(3 / 8)  # ab, ba, cd of 8
    assert figures["repetition"] == pytest.approx(3 / 5) and figures["empty_rate"] == pytest.approx(1 / 3)
    assert figures["kl"] == pytest.approx(3) and figures["kl_se"] == pytest.approx(math.sqrt(7 / 3))
    assert (figures["proxy"], figures["gold"]) == (2.0, 1.0)
    assert figures["proxy_gold_correlation"] == pytest.approx(-1)


def test_figures_that_do_not_exist_are_none():
    figures = system_figures([Answer("p", "x"), Answer("q", "y")], proxy=np.array([1.0, 2]), gold=np.array([1.0, 1]))
    missing = {"eos_rate", "mean_tokens", "kl", "kl_se", "proxy_gold_correlation", "distinct_2", "repetition"}
    assert {key for key, value in figures.items() if value is None} == missing
    json.dumps(figures, allow_nan=False)
