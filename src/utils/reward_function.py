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

    The wrapped function raises a UserError when the function raises, or returns anything but one finite number per response.
    """
    path, colon, name = spec.rpartition(":")
    file = Path(path)
    if not colon or not file.is_file():
        raise UserError(f"{flag} {spec}: give FILE.py:FUNCTION, with a file that exists")
    module_spec = importlib.util.spec_from_file_location(f"reward_function_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
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
            raise UserError(
                f"{flag} {spec}: the function failed: {type(error).__name__}: {error}; it must return one float per response"
            ) from error
        if len(scores) != len(responses):
            raise UserError(
                f"{flag} {spec}: {len(scores)} scores for {len(responses)} responses; it must return one float per response"
            )
        bad = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise UserError(
                f"{flag} {spec}: score {scores[bad]} for response {bad} ({responses[bad][:60]!r}); scores must be finite"
            )
        return scores

    return checked
