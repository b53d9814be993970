"""Model folders: weights as safetensors and, beside them, what is needed to rebuild the module.

    FOLDER/model.safetensors    every tensor of the module
    FOLDER/model.json           format, role, model config, and what the caller adds (tokenizer identity, template, ...)

A folder that belongs to a checkpoint says so (`"sealed": true`) and is compared with its manifest on every load.
Loads are strict: keys may be missing only where a role is started from another one, and then exactly its new head.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config.configs import resolved
from config.model_configs import PRESETS, ModelConfig, model_config_from_dict
from config.user_error import UserError
from models.lora import init_adapters, is_adapter, merge_adapters
from utils.runs.manifest import check_files

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

Model = TypeVar("Model", bound=nn.Module)

# Which saved roles a role can start from.
_STARTS_FROM = {"lm": ("lm",), "reward": ("reward", "lm"), "critic": ("critic", "reward", "lm")}
_STAGE_OF_ROLE = {"lm": "an SFT or PPO model", "reward": "a reward model", "critic": "a critic"}


def save_model(model: nn.Module, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a model folder; `extra` entries stand beside the model config in model.json.

    Raises:
        OSError: it cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile prefixes every key, which no plain model could read
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_tensors(state, folder / WEIGHTS)
    description = {"format": FORMAT, "role": model.role, "model": resolved(model.config), **(extra or {})}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as safetensors, from their own memory, without a copy; OSError where that fails."""
    path.touch()
    mode = path.stat().st_mode  # as this process makes files; safetensors' own could be read by nobody else
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(mode)


def describe(folder: Path) -> dict[str, Any]:
    """model.json of a folder.

    Raises:
        UserError: there is none, or it is not ours.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if not (isinstance(description, dict) and isinstance(description.get("model"), dict)):
            raise ValueError("it has no model config")
        if description.get("role") not in tuple(_STARTS_FROM):
            raise ValueError(f"role {description.get('role')!r} is none of {', '.join(_STARTS_FROM)}")
    except FileNotFoundError:
        raise UserError(f"{folder}: no {DESCRIPTION} there; give a run folder or a checkpoint folder in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model description ({error}); take another checkpoint of the run") from None
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {description.get('format')!r}, this code reads {FORMAT}; use the version that wrote it"
        )
    check_files(path.parent, (DESCRIPTION,), bool(description.get("sealed")))
    return description


def saved_config(folder: Path) -> ModelConfig:
    """The config of the model in a folder; UserError where there is none."""
    return model_config_from_dict(describe(folder)["model"], str(folder / DESCRIPTION))


def load_model(cls: type[Model], folder: Path, config: ModelConfig | None = None, adapters: str = "keep") -> Model:
    """Load a model folder into role `cls`.

    Args:
        cls: the class to build, for example GPTCritic from a reward model's folder.
        folder: where `save_model` wrote.
        config: preset whose adapters, dropout and memory options are wanted (the sizes are the folder's); None: as
            saved.
        adapters: "keep" goes on with the saved adapters when rank and alpha agree; "fresh" merges them into the weights
            and adds new ones, so that the model with adapters off is exactly the saved one. Both give a plain model
            when `config` has no LoRA.

    Raises:
        UserError: not a model folder, a preset of another model, a role that cannot start from it, or tensors that are
            missing, unexpected, of the wrong shape or not finite.
    """
    if adapters not in ("keep", "fresh"):
        raise ValueError(f'adapters is "keep" or "fresh", not {adapters!r}')
    folder = Path(folder)
    description = describe(folder)
    saved_role = description["role"]
    if saved_role not in _STARTS_FROM[cls.role]:
        wanted = " or ".join(_STAGE_OF_ROLE[r] for r in _STARTS_FROM[cls.role])
        raise UserError(f"{folder}: holds {_STAGE_OF_ROLE[saved_role]}; {wanted} is needed here")
    saved = model_config_from_dict(description["model"], str(folder / DESCRIPTION))
    if saved.family != cls.family:
        raise UserError(f"{folder}: holds a model of family {saved.family}; one of {cls.family} is needed here")
    # A model whose sizes came from elsewhere takes the options of any preset.
    if config is not None and config.stem != saved.stem and saved.name in PRESETS:
        raise UserError(
            f"{folder}: holds a {saved.stem}, not a {config.stem}; "
            f"give --config {saved.stem} or one of its variants"
        )
    config = saved if config is None else saved.with_options(config)
    path = folder / WEIGHTS
    check_files(folder, (WEIGHTS,), bool(description.get("sealed")))
    state = _read_weights(path)
    remedy = f"does not fit its {DESCRIPTION}; take another checkpoint of the run"
    new_head = saved_role == "lm"
    if new_head and cls.role != "lm":
        state = {key: value for key, value in state.items() if key not in cls.only_for_language}
    same_adapters = (saved.lora_rank, saved.lora_alpha) == (config.lora_rank, config.lora_alpha)
    if saved.lora_rank and (adapters == "fresh" or not same_adapters):
        _check_keys(_skeleton(cls, saved), state, f"{path}: {remedy}", new_head)
        state = merge_adapters(state, saved.lora_scaling)
        saved = replace(saved, lora_rank=0)
    return build(cls, config, state, f"{path}: {remedy}", new_head, new_adapters=config.lora_rank > saved.lora_rank)


def build(
    cls: type[Model],
    config: ModelConfig,
    state: dict[str, Tensor],
    complaint: str,
    new_head: bool = False,
    new_adapters: bool = False,
) -> Model:
    """`cls(config)` on the CPU, holding `state`.

    Args:
        cls, config: what to build.
        state: tensors by name, all that the model has and no others; only the head of a new role (`new_head`) and new
            adapters (`new_adapters`) are not in it and get the random start that the class gives them.
        complaint: start of the error message: what file it is and what to do.

    Raises:
        UserError: tensors are missing, unexpected or of the wrong shape.
    """
    model = _skeleton(cls, config)
    new = _check_keys(model, state, complaint, new_head, new_adapters)
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    if any(key.startswith("head.") for key in new):
        model.head.reset_parameters()
    if any(is_adapter(key) for key in new):
        init_adapters(model)
    return model


def _skeleton(cls: type[Model], config: ModelConfig) -> Model:
    """The module without memory: drawing random numbers for every weight takes longer than reading them."""
    with torch.device("meta"):
        return cls(config)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is incomplete, take another one of the run") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); take another checkpoint of the run") from None
    check_finite(state, f"{path}: holds NaN or infinity; take an earlier checkpoint of the run")
    return state


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and values of all parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_finite(state: dict[str, Tensor], complaint: str) -> None:
    """Refuse weights that would make every output NaN.

    Raises:
        UserError: `complaint` and the first tensor with a NaN or an infinity.
    """
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{complaint} (tensor {key})")


def _check_keys(
    model: nn.Module, state: dict[str, Tensor], complaint: str, new_head: bool, new_adapters: bool = False
) -> set[str]:
    """The names of the new tensors, which `state` must not have; it must have all others. See `build`."""
    own = model.state_dict()
    new = {k for k in own if (new_head and k.startswith("head.")) or (new_adapters and is_adapter(k))}
    old = set(own) - new

    def form(tensor: Tensor) -> tuple[torch.Size, bool]:
        return tensor.shape, tensor.is_floating_point()

    wrong = {k for k in old if k in state and form(own[k]) != form(state[k])}
    faults = {"missing": old - set(state), "unexpected": set(state) - old, "wrong shape or type": wrong}
    if any(faults.values()):
        told = (
            f"{what} {', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''}"
            for what, keys in faults.items()
            if keys
        )
        raise UserError(f"{complaint} ({'; '.join(told)})")
    return new
