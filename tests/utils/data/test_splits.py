"""The division of prompts into parts."""

import pytest

from config.user_error import UserError
from utils.data.splits import SplitOptions

KEYS = [f"question {i}" for i in range(4000)]


def points(options, n=4000):
    return [options.point(key) for key in KEYS[:n]]


def test_shares_are_as_asked_for():
    options = SplitOptions(validation_fraction=0.1, ppo_fraction=0.25)
    parts = [options.part(point) for point in points(options)]
    for name, share in {"validation": 0.1, "test": 0.1, "ppo": 0.2, "rm": 0.6}.items():
        assert abs(parts.count(name) / len(parts) - share) < 0.03
    hub = [options.part(point, has_test_split=True) for point in points(options)]
    assert set(hub) == {"ppo", "rm"} and abs(hub.count("ppo") / len(hub) - 0.25) < 0.03


def test_a_part_depends_on_the_key_and_the_seed_alone():
    options = SplitOptions()
    assert options.parts(points(options)) == options.parts(reversed(points(options)))
    few, all_of_them = options.parts(points(options, 1000)), options.parts(points(options))
    assert all(all_of_them[point] == part for point, part in few.items()), "rows added later move no other row"
    assert points(SplitOptions(seed=1)) != points(options)


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("seed", range(5))
def test_small_files_fill_their_parts_in_the_order_of_need(n, seed):
    options = SplitOptions(seed=seed)
    parts = list(options.parts(points(options, n)).values())
    assert len(parts) == n
    expected = ["rm", "validation", "ppo", "test"][:n]
    assert set(parts) == set(expected)


def test_stages_read_disjoint_prompts_unless_told_to_share():
    options = SplitOptions()
    assert options.wanted("rm", "train", True) == ("rm",)
    assert options.wanted("ppo", "train", True) == ("ppo",)
    assert set(options.wanted("sft", "train", True)) == {"rm", "ppo"}
    assert set(options.wanted("ppo", "train", False)) == {"rm", "ppo"}, "nothing to avoid without rankings"
    for stage in ("sft", "rm", "ppo", "text"):
        assert options.wanted(stage, "validation", True) == ("validation",)
        assert set(SplitOptions(prompt_split="shared").wanted(stage, "train", True)) == {"rm", "ppo"}


@pytest.mark.parametrize("wrong", [
    {"validation_fraction": 0}, {"validation_fraction": 0.5}, {"ppo_fraction": 1.0}, {"ppo_fraction": 0.0},
    {"prompt_split": "x"},
])  # fmt: skip
def test_wrong_options_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SplitOptions(**wrong)


def test_points_stay_where_they_are():
    """A row that trained a model must not be held out by a later version of the code."""
    assert SplitOptions().point("\n\nHuman: How do I make tea?") == 0.8005852528624178
    assert SplitOptions(seed=3).point("tea") == 0.01074036681588797


@pytest.mark.parametrize("has_test_split", [True, False])
def test_where_one_part_ends_and_the_next_begins(has_test_split):
    options = SplitOptions(validation_fraction=0.1, ppo_fraction=0.25)
    begins = 0.0 if has_test_split else 0.2
    ends = begins + 0.25 * (1 - begins)
    bounds = [(begins, "ppo"), (ends, "rm")] + [(0.1, "test")] * (not has_test_split)
    for point, part in bounds:
        assert options.part(point + 1e-9, has_test_split) == part
        assert point == 0 or options.part(point - 1e-9, has_test_split) != part
    assert options.part(0.0, has_test_split) == ("ppo" if has_test_split else "validation")
    assert options.part(1 - 1e-9, has_test_split) == "rm"
