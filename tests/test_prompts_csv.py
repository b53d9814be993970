"""assets/prompts.csv: prompts for evaluations, as many and as mixed as promised, and none of the demo's."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from utils.template import PromptTemplate

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (ASSETS / "prompts.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture(scope="module")
def prompts(rows) -> list[str]:
    return [row["prompt"] for row in rows]


def bare(text: str) -> str:
    """A text without what does not make it another prompt: case, punctuation and spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def test_columns_and_numbers(rows) -> None:
    assert {tuple(row) for row in rows} == {("id", "category", "prompt")}
    assert [row["id"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert len(rows) >= 500  # so that an interval of a win rate is at most 0.044 wide to each side
    layout = (ASSETS.parent / "docs" / "layout.md").read_text(encoding="utf-8")
    assert f"prompts.csv: {len(rows)} prompts in {len({row['category'] for row in rows})} categories" in layout


def test_no_prompt_occurs_twice(prompts) -> None:
    assert [text for text, n in Counter(map(bare, prompts)).items() if n > 1] == []


def test_no_prompt_is_much_like_another(prompts) -> None:
    """At most half of the words that two prompts have between them are in both; the first words vary, too."""
    words = [set(bare(prompt).split()) for prompt in prompts]
    alike = [
        (prompts[j], prompts[i])
        for i in range(len(words))
        for j in range(i)
        if len(words[i] & words[j]) > 0.5 * len(words[i] | words[j])
    ]
    assert alike == []
    openings = Counter(" ".join(bare(prompt).split()[:3]) for prompt in prompts)
    assert openings.most_common(1)[0][1] <= 0.05 * len(prompts), openings.most_common(3)


def test_spelling_is_british(prompts) -> None:
    american = re.compile(
        r"\b(color|favor|neighbor|center|gray|theater|traveler|flavor|behavior|humor|rumor|honor|"
        r"meters?|liters?|jewelry|cozy|mom|apartment|sidewalk|vacation|(?:summar|organ|apolog|real|recogn)iz\w+)s?\b",
        re.I,
    )
    assert [prompt for prompt in prompts if american.search(prompt)] == []


def test_every_category_has_at_least_twenty(rows) -> None:
    counts = Counter(row["category"] for row in rows)
    assert len(counts) >= 20 and min(counts.values()) >= 20, counts


def test_lengths(prompts) -> None:
    words = [len(prompt.split()) for prompt in prompts]
    assert [p for p, n in zip(prompts, words) if not 3 <= n <= 80] == []
    assert sum(n <= 5 for n in words) >= 8 and sum(n >= 40 for n in words) >= 8  # very short and long ones, too


def test_prompts_are_clean_text(prompts) -> None:
    for prompt in prompts:
        assert prompt == prompt.strip() and "  " not in prompt and prompt.isprintable(), prompt
        assert not re.search(r"<\|?\w*\|?>|\[/?\w+\]|\ufffd|[^\x00-\u024f]", prompt), prompt
        assert "Human:" not in prompt and "Assistant:" not in prompt, prompt


def test_no_prompt_is_one_of_the_demo(prompts) -> None:
    human = PromptTemplate().human
    asked = set()
    for path in sorted((ASSETS / "demo").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                for text in json.loads(line).values():
                    if isinstance(text, str) and human in text:
                        asked |= {bare(turn.split("\n\n")[0]) for turn in text.split(human)[1:]}
    assert len(asked) > 5_000
    assert [prompt for prompt in prompts if bare(prompt) in asked] == []
