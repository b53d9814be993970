"""The vocabulary of the offline demo's closed world: facts, harmful requests, phrasings and stock sentences.

Only tables (most in facts.toml) and the sentences they spell out. `utils.demo.world` draws texts from them,
`utils.demo.gold` parses texts against them, so a sentence that is not here is junk to the gold reward.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """One fact of the world: what can be asked, what is right and what is commonly confused with it."""

    category: str
    subject: str
    answer: str
    distractor: str
    direct: tuple[str, str]
    """Two direct questions, lower-case, with their question mark."""
    indirect: str
    """The question as a clause: "Do you know ..."."""
    templates: tuple[str, ...]
    """Complete answer sentences with an {a} for the answer."""

    def say(self, answer: str, template: int = 0) -> str:
        """Return the sentence that gives `answer` to this fact's question."""
        return capitalise(self.templates[template].format(a=answer))


@dataclass(frozen=True)
class HarmfulRequest:
    """One mildly harmful request: `action` completes "How do I ...?"; `compliance` is a sentence that goes along."""

    action: str
    compliance: tuple[str, ...]


Target = Fact | HarmfulRequest


def capitalise(text: str) -> str:
    """Return `text` with its first character in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


_WORDS = tomllib.loads(Path(__file__).with_name("facts.toml").read_text(encoding="utf-8"))
HARMFUL = tuple(
    HarmfulRequest(action, (compliance, "Just do it when nobody is looking.", "It is easy if you are quick."))
    for action, compliance in _WORDS["harmful"]
)
FACT_PHRASINGS, HARMFUL_PHRASINGS = zip(*_WORDS["phrasings"], strict=True)
PHRASINGS = len(FACT_PHRASINGS)
FIRST_TURN_LEADS = ("", "Hi! ", "Hello. ", "Excuse me. ", "Quick question. ", "Good morning. ")
SECOND_TURN_LEADS = ("", "Thanks. ", "OK. ", "Next one. ", "And now: ")

AGREEING_OPENERS = ("Sure!", "Of course!", "Happy to help!", "Good question!")
SORRY_OPENERS = ("I am sorry.", "Please forgive me.")
RUDE_OPENERS = ("Ugh.", "What a silly question.", "You should know better.")
POLITE_CLOSERS = ("Have a nice day.", "Take care.", "Thank you for asking.")
RUDE_CLOSERS = ("Now leave me alone.", "Do not ask again.", "Stop wasting my time.")
REFUSALS = ("I cannot help with that.", "I would rather not help with that.", "That is something I will not do.")
FILLERS = ("Many people ask this.", "It is an old question.", "This is easy to remember.", "I read about it once.")


def _facts_of(category: str, direct: list[str], indirect: str, statements: list[str], facts: list) -> Iterator[Fact]:
    # The bare third form is understood by the gold reward but never drawn: whether "The answer is red." is right cannot
    # be seen without the question, and a reward model of this size does not learn to look there within one epoch.
    forms = [*direct, indirect, *(f"{statement}." for statement in statements), "the answer is {a}."]
    for subject, answer, distractor in facts:
        # The subject is put in now, the answer later.
        d0, d1, clause, *templates = (form.replace("{x}", subject) for form in forms)
        yield Fact(category, subject, answer, distractor, (d0, d1), clause, tuple(templates))


FACTS = tuple(fact for name, words in _WORDS["category"].items() for fact in _facts_of(name, **words))
TARGETS: tuple[Target, ...] = FACTS + HARMFUL
ANSWERS = tuple(dict.fromkeys(a for fact in FACTS for a in (fact.answer, fact.distractor)))
"""Every answer of the world, right for some fact or a distractor of one, in a fixed order."""


def question(target: Target, phrasing: int) -> str:
    """Return the human turn that asks for `target` in phrasing `phrasing` (0 .. PHRASINGS - 1), without a lead."""
    if isinstance(target, HarmfulRequest):
        return HARMFUL_PHRASINGS[phrasing].format(h=target.action)
    d0, d1 = (capitalise(d) for d in target.direct)
    return FACT_PHRASINGS[phrasing].format(d0=d0, d1=d1, i=target.indirect)


def world_in_a_line() -> str:
    """What a model of this world knows, and three questions that it can answer."""
    subjects = ", ".join(dict.fromkeys(fact.category for fact in FACTS))
    asked = {fact.category: question(fact, 0) for fact in reversed(FACTS)}  # the first fact of each category
    examples = ", ".join(f'"{asked[category]}"' for category in ("colour", "legs", "capital"))
    return (
        f"this model knows only the demo's small world ({len(FACTS)} facts: {subjects}) and answers all else from it, "
        f"too; ask for instance {examples}"
    )
