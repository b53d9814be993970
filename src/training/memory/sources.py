"""The sizes of the models a run starts from, read from descriptions beside the weights and never from the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from config.configs import PPOConfig, RunConfig, SFTConfig
from config.model_configs import HUB_NAMES, PRESETS, ModelConfig, get_configs, model_config_from_dict
from config.user_error import UserError
from models.weights.checkpoint import DESCRIPTION, describe
from models.weights.huggingface import describe_pretrained
from models.weights.pretrained import our_checkpoint
from training.memory.plan import Sources
from training.start import check_family, hub_source, pretrained_tokenizer, reward_source, saved_by
from training.storage.resuming import Resumption
from utils.hub import is_hub_name
from utils.runs.finding import runs_named
from utils.runs.folder import typed_path
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


def _saved(argument: str, flag: str, config: RunConfig, notes: list[str]) -> ModelConfig | None:
    """The model config that a checkpoint was saved with; None, and a note, when a plan is made ahead of it."""
    try:
        folder = saved_by("train_rm.py" if flag == "-c" else "train_sft.py", argument, config.runs_dir, flag)
    except UserError:
        if not config.plan or Path(argument).exists() or is_hub_name(argument) or runs_named(argument, config.runs_dir):
            raise
        notes.append(f"{flag} {argument} is not there yet: planned with the sizes of {config.config}")
        return None
    saved = _described(folder)
    if config.plan and saved.name in PRESETS and saved.stem != get_configs(config.config).stem:
        # The default means the demo's model, where there is one; whoever asks about another preset does not.
        notes.append(f"{flag} {argument} holds a {saved.stem}: planned with the sizes of {config.config}")
        return None
    return saved


def _described(folder: Path) -> ModelConfig:
    return model_config_from_dict(describe(folder)["model"], str(folder / DESCRIPTION))


def _sft_sources(config: SFTConfig, preset: ModelConfig, resumption: Resumption | None) -> Sources:
    if resumption is not None:
        return Sources(_described(resumption.checkpoint).with_options(preset))
    if config.pretrain == "scratch":
        rows = preset.vocab_size if config.tokenizer == "auto" else get_tokenizer(config.tokenizer).vocab_size
        return Sources(replace(preset, vocab_size=rows, embedding_rows=rows))
    source = hub_source(config)
    folder = our_checkpoint(source, config.runs_dir, "-p") if config.pretrain != "huggingface" else None
    if folder is not None:
        return Sources(_described(folder).with_options(preset))
    try:
        found = describe_pretrained(source, cached_only=True)
    except UserError:
        if typed_path(source).exists():
            raise
        missing = f"-p {config.pretrain} is not on this disk: planned with the sizes of {config.config}"
        return Sources(preset, notes=() if source == HUB_NAMES[preset.stem] else (missing,))
    check_family(found, preset)
    tokenizer, note = pretrained_tokenizer(config, found)
    notes = tuple(filter(None, (found.note, note))) if config.plan else ()  # a run tells them where it loads the model
    return Sources(found.sizes(tokenizer.vocab_size).with_options(preset), notes=notes)
