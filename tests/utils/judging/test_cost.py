"""What calls cost, and the limit."""

import re
import threading

import pytest

from config.user_error import UserError
from utils.judging.cost import Budget, Price, read_prices
from utils.judging.requests import DEFAULT_JUDGE_MODEL

PRICE = Price(1.0, 10.0)


def test_dollars_per_million_tokens():
    assert PRICE.of(1_000_000, 0) == 1.0 and PRICE.of(0, 500_000) == 5.0


def test_the_price_of_the_default_model_is_known():
    assert DEFAULT_JUDGE_MODEL in read_prices().models


def test_prices_stand_in_a_file_with_their_date():
    prices = read_prices()
    assert re.fullmatch(r"[A-Z][a-z]+ 20\d\d", prices.as_of)
    assert prices.models["gpt-4o"] == Price(2.5, 10.0) and all(p.input < p.output for p in prices.models.values())


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"as_of": "May 2026"}', '{"models": {}}', '{"as_of": "May 2026", "models": {"m": 3}}',
        '{"as_of": "May 2026", "models": {"m": [1, 2, 3]}}', '{"as_of": "May 2026", "models": {"m": ["a", "b"]}}',
        '{"as_of": "May 2026", "models": {"m": [-1, 2]}}', '{"as_of": "May 2026", "models": {"m": [NaN, 2]}}', None,
    ],
)  # fmt: skip
def test_a_damaged_file_of_prices_is_one_line(tmp_path, content):
    path = tmp_path / "prices.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="prices.json: no list of prices; .*--judge-price"):
        read_prices(path)


@pytest.mark.parametrize("text", ["hello " * 100, "日本語" * 50, "", "x"])
def test_an_estimate_stays_below_the_bound(text):
    assert 0 < PRICE.estimate(text) < PRICE.bound(text, 64)


def test_refused_calls_cost_nothing_and_lost_answers_their_bound():
    budget = Budget(PRICE, None)
    for usage, charged in (((100, 10), True), (None, False), (None, True)):
        assert budget.reserve(0.5)
        budget.settle(0.5, usage, charged)
    assert budget.spent == pytest.approx(PRICE.of(100, 10) + 0.5)
    assert (budget.input_tokens, budget.output_tokens) == (100, 10)


def test_a_call_that_could_pass_the_limit_is_not_made():
    budget = Budget(PRICE, 1.0)
    assert budget.reserve(0.6)
    budget.settle(0.6, None)
    assert not budget.reserve(0.6)
    assert budget.reserve(0.4)


def test_near_the_limit_a_call_waits_for_those_in_flight():
    budget = Budget(PRICE, 1.0)
    assert budget.reserve(0.9)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(budget.reserve(0.9)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    budget.settle(0.9, (1000, 0))
    thread.join(5)
    assert answers == [True]


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_is_positive(limit):
    with pytest.raises(UserError, match="--max-cost"):
        Budget(PRICE, limit)


def test_a_limit_needs_a_price():
    with pytest.raises(UserError, match="--max-cost: .*--judge-price"):
        Budget(None, 1.0)
    assert Budget(None, None).spent is None and Budget(None, None).reserve(0.0)
