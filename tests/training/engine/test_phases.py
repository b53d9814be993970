"""Clocks of a run's phases."""

import time

import pytest

from training.engine.phases import Phases


def test_shares_add_up_and_rates_are_tokens_over_seconds() -> None:
    phases = Phases(lambda: None)
    for tokens in (100, 50):
        with phases("rollout"):
            time.sleep(0.02)
        for _ in range(2):  # a phase in pieces
            with phases("update"):
                time.sleep(0.02)
        figures = phases.end_round(tokens)
        spent = figures["time/rollout_s"] + figures["time/update_s"]
        assert 0.06 <= spent < 1
        assert figures["time/update_share"] + figures["time/rollout_share"] == pytest.approx(1)
        assert figures["time/update_share"] > 0.5
        assert figures["time/tokens_per_s"] == pytest.approx(tokens / spent)
        assert figures["time/rollout_tokens_per_s"] == pytest.approx(tokens / figures["time/rollout_s"])
    words = phases.summary()
    assert words.count("tokens/s") == 3 and "rollout" in words and "update" in words
    shares = [int(word.rstrip("%")) for word in words.split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_the_device_is_waited_for_at_both_ends_of_a_phase() -> None:
    told = []
    phases = Phases(lambda: told.append("wait"))
    with phases("update"):
        told.append("work")
    assert told == ["wait", "work", "wait"]


def test_a_phase_that_fails_is_counted_and_nothing_says_nothing() -> None:
    phases = Phases(lambda: None)
    assert phases.summary() == ""
    with pytest.raises(KeyError), phases("score"):
        raise KeyError
    assert phases.end_round(0)["time/score_share"] == 1
