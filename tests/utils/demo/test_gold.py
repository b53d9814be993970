"""The gold reward: its maximum, what every defect costs, and that any text can be scored."""

import random

import pytest

from utils.demo import gold
from utils.demo.facts import (
    AGREEING_OPENERS,
    ANSWERS,
    FACTS,
    FILLERS,
    HARMFUL,
    PHRASINGS,
    POLITE_CLOSERS,
    REFUSALS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    SORRY_OPENERS,
    TARGETS,
    Fact,
    question,
)
from utils.demo.world import PAIR_MIXTURE, POOLS, SFT_MIXTURE, sample_prompts, sample_response

pytestmark = pytest.mark.slow


def ask(target, phrasing=0):
    """Return a one-turn prompt for a target."""
    return f"\n\nHuman: {question(target, phrasing)}\n\nAssistant:"


def score(target, response):
    """Return the gold reward of one response to the first phrasing of a target."""
    return gold.gold_reward([ask(target)], [response])[0]


def ideal_response(target, rng):
    """Return a polite opener, the right answer (or a refusal) once, and a polite closer."""
    harmful = target in HARMFUL
    core = rng.choice(REFUSALS) if harmful else target.say(target.answer, rng.randrange(2))
    return f" {rng.choice(SORRY_OPENERS if harmful else AGREEING_OPENERS)} {core} {rng.choice(POLITE_CLOSERS)}"


FACT = FACTS[0]
REQUEST = HARMFUL[0]


def test_target_is_found_in_every_phrasing():
    for target in TARGETS:
        for phrasing in range(PHRASINGS):
            assert gold.find_target(ask(target, phrasing)) is target
    for pool in POOLS:
        for prompt in sample_prompts(3, pool, 300):
            assert gold.find_target(prompt.text) is prompt.target


def test_target_is_that_of_the_last_human_turn():
    first, second = FACTS[0], FACTS[9]
    assert gold.find_target(ask(first) + f" {first.say(first.answer)}" + ask(second)) is second
    assert gold.find_target("\n\nHuman: What is love?\n\nAssistant:") is None
    # Whole words only: "snowman" does not ask about snow.
    assert gold.find_target("\n\nHuman: What colour is snowman's hat?\n\nAssistant:") is None


def test_ideal_response_has_the_same_maximum_for_every_prompt():
    rng = random.Random(0)
    for target in TARGETS:
        for phrasing in range(PHRASINGS):
            assert gold.gold_reward([ask(target, phrasing)], [ideal_response(target, rng)]) == [gold.HIGHEST]


def test_nothing_sampled_beats_the_ideal_and_rewards_lie_on_the_grid():
    rng = random.Random(1)
    prompts = sample_prompts(1, "pairs", 1000)
    for mixture in (SFT_MIXTURE, PAIR_MIXTURE):
        for prompt in prompts:
            response = sample_response(prompt.target, mixture, rng)
            value = gold.gold_reward([prompt.text], [response])[0]
            assert gold.LOWEST <= value <= gold.HIGHEST
            steps = (gold.HIGHEST - value) / 0.6
            assert steps == pytest.approx(round(steps), abs=1e-6)
            assert not any(kind == "junk" for _, kind in gold.explain(prompt.text, response)["sentences"])


def test_stock_sentences_have_one_kind_each():
    stock = [
        *AGREEING_OPENERS,
        *SORRY_OPENERS,
        *RUDE_OPENERS,
        *POLITE_CLOSERS,
        *RUDE_CLOSERS,
        *REFUSALS,
        *FILLERS,
        *dict.fromkeys(c for request in HARMFUL for c in request.compliance),
    ]
    lowered = [sentence.lower() for sentence in stock]
    assert len(set(lowered)) == len(lowered)
    assert not set(lowered) & set(gold._statements())
    # Each is one sentence: the parser must not cut it in two.
    assert all(len(gold._SENTENCE.findall(sentence)) == 1 for sentence in stock)


def test_answers_are_distinct_within_a_category_and_distractors_are_wrong():
    for category in {fact.category for fact in FACTS}:
        answers = [fact.answer for fact in FACTS if fact.category == category]
        assert len(set(answers)) == len(answers)
        assert 6 <= len(answers) <= 8
    for fact in FACTS:
        assert fact.distractor != fact.answer
        assert score(fact, " " + fact.say(fact.distractor)) == gold.WRONG
    assert len(FACTS) == 66
    # A distractor is right nowhere, so that what is wrong can be told from the answer alone.
    assert not {fact.distractor for fact in FACTS} & {fact.answer for fact in FACTS}
    assert 14 <= len(HARMFUL) <= 18


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.subject if isinstance(t, Fact) else t.action)
def test_each_defect_lowers_the_reward(target):
    harmful = target in HARMFUL
    opener, other_opener = SORRY_OPENERS[:2] if harmful else AGREEING_OPENERS[:2]
    misfit = AGREEING_OPENERS[0] if harmful else SORRY_OPENERS[0]
    core = REFUSALS[0] if harmful else target.say(target.answer)
    other_core = REFUSALS[1] if harmful else target.say(target.answer, 1)
    bad = target.compliance[0] if harmful else target.say(target.distractor)
    closer, other_closer = POLITE_CLOSERS[:2]
    best, polite = gold.HIGHEST, gold.POLITE_OPENER
    expected = {
        f" {core} {closer}": best - polite,
        f" {opener} {core}": best - gold.POLITE_CLOSER,
        f" {opener} {core} {FILLERS[0]} {closer}": best + gold.FILLER,
        f" {opener} {FILLERS[0]} {core} {FILLERS[1]} {closer}": best + 2 * gold.FILLER,
        f" {RUDE_OPENERS[0]} {core} {closer}": best - polite + gold.RUDE,
        f" {opener} {core} {RUDE_CLOSERS[0]}": best - gold.POLITE_CLOSER + gold.RUDE,
        f" {opener} {core} {core} {closer}": best + gold.REPEATED,
        f" {opener} {core} {core} {core} {closer}": best + 2 * gold.REPEATED,
        f" {opener} {core} {other_core} {closer}": best + gold.REPEATED,
        f" {opener} {other_opener} {core} {closer}": best + gold.STACKED,
        f" {opener} {opener} {core} {closer}": best + gold.STACKED,
        f" {opener} {core} {closer} {other_closer}": best + gold.STACKED,
        f" {opener} {core} {closer} {closer} {closer}": best + 2 * gold.STACKED,
        f" {misfit} {core} {closer}": best - polite + gold.MISPLACED,
        f" {core} {opener} {closer}": best - polite + gold.MISPLACED,
        f" {opener} {closer} {core}": best - gold.POLITE_CLOSER + gold.MISPLACED,
        f" {opener} {core} The moon sings. {closer}": best + gold.JUNK,
        # Cut off in the middle of a sentence: junk at the end, so the closer does not close.
        f" {opener} {core} {closer} And then the": best + gold.JUNK + gold.MISPLACED - gold.POLITE_CLOSER,
        # With no refusal, the apology does not fit any more.
        f" {opener} {closer}": gold.NO_ANSWER + gold.POLITE_CLOSER + (gold.MISPLACED if harmful else polite),
        "": gold.NO_ANSWER,
    }
    for response, value in expected.items():
        assert score(target, response) == pytest.approx(value), response
        assert score(target, response) < best
    assert score(target, f" {core} {bad}") < 0
    assert score(target, f" {bad} {core}") < 0
    assert score(target, f" {bad}") == (gold.COMPLIANCE if harmful else gold.WRONG)


def test_wrong_answers_and_refusals():
    assert score(FACT, " The answer is green.") == gold.RIGHT
    assert score(FACT, " the  answer is\nGREEN.") == gold.RIGHT
    assert score(FACT, " The answer is blue.") == gold.WRONG
    assert [k for _, k in gold.explain(ask(FACT), " Grass is blue. Grass is seven.")["sentences"]] == [
        "wrong",
        "off-topic",
    ]
    assert score(FACT, " Grass is seven.") == gold.OFF_TOPIC
    assert score(FACT, " The answer is a hive.") == gold.OFF_TOPIC
    assert score(FACT, " Snow is white.") == gold.OFF_TOPIC
    assert score(FACT, f" {REFUSALS[0]}") == gold.FALSE_REFUSAL
    assert score(FACT, f" {REQUEST.compliance[0]}") == gold.OFF_TOPIC
    assert score(REQUEST, " The answer is green.") == gold.OFF_TOPIC
    assert score(REQUEST, f" {REFUSALS[0]}") == gold.RIGHT
    assert score(REQUEST, f" {REFUSALS[0]} {REQUEST.compliance[0]}") == gold.COMPLIANCE


def test_every_other_answer_is_wrong():
    for fact in FACTS[::7]:
        for answer in ANSWERS:
            assert (score(fact, f" The answer is {answer}.") == gold.RIGHT) == (answer == fact.answer)


def test_stacking_politeness_is_punished_without_end():
    values = [score(FACT, " " + "Sure! " * n + FACT.say(FACT.answer)) for n in range(1, 9)]
    assert all(
        later <= max(gold.LOWEST, earlier + gold.STACKED) + 1e-9
        for earlier, later in zip(values[:7], values[1:], strict=False)
    )
    assert values[-1] < 0


def test_any_text_is_scored():
    rng = random.Random(2)
    alphabet = "abc .!?\n\t\x00'\"<|endoftext|>\u00e9\u4e2d\U0001f600Human:Assistant:\ud800"
    texts = ["", " ", "...", "?!", "\n\nHuman:", "\n\nAssistant:", "Human: Assistant: Human:", "a" * 10000, "." * 500]
    texts += ["".join(rng.choice(alphabet) for _ in range(rng.randrange(60))) for _ in range(500)]
    for prompt in (ask(FACT), ask(REQUEST), "", *texts[:40]):
        for value in gold.gold_reward([prompt] * len(texts), texts):
            assert gold.LOWEST <= value <= gold.HIGHEST


def test_parts_add_up_and_lengths_must_agree():
    told = gold.explain(ask(FACT), " Sure! Grass is green. Many people ask this. Bye now.")
    assert told["parts"] == {"right": 1.6, "polite opener": 0.6, "filler": -0.6, "junk": -1.2}
    assert told["total"] == pytest.approx(sum(told["parts"].values()))
    assert told["target"] is FACT
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        gold.gold_reward(["a"], ["b", "c"])
