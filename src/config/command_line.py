"""Command lines made from dataclasses by tyro: any script's, and that of a stage."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from dataclasses import fields, replace
from typing import Any, TypeVar

import tyro

from config.configs import PPOConfig, StageConfig, flag_of, stage_defaults
from config.user_error import UserError

Flags = TypeVar("Flags")


class WrongFlags(UserError):
    """What tyro says of a command line that is wrong: the text of its box, on one line."""


def flags_of(kind: type[Flags], argv: list[str] | None, description: str, **options: Any) -> Flags:
    """A command line as the dataclass `kind`, by `tyro.cli` with these options.

    Raises:
        WrongFlags: an unknown flag or a bad value.
        SystemExit: with 0, after `--help`.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=argv, description=description, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box with a title; the contract is one line.
        raise WrongFlags("".join(" " if c in "─│╭╮╰╯┄" else c for c in stderr.getvalue())) from None


def parse_cli(stage: type[StageConfig], argv: list[str] | None = None) -> StageConfig:
    """Parse a stage's command line; the defaults shown and used are those of the preset that `--config` names.

    Raises:
        UserError: an unknown flag (the message lists the flags), a bad value, or a value out of range.
        SystemExit: with 0, after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _reject_unknown_flags(stage, argv)
    preset = stage.config
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            preset = argv[i + 1]
        elif word.startswith("--config="):
            preset = word.split("=", 1)[1]
    defaults = stage_defaults(stage, preset)
    given = {word.split("=", 1)[0].replace("_", "-") for word in argv}
    if given & {"-b", "--batch-size"} and "--tokens-per-micro-batch" not in given:
        defaults = replace(defaults, tokens_per_micro_batch=0)  # whoever counts rows does not mean tokens
    try:
        config = flags_of(stage, argv, stage.__doc__, default=defaults)
    except WrongFlags as error:
        words = re.sub(r"-{5,}", "", str(error)).strip()
        words = re.sub(r"^(Parsing|Value|Missing|Invalid|Unrecognized) (error|argument|choice|options) ", "", words)
        words = words.removeprefix("Error parsing ")
        raise UserError(re.split(" (?:For full|Argument) helptext", words)[0].strip()) from None
    return _with_passes_within_a_step(config, told=bool(given & {"-b", "--batch-size"}))


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
    short = ["-n", "-s", "-b"] + (["-a", "-c"] if stage is PPOConfig else ["-p"])
    known = set(flags) | {"--no-" + f[2:] for f in flags} | set(short) | {"-h", "--help"}
    for word in argv:
        flag = word.split("=", 1)[0].replace("_", "-")
        looks_like_flag = word.startswith("--") or (len(word) == 2 and word[0] == "-" and word[1].isalpha())
        if looks_like_flag and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f" did you mean {near[0]}?" if near else ""
            raise UserError(f"{flag}: no such flag;{hint} there are {', '.join(short + sorted(flags))}")
