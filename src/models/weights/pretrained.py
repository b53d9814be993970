"""What a model argument means: one of our checkpoints or a model in Hugging Face's form; and what a folder that is
neither holds, with the remedy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from config.user_error import UserError
from utils.hub import LFS_POINTER, is_hub_name, is_lfs_pointer
from utils.runs.finding import find_checkpoint
from utils.runs.folder import typed_path
from utils.runs.manifest import MANIFEST

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# What transformers reads, the first that is there.
_READ = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Of the right form, and not read as they are in a folder.
_MISPLACED = {
    **dict.fromkeys(
        ("*-of-*.safetensors", "pytorch_model-*-of-*.bin"),
        "one of several parts, and their index (a file of the name *.index.json) is missing; copy it too",
    ),
    **dict.fromkeys(_WEIGHTS, "a link to nothing, a folder, or of a name that is not read; copy the file itself"),
}
# Weights that are not read, and where those that are come from.
_OTHER_WEIGHTS = {
    "*.gguf": "a GGUF file (llama.cpp's form); give that file where it is a LLaMA's, else the model it was made from",
    "tf_model*.h5": "weights for TensorFlow; take model.safetensors from where the folder came from",
    "flax_model*.msgpack": "weights for Flax; take model.safetensors from where the folder came from",
    "*.incomplete": "a download that was broken off; start it again",
    "*.part": "a download that was broken off; start it again",
    "*.pt": "a file of torch; save the model in Hugging Face's form, with `save_pretrained`",
    "*.pth": "a file of torch; save the model in Hugging Face's form, with `save_pretrained`",
}


def our_checkpoint(argument: str, runs_dir: str, flag: str) -> Path | None:
    """The checkpoint of ours that a model argument means; None when it means a model in Hugging Face's form.

    UserError, which starts with `flag` and the argument, where it is neither.
    """
    path = typed_path(argument)
    if gguf_file(path) is not None or any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return None
    try:
        return find_checkpoint(argument, runs_dir, flag)
    except UserError:
        if is_hub_name(argument):
            return None
        told = _told_of_file(path) if path.is_file() else _told_of_folder(path) if path.is_dir() else ""
        if not told:
            raise
        raise UserError(f"{flag} {argument}: {told}") from None


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that is the one model in a folder; None where it is something else."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = [] if any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, *_READ)) else [*path.glob("*.gguf")]
    return files[0] if len(files) == 1 else None


@contextlib.contextmanager
def told_of(flag: str, source: str) -> Iterator[None]:
    """Errors of a model in Hugging Face's form speak of the training scripts' -p; here of the flag that named it."""
    try:
        yield
    except UserError as error:
        start, told = f"-p {source}", str(error)
        raise UserError(flag + told.removeprefix(start) if told.startswith(start) else told) from None


def check_files(folder: Path, complain: Callable[[str], UserError]) -> None:
    """Refuse a folder whose weights are not there, or in a form that is not read; raises what `complain` makes."""
    name = next((name for name in _READ if (folder / name).is_file()), "")
    if not name:
        raise complain(f"has no model.safetensors or pytorch_model.bin{_other_weights(folder)}")
    parts = [name]
    if name.endswith(".json"):
        try:
            parts = sorted(set(map(str, json.loads((folder / name).read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise complain(f"{name} is damaged; copy it again") from None
    gone = [part for part in parts if not (folder / part).is_file()]
    if gone:
        there = f"{len(parts) - len(gone)} of {len(parts)} parts are there"
        raise complain(f"{gone[0]} is missing ({there}); copy it too")
    pointer = next((part for part in parts if is_lfs_pointer(folder / part)), "")
    if pointer:
        raise complain(f"{pointer} {LFS_POINTER}")


def _other_weights(folder: Path) -> str:
    """What other weights are there, to go on with after "no model.safetensors"; or what to do where there are none."""
    kinds = (_MISPLACED | _OTHER_WEIGHTS).items()
    found = ((file, what) for pattern, what in kinds for file in sorted(folder.glob(pattern)))
    file, what = next(found, (None, ""))
    return f"; {file.name} is {what}" if file else "; copy the weights too"


def _told_of_file(file: Path) -> str:
    what = next((what for pattern, what in _OTHER_WEIGHTS.items() if file.match(pattern)), "")
    if (file.parent / CONFIG).is_file():
        return f"is a file; give its folder, {file.parent}"
    if what:
        return f"is {what}"
    return f"is a file; give a folder with {CONFIG} and model.safetensors"


def _told_of_folder(folder: Path) -> str:
    """What a folder without any description of a model holds; "" where nothing in it looks like a model."""
    runs = sorted(path.parent.name for path in folder.glob("*/hyperparams.json"))
    if runs:
        return f"is a folder of runs; give one of them: {', '.join(runs[:5])}{' ...' if len(runs) > 5 else ''}"
    if (folder / MANIFEST).is_file():
        return ""  # half of a checkpoint of ours
    if any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        return f"has weights but no {CONFIG}, which says their sizes; copy it from where they came from"
    inner = [path.parent for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/{CONFIG}"))]
    if inner:
        return f"holds no model itself; give {inner[-1]}"
    other = _other_weights(folder)
    return f"has no {CONFIG} and no model.safetensors{other}" if " is " in other else ""
