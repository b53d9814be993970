"""Command lines made from dataclasses by tyro: any script's, and that of a stage."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import tyro

from config.configs import StageConfig, flag_of, stage_defaults
from config.user_error import UserError

Flags = TypeVar("Flags")
Recorded = Callable[[type[StageConfig], dict[str, str]], StageConfig | None]

_SHORT = {
    "-n": "name", "-s": "strategy", "-b": "batch_size", "-p": "pretrain", "-a": "actor", "-c": "critic",
}  # fmt: skip
_NARROWEST = 20  # columns; tyro breaks the lines of narrower help texts for ever


class WrongFlags(UserError):
    """What tyro says of a command line that is wrong: the text of its box, on one line."""


def flags_of(kind: type[Flags], argv: list[str] | None, description: str, **options: Any) -> Flags:
    """A command line as the dataclass `kind`, by `tyro.cli` with these options.

    Raises:
        WrongFlags: an unknown flag or a bad value.
        SystemExit: with 0, after `--help`.
    """
    stderr = io.StringIO()
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=argv, description=description, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box with a title; the contract is one line.
        raise WrongFlags("".join(" " if c in "─│╭╮╰╯┄" else c for c in stderr.getvalue())) from None


def parse_cli(stage: type[StageConfig], argv: list[str] | None = None, recorded: Recorded | None = None) -> StageConfig:
    """Parse a stage's command line. The defaults, shown by --help and used, are those of the preset that `--config`
    names, or with --resume the settings of the run that goes on, as `recorded` finds them.

    Args:
        recorded: takes the stage's dataclass and the flags that are given, each with the word behind it
            (`{"resume": "auto", "batch_size": "8"}`); returns the settings of the run, None where none goes on.

    Raises:
        UserError: an unknown flag (the message lists the flags), a bad value, or a value out of range.
        SystemExit: with 0, after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _reject_unknown_flags(stage, argv)
    given = _given(argv)
    defaults = recorded(stage, given) if recorded is not None and given.get("resume") else None
    if defaults is None:
        defaults = stage_defaults(stage, given.get("config") or stage.config)
    if "batch_size" in given and "tokens_per_micro_batch" not in given:
        defaults = replace(defaults, tokens_per_micro_batch=0)  # whoever counts rows does not mean tokens
    return _with_passes_within_a_step(_parsed(stage, argv, defaults), told="batch_size" in given)


def config_of_record(stage: type[StageConfig], values: dict[str, Any], where: str) -> StageConfig:
    """A configuration as `resolved` gave it and JSON kept it, checked as on a command line.

    What the record lacks has today's default; settings that there are no longer are left out. UserError for a value
    that is none of the setting's; it begins with `where`.
    """
    words = [_in_words(f.name, values[f.name]) for f in fields(stage) if f.name in values]
    try:
        return _parsed(stage, words, stage_defaults(stage, str(values.get("config", stage.config))))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _in_words(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(field if value else f"no_{field}")
    return f"{flag_of(field)}={value}"


def _given(argv: list[str]) -> dict[str, str]:
    """The fields whose flags stand on a command line, and the word behind each; the last one counts, as for tyro."""
    given = {}
    for word, following in zip(argv, [*argv[1:], ""]):
        if word[:2] in _SHORT:
            given[_SHORT[word[:2]]] = word[2:].removeprefix("=") or following
        elif word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            given[flag.replace("-", "_")] = value if equals else following
    return given


def _parsed(stage: type[StageConfig], argv: list[str], defaults: StageConfig) -> StageConfig:
    """`flags_of` with what is wrong in fewer words."""
    try:
        return flags_of(stage, argv, stage.__doc__, default=defaults)
    except WrongFlags as error:
        words = re.sub(r"-{5,}", "", str(error)).strip()
        words = re.sub(r"^(Parsing|Value|Missing|Invalid|Unrecognized) (error|argument|choice|options) ", "", words)
        words = words.removeprefix("Error parsing ")
        raise UserError(re.split(" (?:For full|Argument) helptext", words)[0].strip()) from None


def _with_passes_within_a_step(config: StageConfig, told: bool) -> StageConfig:
    """The configuration with -b of at most --global-batch-size: more rows than a step has make no larger pass."""
    step = config.global_batch_size
    if config.batch_size <= step:
        return config
    if told:
        print(f"--batch-size {config.batch_size}: a step has --global-batch-size {step}, so passes are of {step}")
    return replace(config, batch_size=step)


def _reject_unknown_flags(stage: type, argv: list[str]) -> None:
    flags = [flag_of(f.name) for f in fields(stage)]
    short = [word for word, field in _SHORT.items() if flag_of(field) in flags]
    known = set(flags) | {"--no-" + f[2:] for f in flags} | set(short) | {"-h", "--help"}
    for word in argv:
        flag = word.split("=", 1)[0].replace("_", "-")
        looks_like_flag = word.startswith("--") or (len(word) == 2 and word[0] == "-" and word[1].isalpha())
        if looks_like_flag and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f" did you mean {near[0]}?" if near else ""
            raise UserError(f"{flag}: no such flag;{hint} there are {', '.join(short + sorted(flags))}")
