"""Token tables on disk, so that a dataset is tokenised once.

One .npz file per table, named by a hash of everything that decides its content (data, tokenizer, options): an entry
never goes stale, and the folder can be deleted at any time. A file appears under its name only when it is whole
(written beside, synced, renamed), so two processes that build the same table at once do no harm, and whichever comes
last leaves the same bytes. The arrays carry CRC-32 sums (zip), their names and the full key; a file that fails them is
built again.
"""

import logging
import os
import time
from pathlib import Path

import numpy as np

from utils.runs.durable import PARTIAL, whole_file
from utils.runs.folder import REPO, typed_path

_log = logging.getLogger(__name__)
_ABANDONED_SECONDS = 24 * 3600


def default_cache_dir() -> Path:
    """`RLHF_CACHE_DIR` if it is set, else runs/.cache/tokens in the repository."""
    return typed_path(os.environ.get("RLHF_CACHE_DIR") or REPO / "runs" / ".cache" / "tokens")


def read_arrays(folder: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays stored under a key; None if there are none, or (told in the log) if the file is damaged."""
    path = _path(folder, key)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if bytes(arrays.pop("label")).decode() != _label(key, arrays):
            raise ValueError("it has another key or other arrays than it should")
        return arrays
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip or header raises many kinds, down to MemoryError
        _log.warning("token cache %s is damaged (%s); tokenising again", path, error)
        return None


def write_arrays(folder: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Stores arrays under a key, whole or not at all. A cache that cannot be written costs time, not the run: it is
    logged."""
    try:
        _remove_abandoned(folder)
        with whole_file(_path(folder, key)) as file:
            np.savez(file, label=np.frombuffer(_label(key, arrays).encode(), dtype=np.uint8), **arrays)
    except OSError as error:
        _log.warning("token cache %s cannot be written (%s); the next run will tokenise again", folder, error)


def _remove_abandoned(folder: Path) -> None:
    """Removes what processes that were killed while writing have left behind."""
    for path in folder.glob("*" + PARTIAL):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink(missing_ok=True)


def _label(key: str, arrays: dict[str, np.ndarray]) -> str:
    return " ".join([key, *sorted(arrays)])


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.npz"
