"""Rewards written in Python: `FILE.py:FUNCTION`, called with the texts of prompts and responses."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from config.user_error import UserError

RewardFunction = Callable[[Sequence[str], Sequence[str]], list[float]]


def load_reward_function(spec: str, flag: str) -> RewardFunction:
    """Import `FILE.py:FUNCTION` and wrap it so that what it returns is checked.

    Args:
        spec: file, against the working directory, and the name of a function in it that takes (prompts, responses), two
            lists of texts, and returns one number per response.
        flag: named in the errors.

    Returns:
        A function that raises UserError when the user's raises, or returns anything but one finite number per response.

    Raises:
        UserError: the file cannot be imported or has no such function.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{flag} {spec}: give FILE.py:FUNCTION, with a file that exists")
    module_spec = importlib.util.spec_from_file_location(f"reward_function_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles in the file look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag} {spec}: importing {file} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{flag} {spec}: {file} has no function {name}; it must take (prompts, responses) and return one float each"
        )

    def checked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in function(list(prompts), list(responses))]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{flag} {spec}: failed with {reason}; it must return one float per response") from error
        if len(scores) != len(responses):
            raise UserError(
                f"{flag} {spec}: gave {len(scores)} scores for {len(responses)} responses; it must give one float each"
            )
        for response, score in zip(responses, scores):
            if not math.isfinite(score):
                raise UserError(f"{flag} {spec}: gave {score} for {response[:60]!r}; scores must be finite")
        return scores

    return checked
