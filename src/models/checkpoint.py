"""Model folders: weights as safetensors and, beside them, what is needed to rebuild the module.

    FOLDER/model.safetensors    every tensor of the module
    FOLDER/model.json           format, role, model config, and what the caller adds (tokenizer identity, prompt template, ...)

Loads are strict: keys may be missing only where a role is started from another one, and then exactly its new head.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from config.configs import GPTConfig, model_config_from_dict, resolved
from config.user_error import UserError
from models.lora import is_adapter, merge_lora

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

Model = TypeVar("Model", bound=nn.Module)

# Which saved roles a role can start from.
_STARTS_FROM = {"lm": ("lm",), "reward": ("reward", "lm"), "critic": ("critic", "reward", "lm")}
_STAGE_OF_ROLE = {"lm": "an SFT or PPO model", "reward": "a reward model", "critic": "a critic"}


def save_model(model: nn.Module, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a model folder; `extra` entries stand beside the model config in model.json."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    description = {"format": FORMAT, "role": model.role, "model": resolved(model.config), **(extra or {})}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def describe(folder: Path) -> dict[str, Any]:
    """model.json of a folder.

    Raises:
        UserError: there is none, or it is not ours.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if (
            not (isinstance(description, dict) and isinstance(description.get("model"), dict))
            or description.get("role") not in _STARTS_FROM
        ):
            raise ValueError("it lacks role or model")
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {DESCRIPTION} there; give a run folder, or a checkpoint folder inside it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model description ({error}); take another checkpoint of the run") from None
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {description.get('format')!r}, this code reads {FORMAT}; use the version that wrote it"
        )
    return description


def load_model(cls: type[Model], folder: Path, config: GPTConfig | None = None, adapters: str = "keep") -> Model:
    """Load a model folder into role `cls`.

    Args:
        cls: the class to build, for example GPTCritic from a reward model's folder.
        folder: where `save_model` wrote.
        config: preset whose adapters, dropout and memory options are wanted (the sizes are the folder's); None: as saved.
        adapters: "keep" goes on with the saved adapters when rank and alpha agree; "fresh" merges them into the weights and adds new
            ones, so that the model with adapters off is exactly the saved one. Both give a plain model when `config` has no LoRA.

    Raises:
        UserError: not a model folder, a preset of another model, a role that cannot start from it, or tensors that are missing, unexpected,
            of the wrong shape or not finite.
    """
    folder = Path(folder)
    description = describe(folder)
    saved_role = description["role"]
    if saved_role not in _STARTS_FROM[cls.role]:
        wanted = " or ".join(_STAGE_OF_ROLE[r] for r in _STARTS_FROM[cls.role])
        raise UserError(f"{folder}: holds {_STAGE_OF_ROLE[saved_role]}; {wanted} is needed here")
    saved = model_config_from_dict(description["model"], str(folder / DESCRIPTION))
    if config is not None and config.family != saved.family:
        raise UserError(
            f"{folder}: holds a {saved.family}, not a {config.family}; give --config {saved.family} or one of its variants"
        )
    config = saved if config is None else saved.with_options(config)
    state = _read_weights(folder / WEIGHTS)
    same_adapters = (saved.lora_rank, saved.lora_alpha) == (config.lora_rank, config.lora_alpha)
    if saved.lora_rank and (adapters == "fresh" or not same_adapters):
        loaded = cls(saved)
        _load_strictly(loaded, state, folder, new_head=saved_role == "lm")
        state = merge_lora(loaded).state_dict()
        saved = replace(saved, lora_rank=0)
        if saved_role == "lm":
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
    model = cls(config)
    _load_strictly(model, state, folder, new_head=saved_role == "lm", new_adapters=config.lora_rank > saved.lora_rank)
    return model


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is incomplete, take another one of the run") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); take another checkpoint of the run") from None
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: tensor {key} holds NaN or infinity; take an earlier checkpoint of the run")
    return state


def _load_strictly(model: nn.Module, state: dict, folder: Path, new_head: bool, new_adapters: bool = False) -> None:
    """Load `state`; only a new role's head and freshly added adapters may be missing, and nothing may be left over."""
    own = model.state_dict()
    may_miss = {k for k in own if (new_head and k.startswith("head.")) or (new_adapters and is_adapter(k))}
    missing, unexpected = set(own) - set(state) - may_miss, set(state) - set(own)
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        parts = [
            f"{what} {', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
            if keys
        ]
        raise UserError(
            f"{folder / WEIGHTS}: does not fit its {DESCRIPTION}: {'; '.join(parts)}; take another checkpoint of the run"
        )
    model.load_state_dict(state, strict=False)
