"""Rewards written in Python: `FILE.py:FUNCTION`, called with the texts of prompts and responses."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config.user_error import UserError
from utils.runs.folder import typed_path
from utils.user_module import import_user_file

RewardFunction = Callable[[Sequence[str], Sequence[str]], list[float]]

TELL_EVERY = 30.0
"""Seconds between lines on stderr while a reward function is at work."""

_MOVED = {r"(^|/)utils/demo_gold\.py:": r"\1utils/demo/gold.py:"}
"""Files of this repository under the names that commands and runs of earlier days have for them."""

_LARGEST = 3.4e38  # what single precision holds


class NonFiniteReward(UserError):
    """A reward function gave a number that is none; `scores` are all that it gave."""

    def __init__(self, message: str, scores: list[float]):
        super().__init__(message)
        self.scores = scores


def moved(spec: str) -> str:
    """`FILE.py:FUNCTION` under the name that a file of this repository has today; any other as it is."""
    for then, now in _MOVED.items():
        spec = re.sub(then, now, spec)
    return spec


def load_reward_function(spec: str, flag: str) -> RewardFunction:
    """Import `FILE.py:FUNCTION` and wrap it so that what it returns is checked.

    Args:
        spec: file, against the working directory, and the name of a function in it that takes (prompts, responses), two
            lists of texts, and returns one number per response.
        flag: named in the errors.

    Returns:
        A function that raises UserError when the user's raises or returns anything but one number per response, and
        NonFiniteReward (which is one) when a number is not finite. While it works, a line on stderr tells every
        `TELL_EVERY` seconds what is being waited for.

    Raises:
        UserError: the file cannot be imported or has no such function.
    """
    path, _, name = spec.rpartition(":")
    file = typed_path(path)
    if not file.is_file():
        file = typed_path(moved(spec).rpartition(":")[0])
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{flag} {spec}: give FILE.py:FUNCTION, with a file that exists")
    surroundings = _Surroundings()
    try:
        with surroundings:
            module = import_user_file(file)
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag} {spec}: importing {file} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{flag} {spec}: {file} has no function {name}; it must take (prompts, responses) and return one float each"
        )
    if reason := _unusable(function):
        raise UserError(f"{flag} {spec}: {reason}; it must take (prompts, responses) and return one float each")

    def checked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        try:
            with surroundings, _telling(f"{flag} {spec}", len(responses)):
                scores = _numbers(function(list(prompts), list(responses)))
        except _WrongKind as error:
            raise UserError(f"{flag} {spec}: {error}; it must return one float per response") from None
        except (Exception, SystemExit) as error:  # exit(0) in it would end the run as if all were well
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{flag} {spec}: failed with {reason}; it must return one float per response") from error
        if len(scores) != len(responses):
            raise UserError(
                f"{flag} {spec}: gave {len(scores)} scores for {len(responses)} responses; it must give one float each"
            )
        for response, score in zip(responses, scores):
            if not abs(score) <= _LARGEST:
                message = f"{flag} {spec}: gave {score} for {response[:60]!r}; scores must be finite"
                raise NonFiniteReward(message, scores)
        return scores

    return checked


class _Surroundings:
    """A context in which the user's code may change the working folder, sys.path and PyTorch's defaults: it finds them
    as it left them, and the rest of the run as they were."""

    def __init__(self) -> None:
        self._theirs = _surroundings()

    def __enter__(self) -> None:
        self._ours, self._grad = _surroundings(), torch.is_grad_enabled()
        _set_surroundings(*self._theirs)

    def __exit__(self, *_: object) -> None:
        self._theirs = _surroundings()
        _set_surroundings(*self._ours)
        torch.set_grad_enabled(self._grad)  # a line at the top of many files of reward models turns it off


def _surroundings() -> tuple[str, list[str], torch.dtype]:
    return os.getcwd(), sys.path[:], torch.get_default_dtype()


def _set_surroundings(folder: str, path: list[str], dtype: torch.dtype) -> None:
    os.chdir(folder)
    sys.path[:] = path
    torch.set_default_dtype(dtype)


class _WrongKind(TypeError):
    """A reward function gave something else than one number per response."""


def _unusable(function: Callable[..., Any]) -> str:
    """Why something that can be called is no reward function, as far as can be told without a call; "" if it may be."""
    if inspect.isclass(function):
        return f"{function.__name__} is a class; name a function, or an object of that class with __call__"
    if any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, function.__call__)):
        return "is an async function, which gives no numbers when it is called; take asyncio.run inside a plain one"
    try:
        inspect.signature(function).bind([], [])
    except TypeError:
        return f"takes {inspect.signature(function)}"
    except ValueError:  # some functions written in C have no signature
        pass
    return ""


def _numbers(given: Any) -> list[float]:
    """What a reward function returned as floats, [B].

    Anything that holds numbers in an order will do: lists, tuples, generators, arrays and tensors [B] or [B, 1], of
    numbers of any kind. A text is no number, even if it reads like one; a set has no order, and a dict has names.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | Set) or _rank(given) == 0:
        raise _WrongKind(f"returned {_kind(given)} for all responses")
    scores = []
    for i, score in enumerate(given, start=1):
        if isinstance(score, np.ndarray | torch.Tensor) and len(score.reshape(-1)) == 1:
            score = score.item()
        if isinstance(score, str) or _rank(score) or not hasattr(type(score), "__float__"):
            raise _WrongKind(f"returned {_kind(score)} for response {i}")
        scores.append(float(score))
    return scores


def _rank(value: Any) -> int | None:
    """The number of axes of an array or a tensor; None for anything else."""
    return getattr(value, "ndim", None)


def _kind(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None or isinstance(value, str | bytes | int | float):
        return repr(value)[:40]
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


@contextlib.contextmanager
def _telling(name: str, count: int) -> Iterator[None]:
    """Tells on stderr from time to time that the body is still at work, so that nothing hangs in silence.

    The user's function itself stays in the main thread, where it may use signals; another one watches the clock.
    """
    done, started = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(TELL_EVERY):
            waited = time.monotonic() - started
            tqdm.write(f"waiting for {name}: {waited:.0f} s so far for {count} responses", file=sys.stderr)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
