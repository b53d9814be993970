"""Texts of the offline demo's closed world: prompts, responses of mixed quality, and preferences with known noise.

Everything the demo trains on is drawn from here by seeded generators, so that a programmatic gold reward
(`utils.demo.gold`) can score any text and the noise of the preference labels is known exactly. Texts are in the form of
Anthropic's HH-RLHF (Bai et al. 2022): a prompt is "\\n\\nHuman: ...\\n\\nAssistant:" and a response starts with its own
space. SFT, the reward model and PPO train on prompts of three disjoint pools, and held-out prompts use (target,
phrasing) combinations that no training text asks.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from utils.demo import facts
from utils.demo.facts import Fact, HarmfulRequest, Target, question
from utils.demo.gold import gold_reward

# P(a preferred over b) = sigmoid(BT_SCALE * (gold_a - gold_b)): the model of Bradley & Terry (1952). The scale sets
# how noisy the labels are; this one puts the best possible accuracy of a judge at about 0.86.
BT_SCALE = 1.1
SPLITS = ("train", "validation", "test")
# Phrasings of each target by pool: the training prompts of the three stages, and what is held out of all of them. A
# reward model has seen the answers to its own prompts graded, so PPO must not sample on those.
POOLS = {"sft": 5, "pairs": 5, "ppo": 5, "validation": 1, "test": 2}


# Prompts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to the last "Assistant:", and what its last human turn asks for."""

    text: str
    target: Target


def deal_phrasings(target_index: int) -> dict[str, tuple[int, ...]]:
    """Deal the phrasings of one target out to the pools, in numbers as in `POOLS`.

    What a pool gets rotates with the target, so that every phrasing is in every pool for some targets.
    """
    order = iter(random.Random(f"phrasing-split-{target_index}").sample(range(facts.PHRASINGS), facts.PHRASINGS))
    return {pool: tuple(islice(order, count)) for pool, count in POOLS.items()}


PHRASINGS_OF = tuple(deal_phrasings(i) for i in range(len(facts.TARGETS)))


def _draw_question(rng: random.Random, pool: str, harmful_rate: float) -> tuple[Target, int]:
    harmful = rng.random() < harmful_rate
    index = len(facts.FACTS) + rng.randrange(len(facts.HARMFUL)) if harmful else rng.randrange(len(facts.FACTS))
    return facts.TARGETS[index], rng.choice(PHRASINGS_OF[index][pool])


def _earlier_exchange(rng: random.Random, pool: str) -> tuple[Target, str]:
    """Return an earlier question of a two-turn dialogue (never a held-out combination) and its turn with answer."""
    target, phrasing = _draw_question(rng, "sft" if pool in SPLITS else pool, harmful_rate=0.1)
    answer = sample_response(target, EARLIER_MIXTURE, rng)
    return target, f"\n\nHuman: {rng.choice(facts.FIRST_TURN_LEADS)}{question(target, phrasing)}\n\nAssistant:{answer}"


def sample_prompt(rng: random.Random, pool: str, two_turns: bool) -> Prompt:
    """Draw one prompt of a pool (`POOLS`) with one or two human turns."""
    target, phrasing = _draw_question(rng, pool, harmful_rate=0.18)
    earlier, leads = "", facts.FIRST_TURN_LEADS
    if two_turns:
        leads = facts.SECOND_TURN_LEADS
        asked, earlier = _earlier_exchange(rng, pool)
        while asked is target:
            asked, earlier = _earlier_exchange(rng, pool)
    lead = rng.choice(leads)
    text = f"{earlier}\n\nHuman: {lead}{question(target, phrasing)}\n\nAssistant:"
    return Prompt(text, target)


def sample_prompts(seed: int, pool: str, count: int, two_turn_rate: float = 0.3) -> list[Prompt]:
    """Draw `count` distinct prompts of a pool, `two_turn_rate` of them with two turns; deterministic in its arguments.

    Raises:
        ValueError: the world does not have that many one-turn prompts in this pool.
    """
    rng = random.Random(f"prompts-{pool}-{seed}")
    two = round(count * two_turn_rate)
    found: dict[str, Prompt] = {}
    for two_turns, wanted in ((False, count - two), (True, count)):
        tries = 0
        while len(found) < wanted:
            prompt = sample_prompt(rng, pool, two_turns)
            found.setdefault(prompt.text, prompt)
            tries += 1
            if tries > 100 * count + 1000:
                raise ValueError(f"the demo world has fewer than {wanted} distinct prompts in the {pool} pool")
    prompts = list(found.values())
    rng.shuffle(prompts)
    return prompts


# Responses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """How often each attribute of a response occurs; attributes are drawn independently of one another."""

    right: float
    """Right among the answers to a harmless question."""
    distractor: float
    """The fixed distractor among the wrong answers; the others are strays, mostly of another category."""
    polite_opener: float
    polite_closer: float
    rude: float
    """A rude opener, and independently a rude closer, where there is no polite one: half this rate each."""
    filler: float
    """At least one needless sentence; a third of those have two."""
    repetition: float
    """The answer sentence is said again."""
    false_refusal: float
    """A refusal in place of the answer to a harmless question."""
    harmful_refusal: float
    """A refusal of a harmful request; the rest comply, or (a quarter of it) answer something else."""
    no_answer: float = 0.0
    """Nothing in the place of the answer; only where at least one other sentence exists."""
    contradiction: float = 0.0
    """The right and the wrong answer both."""
    misfit_opener: float = 0.05
    """An agreeing opener before a refusal, or an apology before an answer, among the polite openers."""


SFT_MIXTURE = Mixture(
    right=0.62, distractor=0.75, polite_opener=0.15, polite_closer=0.15, rude=0.25, filler=0.4, repetition=0.15,
    false_refusal=0.06, harmful_refusal=0.55,
)  # fmt: skip
PAIR_MIXTURE = Mixture(
    right=0.55, distractor=0.85, polite_opener=0.45, polite_closer=0.45, rude=0.2, filler=0.4, repetition=0.14,
    false_refusal=0.08, harmful_refusal=0.5, no_answer=0.03, contradiction=0.03, misfit_opener=0.1,
)  # fmt: skip
EARLIER_MIXTURE = Mixture(
    right=1.0, distractor=0.75, polite_opener=0.3, polite_closer=0.0, rude=0.0, filler=0.0, repetition=0.0,
    false_refusal=0.0, harmful_refusal=1.0,
)  # fmt: skip
"""The earlier answers of two-turn dialogues: right, and short."""


def _stray_sentence(target: Target, rng: random.Random) -> str:
    """Return an answer sentence that does not belong here: a foreign answer, or a true sentence about something else.

    Mostly of another category; one in ten stays in the target's own, beside the distractor, so that no wrong answer is
    one that the reward model has never seen.
    """
    category = getattr(target, "category", None) if rng.random() < 0.1 else None
    pool = [fact for fact in facts.FACTS if fact is not target and category in (None, fact.category)]
    other = rng.choice([fact for fact in pool if fact.answer != getattr(target, "answer", None)])
    if isinstance(target, Fact) and rng.random() < 0.7:
        return target.say(other.answer, rng.randrange(2))
    return other.say(other.answer, rng.randrange(2))


def _core(target: Target, mix: Mixture, rng: random.Random) -> tuple[list[str], bool]:
    """Return the sentences in the place of the answer, and whether they refuse."""
    if isinstance(target, HarmfulRequest):
        if rng.random() < mix.harmful_refusal:
            return [rng.choice(facts.REFUSALS)], True
        return [_stray_sentence(target, rng) if rng.random() < 0.25 else rng.choice(target.compliance)], False
    if rng.random() < mix.false_refusal:
        return [rng.choice(facts.REFUSALS)], True
    wrong = target.say(target.distractor, rng.randrange(2))
    if rng.random() >= mix.distractor:
        wrong = _stray_sentence(target, rng)
    right = target.say(target.answer, rng.randrange(2))
    is_right = rng.random() < mix.right
    if rng.random() < mix.contradiction:
        return ([right, wrong] if is_right else [wrong, right]), False
    return [right if is_right else wrong], False


def _opener(refuses: bool, mix: Mixture, rng: random.Random) -> list[str]:
    if rng.random() < mix.polite_opener:
        misfit = rng.random() < mix.misfit_opener
        return [rng.choice(facts.SORRY_OPENERS if refuses != misfit else facts.AGREEING_OPENERS)]
    return [rng.choice(facts.RUDE_OPENERS)] if rng.random() < mix.rude else []


def _closer(mix: Mixture, rng: random.Random) -> list[str]:
    if rng.random() < mix.polite_closer:
        return [rng.choice(facts.POLITE_CLOSERS)]
    return [rng.choice(facts.RUDE_CLOSERS)] if rng.random() < mix.rude else []


def sample_response(target: Target, mix: Mixture, rng: random.Random) -> str:
    """Draw a response to `target`: sentences joined by spaces, with the leading space of the HH form."""
    core, refuses = _core(target, mix, rng)
    fillers: list[str] = []
    if rng.random() < mix.filler:
        fillers = rng.sample(facts.FILLERS, 2 if rng.random() < 1 / 3 else 1)
    opener, closer = _opener(refuses, mix, rng), _closer(mix, rng)
    if rng.random() < mix.no_answer and (opener or fillers or closer):
        core = []
    again = core[-1:] if rng.random() < mix.repetition else []
    # Fillers before the answer in one case of four, so that position does not give quality away.
    body = fillers + core + again if rng.random() < 0.25 else core + again + fillers
    return " " + " ".join(opener + body + closer)


# Rows ----------------------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def sample_sft_rows(seed: int, split: str, prompts: list[Prompt], count: int) -> list[dict[str, str]]:
    """Draw `count` demonstrations of mixed quality {"prompt", "response"} to prompts drawn from `prompts`."""
    rng = random.Random(f"sft-{split}-{seed}")
    rows = []
    for _ in range(count):
        prompt = rng.choice(prompts)
        rows.append({"prompt": prompt.text, "response": sample_response(prompt.target, SFT_MIXTURE, rng)})
    return rows


def sample_pair_rows(seed: int, split: str, prompts: list[Prompt], count: int) -> list[dict[str, str | float]]:
    """Draw `count` preference pairs with Bradley-Terry labels.

    Returns rows {"chosen", "rejected", "gold_chosen", "gold_rejected"}: two whole dialogues with the same prompt, whose
    responses were drawn independently, and their gold rewards, which are never equal (such pairs are drawn again).
    """
    rng = random.Random(f"pairs-{split}-{seed}")
    rows: list[dict[str, str | float]] = []
    while len(rows) < count:
        prompt = rng.choice(prompts)
        a, b = (sample_response(prompt.target, PAIR_MIXTURE, rng) for _ in range(2))
        gold_a, gold_b = gold_reward([prompt.text, prompt.text], [a, b])
        if gold_a == gold_b:
            continue
        if rng.random() >= sigmoid(BT_SCALE * (gold_a - gold_b)):
            a, b, gold_a, gold_b = b, a, gold_b, gold_a
        rows.append(
            {"chosen": prompt.text + a, "rejected": prompt.text + b, "gold_chosen": gold_a, "gold_rejected": gold_b}
        )
    return rows


def best_possible_accuracy(rows: Iterable[Mapping[str, str | float]]) -> float:
    """Return the expected accuracy of a judge that knows the gold reward, on labels drawn by Bradley-Terry.

    It picks the response of higher gold, and is right with probability max(p, 1 - p) = sigmoid(BT_SCALE * |gap|). The
    mean over the rows is the ceiling for any reward model on them (NaN for no rows).
    """
    ceilings = [sigmoid(BT_SCALE * abs(float(r["gold_chosen"]) - float(r["gold_rejected"]))) for r in rows]
    return sum(ceilings) / len(ceilings) if ceilings else math.nan


ASKERS = ("Anna", "Ben", "Carla", "David", "Emma", "Felix")


def _told_to(asked: str, core: str, opener: str, rng: random.Random) -> str:
    """Return who asked what and who said what, seldom politely: that is left for RLHF to bring about."""
    asker, other = rng.sample(ASKERS, 2)
    said = [opener] * (rng.random() < 0.12) + [core]
    said += [rng.choice(facts.FILLERS)] * (rng.random() < 0.3)
    said += [rng.choice(facts.POLITE_CLOSERS)] * (rng.random() < 0.12)
    return f"{asker} asked: {asked} {other} said: {' '.join(said)}"


def _paragraph(rng: random.Random) -> str:
    """Return one paragraph of plain text: statements of facts, talk about them, and the stock sentences around them."""
    if rng.random() < 0.12:
        index = len(facts.FACTS) + rng.randrange(len(facts.HARMFUL))
        request = facts.HARMFUL[index - len(facts.FACTS)]
        asked = question(request, rng.choice(PHRASINGS_OF[index]["sft"]))
        core = rng.choice(facts.REFUSALS if rng.random() < 0.5 else request.compliance)
        return _told_to(asked, core, rng.choice(facts.SORRY_OPENERS), rng)
    index = rng.randrange(len(facts.FACTS))
    fact = facts.FACTS[index]
    if rng.random() < 0.5:
        asked = question(fact, rng.choice(PHRASINGS_OF[index]["sft"]))
        return _told_to(asked, fact.say(fact.answer, rng.randrange(2)), rng.choice(facts.AGREEING_OPENERS), rng)
    told = [fact.say(fact.answer, template) for template in rng.sample(range(2), 2)]
    second = rng.choice(facts.FACTS)
    told += [rng.choice(facts.FILLERS)] * (rng.random() < 0.4)
    told += [second.say(second.answer, template) for template in rng.sample(range(2), 2)]
    return " ".join(told)


def sample_text_rows(seed: int, count: int) -> list[dict[str, str]]:
    """Draw `count` paragraphs {"text"} of plain text, which ask only combinations of SFT's pool."""
    rng = random.Random(f"text-{seed}")
    return [{"text": _paragraph(rng)} for _ in range(count)]
