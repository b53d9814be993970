"""The demo's texts: disjoint splits, independent attributes, Bradley-Terry labels, small reproducible files."""

import gzip
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from utils.demo import world
from utils.demo.facts import FACT_PHRASINGS, FACTS, HARMFUL, HARMFUL_PHRASINGS, PHRASINGS, TARGETS, question
from utils.demo.gold import HIGHEST, explain, find_target, gold_reward
from utils.demo.make import SEED, SIZES, TEST_SEED, make_demo
from utils.demo.train_bpe import DEMO_FOLDER

pytestmark = pytest.mark.slow

SMALL = {name: max(40, size // 60) for name, size in SIZES.items()}
TRAINING_POOLS = ("sft", "pairs", "ppo")
ROOT = Path(__file__).resolve().parents[3]


def read(name, folder=DEMO_FOLDER):
    """Read the rows of one file of the demo."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def shipped():
    """Return the rows of every shipped file."""
    return {name: read(name) for name in SIZES}


def prompt_of(dialogue):
    """Return a dialogue's text up to and with its last "Assistant:"."""
    return dialogue[: dialogue.rindex("\n\nAssistant:") + len("\n\nAssistant:")]


def last_turn(prompt):
    """Return the last human turn of a prompt."""
    return prompt.rsplit("\n\nHuman: ", 1)[1].removesuffix("\n\nAssistant:")


def combination(turn):
    """Return the (target, phrasing) that a human turn asks, with its lead taken off."""
    target = find_target(turn)
    # "what is X?" ends several phrasings with a lead in front, so the longest phrasing that ends the turn is meant.
    return target, max((len(q), n) for n in range(PHRASINGS) if turn.endswith(q := question(target, n)))[1]


# The world -----------------------------------------------------------------------------------------------------------


def test_phrasings_are_dealt_out_without_overlap():
    assert len(FACT_PHRASINGS) == len(HARMFUL_PHRASINGS) == PHRASINGS
    seen = Counter()
    for pools in world.PHRASINGS_OF:
        assert sorted(p for pool in pools.values() for p in pool) == list(range(PHRASINGS))
        assert {name: len(pool) for name, pool in pools.items()} == world.POOLS
        seen.update((name, p) for name, pool in pools.items() for p in pool)
    # Every phrasing is in every training pool for some targets, so that what is held out is a combination.
    assert min(seen[pool, p] for pool in TRAINING_POOLS for p in range(PHRASINGS)) > 0.1 * len(TARGETS)
    # No two questions of the world are the same text.
    questions = [question(target, p) for target in TARGETS for p in range(PHRASINGS)]
    assert len(set(questions)) == len(questions)


def test_sampled_prompts_are_distinct_and_a_pure_function_of_the_seed():
    once = world.sample_prompts(5, "validation", 200)
    assert once == world.sample_prompts(5, "validation", 200)
    assert once != world.sample_prompts(6, "validation", 200)
    assert len({p.text for p in once}) == 200
    assert sum(p.text.count("\n\nHuman:") == 2 for p in once) == 60
    with pytest.raises(ValueError, match="fewer than"):
        world.sample_prompts(0, "validation", 2000, two_turn_rate=0.0)


def test_attributes_are_independent():
    rng = random.Random(0)
    fact, flags = FACTS[3], []
    for _ in range(6000):
        response = world.sample_response(fact, world.SFT_MIXTURE, rng)
        parts = explain(f"\n\nHuman: {question(fact, 0)}\n\nAssistant:", response)
        sentences = [kind for _, kind in parts["sentences"]]
        flags.append(
            {
                "right": "right" in sentences,
                "polite opener": sentences[0] in ("agreeing", "sorry"),
                "polite closer": sentences[-1] == "closer",
                "filler": "filler" in sentences,
                "repeated": "repeated" in parts["parts"],
            }
        )
    rates = {name: sum(f[name] for f in flags) / len(flags) for name in flags[0]}
    for a in rates:
        for b in rates:
            if a < b:
                both = sum(f[a] and f[b] for f in flags) / len(flags)
                deviation = math.sqrt(rates[a] * (1 - rates[a]) * rates[b] * (1 - rates[b]))
                assert abs(both - rates[a] * rates[b]) / deviation < 0.06, (a, b)
    mix = world.SFT_MIXTURE
    assert rates["right"] == pytest.approx((1 - mix.false_refusal) * mix.right, abs=0.03)
    assert rates["polite opener"] == pytest.approx(mix.polite_opener, abs=0.03)
    assert rates["filler"] == pytest.approx(mix.filler, abs=0.03)
    assert rates["repeated"] == pytest.approx(mix.repetition, abs=0.03)


def test_mixtures_are_probabilities():
    for mixture in (world.SFT_MIXTURE, world.PAIR_MIXTURE):
        assert all(0 <= getattr(mixture, field.name) <= 1 for field in fields(mixture))


def test_sigmoid():
    assert world.sigmoid(0.0) == 0.5
    assert world.sigmoid(1.1) + world.sigmoid(-1.1) == pytest.approx(1.0)
    assert world.sigmoid(1.1) == pytest.approx(0.7502601055951177)
    assert (world.sigmoid(1e6), world.sigmoid(-1e6)) == (1.0, 0.0)


# The shipped rows ----------------------------------------------------------------------------------------------------


def asked(shipped):
    """{pool: every prompt that the shipped files ask from it}."""
    found = {"sft": shipped["sft-train"], "ppo": shipped["prompts-train"]}
    found["validation"] = shipped["prompts-validation"] + shipped["sft-validation"]
    found["test"] = shipped["prompts-test"]
    prompts = {pool: {row["prompt"] for row in rows} for pool, rows in found.items()}
    for pool, split in (("pairs", "train"), ("validation", "validation"), ("test", "test")):
        prompts.setdefault(pool, set()).update(prompt_of(row["chosen"]) for row in shipped[f"pairs-{split}"])
    return prompts


def turns_of(prompt):
    """Return the human turns of a prompt."""
    return [turn.split("\n\nAssistant:")[0] for turn in prompt.split("\n\nHuman: ")[1:]]


@pytest.mark.parametrize(("a", "b"), itertools.combinations(world.POOLS, 2))
def test_no_two_pools_share_a_prompt_or_a_combination(shipped, a, b):
    """SFT, the reward model and PPO train on prompts of their own, and none of them on a held-out one."""
    prompts = asked(shipped)
    assert not prompts[a] & prompts[b]
    combinations = {pool: {combination(last_turn(prompt)) for prompt in prompts[pool]} for pool in (a, b)}
    assert not combinations[a] & combinations[b]


@pytest.mark.parametrize("pool", world.POOLS)
def test_a_pool_asks_its_own_combinations_alone(shipped, pool):
    dealt = {(TARGETS[i], p) for i, pools in enumerate(world.PHRASINGS_OF) for p in pools[pool]}
    prompts = asked(shipped)[pool]
    found = {combination(last_turn(prompt)) for prompt in prompts}
    # 400 validation prompts may miss one of 82 combinations by chance.
    assert found == dealt if pool in TRAINING_POOLS else found <= dealt and len(found) > 0.95 * len(dealt)
    # Earlier turns are of the pool too, those of held-out prompts of SFT's.
    earlier_pool = pool if pool in TRAINING_POOLS else "sft"
    for earlier in (turn for prompt in prompts for turn in turns_of(prompt)[:-1]):
        target, phrasing = combination(earlier)
        assert phrasing in world.PHRASINGS_OF[TARGETS.index(target)][earlier_pool]
    assert max(len(turns_of(prompt)) for prompt in prompts) == 2


def test_prompts_of_a_file_are_distinct(shipped):
    for split in world.SPLITS:
        prompts = [row["prompt"] for row in shipped[f"prompts-{split}"]]
        assert len(prompts) == len(set(prompts)) == SIZES[f"prompts-{split}"]


def test_test_files_have_a_seed_of_their_own(tmp_path, shipped):
    """Another seed changes everything but the test files, and another test seed these alone."""
    assert TEST_SEED != SEED
    make_demo(tmp_path / "a", SMALL, seed=1)
    make_demo(tmp_path / "b", SMALL, seed=2)
    make_demo(tmp_path / "c", SMALL, seed=1, test_seed=3)
    for name in SIZES:
        a, b, c = (read(name, tmp_path / folder) for folder in "abc")
        assert (a == b) == name.endswith("-test"), name
        assert (a == c) == (not name.endswith("-test")), name


def test_plain_text_has_no_held_out_question(shipped):
    text = "\n".join(row["text"] for row in shipped["text"])
    for split in ("validation", "test"):
        assert not any(row["prompt"] in text for row in shipped[f"prompts-{split}"])
    for row in shipped["text"]:
        if " asked: " in row["text"]:
            turn = row["text"].split(" asked: ")[1].rsplit(" said: ")[0].rsplit(" ", 1)[0]
            target, phrasing = combination(turn)
            assert phrasing in world.PHRASINGS_OF[TARGETS.index(target)]["sft"]
    # Every fact is told.
    assert all(fact.say(fact.answer) in text for fact in FACTS)


def test_rows_have_the_form_of_hh(shipped):
    for split in world.SPLITS:
        for row in shipped[f"pairs-{split}"]:
            prompt = prompt_of(row["chosen"])
            assert prompt == prompt_of(row["rejected"])
            assert prompt.startswith("\n\nHuman: ")
            assert row["gold_chosen"] != row["gold_rejected"]
            assert row["chosen"][len(prompt)] == row["rejected"][len(prompt)] == " "
    for row in shipped["sft-train"]:
        assert row["response"].startswith(" ")
        assert row["prompt"].endswith("\n\nAssistant:")
    assert {name: len(rows) for name, rows in shipped.items()} == SIZES


def test_stored_gold_is_the_gold_of_the_text(shipped):
    rows = shipped["pairs-test"]
    for side in ("chosen", "rejected"):
        prompts = [prompt_of(row[side]) for row in rows]
        responses = [row[side][len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        assert gold_reward(prompts, responses) == [row[f"gold_{side}"] for row in rows]


def test_stacked_politeness_never_occurs_in_the_pairs(shipped):
    for row in shipped["pairs-train"][::10]:
        for side in ("chosen", "rejected"):
            prompt = prompt_of(row[side])
            parts = explain(prompt, row[side][len(prompt) :])["parts"]
            assert "stacked" not in parts
            assert "junk" not in parts


def test_demonstrations_are_of_mixed_quality(shipped):
    rows = shipped["sft-train"]
    golds = gold_reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    # Right more often than not, and so seldom at its best that best-of-16 does not find it: room for PPO.
    assert -0.5 < sum(golds) / len(golds) < -0.3
    assert 0.003 < golds.count(HIGHEST) / len(golds) < 0.01
    harmful = sum(find_target(row["prompt"]) in HARMFUL for row in rows) / len(rows)
    assert 0.15 < harmful < 0.21


def test_label_frequencies_follow_bradley_terry(shipped):
    by_gap = Counter(), Counter()
    for row in shipped["pairs-train"]:
        gap = round(abs(row["gold_chosen"] - row["gold_rejected"]), 1)
        by_gap[0][gap] += 1
        by_gap[1][gap] += row["gold_chosen"] > row["gold_rejected"]
    assert min(by_gap[0]) == 0.6
    for gap, count in by_gap[0].items():
        p = world.sigmoid(world.BT_SCALE * gap)
        # Four standard errors over about twenty gaps.
        assert abs(by_gap[1][gap] - count * p) <= 4 * math.sqrt(count * p * (1 - p)) + 1, gap


@pytest.mark.parametrize("split", world.SPLITS)
def test_best_possible_accuracy_two_ways(shipped, split):
    rows = shipped[f"pairs-{split}"]
    best = world.best_possible_accuracy(rows)
    assert 0.85 <= best <= 0.87
    # The share of labels that agree with the gold order estimates the same number.
    agree = sum(row["gold_chosen"] > row["gold_rejected"] for row in rows) / len(rows)
    assert abs(agree - best) < 4 * math.sqrt(best * (1 - best) / len(rows))
    # And a direct simulation: many labels per pair, judged by the gold order.
    rng = random.Random(0)
    hits = draws = 0
    for row in rows[:1000]:
        p = 1 / (1 + math.exp(-world.BT_SCALE * (row["gold_chosen"] - row["gold_rejected"])))
        for _ in range(20):
            hits += (rng.random() < p) == (row["gold_chosen"] > row["gold_rejected"])
            draws += 1
    assert hits / draws == pytest.approx(world.best_possible_accuracy(rows[:1000]), abs=0.012)


def test_best_possible_accuracy_by_hand():
    rows = [{"gold_chosen": 1.0, "gold_rejected": 0.0}, {"gold_chosen": 0.0, "gold_rejected": 2.0}]
    expected = (1 / (1 + math.exp(-world.BT_SCALE)) + 1 / (1 + math.exp(-2 * world.BT_SCALE))) / 2
    assert world.best_possible_accuracy(rows) == pytest.approx(expected)
    assert math.isnan(world.best_possible_accuracy([]))


# The files -----------------------------------------------------------------------------------------------------------


def test_shipped_files_are_small():
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 2_000_000


def test_generator_is_deterministic(tmp_path):
    for name in ("a", "b"):
        make_demo(tmp_path / name, SMALL)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([f"{name}.jsonl.gz" for name in SIZES] + ["bpe.tiktoken"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_generator_makes_what_ships(tmp_path, shipped):
    make_demo(tmp_path)
    for name, rows in shipped.items():
        # Rows, not bytes: another zlib may compress the same rows differently.
        assert read(name, tmp_path) == rows
    assert (tmp_path / "bpe.tiktoken").read_bytes() == (DEMO_FOLDER / "bpe.tiktoken").read_bytes()


@pytest.mark.parametrize("script", ["demo/make.py", "demo/train_bpe.py"])
def test_scripts_run_from_src_as_well(script, tmp_path):
    done = subprocess.run(
        [sys.executable, f"utils/{script}", "--help"], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert "--out" in done.stdout
