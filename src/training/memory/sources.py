"""The sizes of the models a run starts from, read from descriptions beside the weights and never from the weights."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from config.configs import GPTConfig, PPOConfig, RunConfig, SFTConfig, get_configs, model_config_from_dict
from config.user_error import UserError
from models.weights.checkpoint import DESCRIPTION, describe
from training.memory.plan import Sources
from training.start import our_checkpoint, reward_source
from training.storage.resuming import Resumption
from utils.runs.finding import find_checkpoint
from utils.tokenizer import get_tokenizer


def plan_sources(config: RunConfig, resumption: Resumption | None = None) -> Sources:
    """Sizes of the models that a run starts from.

    UserError where one is not there; with --plan its sizes are then the preset's, and a note says so.
    """
    preset = get_configs(config.config)
    if isinstance(config, SFTConfig):
        return _sft_sources(config, preset, resumption)
    argument, flag = (config.actor, "-a") if isinstance(config, PPOConfig) else (config.pretrain, "-p")
    origins = {key: str(folder or "") for key, folder in resumption.origins.items()} if resumption else {}
    notes: list[str] = []
    sft = (_saved(origins.get("sft") or argument, flag, config, notes) or preset).with_options(preset)
    reward = None
    if isinstance(config, PPOConfig):
        wanted = origins.get("rm", reward_source(config)[0]) or "none"
        reward = None if wanted == "none" else _saved(wanted, "-c", config, notes) or sft
    return Sources(sft, reward, tuple(notes))


def _saved(argument: str, flag: str, config: RunConfig, notes: list[str]) -> GPTConfig | None:
    """The model config that a checkpoint was saved with; None, and a note, when a plan is made ahead of it."""
    try:
        folder = find_checkpoint(argument, config.runs_dir, flag)
    except UserError:
        if not config.plan:
            raise
        notes.append(f"{flag} {argument} is not there yet: planned with the sizes of {config.config}")
        return None
    return _described(folder)


def _described(folder: Path) -> GPTConfig:
    return model_config_from_dict(describe(folder)["model"], str(folder / DESCRIPTION))


def _sft_sources(config: SFTConfig, preset: GPTConfig, resumption: Resumption | None) -> Sources:
    if resumption is not None:
        return Sources(_described(resumption.checkpoint).with_options(preset))
    if config.pretrain == "scratch":
        rows = preset.vocab_size if config.tokenizer == "auto" else get_tokenizer(config.tokenizer).vocab_size
        return Sources(replace(preset, vocab_size=rows, embedding_rows=rows))
    folder = our_checkpoint(config)
    if folder is not None:
        return Sources(_described(folder).with_options(preset))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UserError):  # loading it tells what is wrong
        found = json.loads((Path(config.pretrain) / "config.json").read_text())
        sizes = GPTConfig(
            name=config.pretrain, n_layer=found["n_layer"], n_head=found["n_head"], n_embd=found["n_embd"],
            block_size=found["n_positions"], vocab_size=found["vocab_size"],
        )  # fmt: skip
        return Sources(sizes.with_options(preset))
    if config.pretrain in ("huggingface", preset.family):
        return Sources(preset)
    note = f"-p {config.pretrain} is not on this disk: planned with the sizes of {config.config}"
    return Sources(preset, notes=(note,))
