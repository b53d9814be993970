"""Which rows train what: splits by a hash of the conversation, so that no prompt is ever on both sides.

A row's *key* is the person's first turn in its dialogue, white space aside (data in the HH form hold several beginnings
of one conversation; these stay together) or, for plain text, the text. Hashed, the key is a point u in [0, 1), and the
point alone decides where the row goes: the order of the rows does not matter, and rows added later do not move the
others.

    [0, v) validation      [v, 2v) test      [2v, 1) training, of which the first `ppo_fraction` are PPO's prompts

With `prompt_split="disjoint"` PPO draws its prompts from that part and the reward model trains on the rest: a reward
model has seen its own training prompts answered both well and badly, so its scores there are better than they will ever
be again. SFT may use both parts. With "shared" the two train on everything; right when they use different datasets, or
for comparisons with work that did so.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from config.user_error import UserError

SPLITS = ("train", "validation", "test")
_PARTS = ("rm", "validation", "ppo", "test")  # in the order in which a tiny file fills them


@dataclass(frozen=True)
class SplitOptions:
    """How a dataset is divided. All stages that share a dataset need the same options, or their parts overlap."""

    validation_fraction: float = 0.05
    """v above: share of the prompts held out for validation, and again for test."""
    prompt_split: str = "disjoint"
    """"disjoint" or "shared": whether the reward model and PPO train on different prompts of one dataset."""
    ppo_fraction: float = 0.3
    """Share of the training prompts that is PPO's. PPO needs fewer rows than a reward model: it makes its own data from
    them."""
    seed: int = 0
    """Of the hash. Not the run's seed: it stays the same over all stages and seeds of an experiment."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 0.5:
            raise UserError(f"validation_fraction: has to be above 0 and below 0.5, not {self.validation_fraction}")
        if not 0 < self.ppo_fraction < 1:
            raise UserError(f"ppo_fraction: has to be between 0 and 1, not {self.ppo_fraction}")
        if self.prompt_split not in ("disjoint", "shared"):
            raise UserError(f'prompt_split: "disjoint" or "shared", not {self.prompt_split!r}')

    def point(self, key: str) -> float:
        """Where a key lies in [0, 1)."""
        digest = hashlib.blake2b(
            key.encode(), digest_size=8, salt=self.seed.to_bytes(16, "little", signed=True)
        ).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    def part(self, point: float, has_test_split: bool = False) -> str:
        """The part of a point in data without a test split of their own, or in the *training* split of data that have
        one."""
        held_out = 0.0 if has_test_split else self.validation_fraction
        if point < held_out:
            return "validation"
        if point < 2 * held_out:
            return "test"
        return "ppo" if (point - 2 * held_out) / (1 - 2 * held_out) < self.ppo_fraction else "rm"

    def parts(self, points: Iterable[float]) -> dict[float, str]:
        """Divides a whole file of prompts, as `part` does, but leaves no part of a small file empty as long as it has a
        choice.

        Parts are filled in the order training, validation, PPO, test, each with the lowest point of the largest part.
        """
        parts = {point: self.part(point) for point in sorted(set(points))}
        members = {name: [point for point in parts if parts[point] == name] for name in _PARTS}
        for rank, name in enumerate(_PARTS):
            if members[name]:
                continue
            # Take from a part that can spare one; failing that, from one that is filled later than this one.
            donor = max(_PARTS, key=lambda other: len(members[other]))
            if len(members[donor]) < 2:
                donor = next((other for other in reversed(_PARTS[rank + 1 :]) if members[other]), None)
            if donor is not None:
                point = members[donor].pop(0)
                members[name].append(point)
                parts[point] = name
        return parts

    def wanted(self, stage: str, split: str, is_ranked: bool) -> tuple[str, ...]:
        """The parts that one stage reads for one split.

        Args:
            stage: "sft", "rm", "ppo" or "text".
            split: one of `SPLITS`.
            is_ranked: whether a reward model can train on these data at all; if not, PPO has no reason to avoid any
                prompt.
        """
        if split != "train":
            return (split,)
        if self.prompt_split == "disjoint" and is_ranked and stage in ("rm", "ppo"):
            return (stage,)
        return ("rm", "ppo")
