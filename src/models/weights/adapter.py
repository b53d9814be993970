"""A LoRA adapter in the form of the PEFT library, merged into the weights of the model that it was trained beside.

Only what merges exactly is read: plain low-rank products on the projections of a block.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config.user_error import UserError
from models.weights.form import HuggingFaceForm
from models.weights.pretrained import ADAPTER_CONFIG

_WEIGHTS = "adapter_model.safetensors"
# Settings under which a merge is W + scale * B A, and what they must be.
_PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "modules_to_save": (None, []), "layer_replication": (None,),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "revision": (None, "main"),
    "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip
_REMEDY = "merge it with PEFT, merge_and_unload().save_pretrained(FOLDER), and give that folder"


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: its folder, the folder or hub name of its base model, rank, and the factor before B A."""

    folder: Path
    base: str
    rank: int
    scale: float


def read_adapter(folder: Path, name: str) -> Adapter:
    """The settings of an adapter, from its adapter_config.json.

    Raises:
        UserError: it cannot be read, names no base model, or cannot be merged exactly by this code.
    """
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        rank = int(settings["r"])
        scale = float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        adapter = Adapter(folder, str(settings["base_model_name_or_path"] or ""), rank, scale)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"-p {name}: its {ADAPTER_CONFIG} is not that of a LoRA adapter; {_REMEDY}") from None
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise UserError(f"-p {name}: is an adapter with {key} {settings[key]!r}; {_REMEDY}")
    return adapter


def merge_adapter(weights: dict[str, Tensor], adapter: Adapter, name: str, form: HuggingFaceForm) -> None:
    """Add an adapter's products to the weights of a language model by our names, in place.

    PEFT holds A [r, in] and B [out, r] and we [out, in], whatever `fan_in_fan_out` says.

    Raises:
        UserError: the adapter's weights cannot be read or are not those of this model's projections.
    """
    try:
        factors = load_file(adapter.folder / _WEIGHTS)
    except (OSError, SafetensorError):
        raise UserError(f"-p {name}: its {_WEIGHTS} is missing or damaged; {_REMEDY}") from None
    factor = re.compile(
        rf"base_model\.model\.(?:{re.escape(form.trunk)})?({form.projections})\.lora_([AB])(?:\.default)?\.weight"
    )
    places: dict[str, dict[str, Tensor]] = {}
    for key, value in factors.items():
        match = factor.fullmatch(key)
        if match is None:
            raise UserError(f"-p {name}: is an adapter with {key}, which is no factor of a projection; {_REMEDY}")
        places.setdefault(f"{form.trunk}{match[1]}.weight", {})[match[2]] = value.float()
    for key, pair in places.items():
        a, b, weight = pair.get("A"), pair.get("B"), weights.get(key)
        shapes = ((adapter.rank, weight.shape[1]), (len(weight), adapter.rank)) if weight is not None else None
        if a is None or b is None or (a.shape, b.shape) != shapes:
            raise UserError(f"-p {name}: its factors of {key} do not fit its base model {adapter.base}; {_REMEDY}")
        weights[key] = weight + adapter.scale * (b @ a)
