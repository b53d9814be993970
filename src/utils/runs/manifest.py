"""The seal of a checkpoint: manifest.json lists the size and SHA-256 of every file in it.

It is written last and checked on every load, so a copy that was cut short, a flipped bit or an edited file is told and
not trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from config.user_error import UserError

MANIFEST = "manifest.json"


def write_manifest(path: Path) -> None:
    """Write `path`, the manifest of all files in the folder around it."""
    folder = path.parent
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": digest_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != path
    }
    path.write_text(json.dumps({"files": files}, indent=1) + "\n")


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint, the folder with the manifest, is not whole, in words that follow its name; None when it is."""
    try:
        files = _listed(checkpoint)
    except FileNotFoundError:
        return f"has no {MANIFEST}: it is half copied, or an older version wrote it"
    except (OSError, ValueError) as error:
        return f"has a {MANIFEST} that cannot be read ({error})"
    return next(filter(None, (_fault_of_file(checkpoint, name, files) for name in files)), None)


def check_files(folder: Path, names: tuple[str, ...], sealed: bool) -> None:
    """Compare files of a model folder with the manifest, which stands there or one folder up (PPO's critic/).

    Args:
        names: the files that are about to be read.
        sealed: whether there must be a manifest; a folder that was written without one has none to check.

    Raises:
        UserError: a file is not what was saved.
    """
    for root, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if (root / MANIFEST).is_file():
            try:
                files = _listed(root)
            except (OSError, ValueError) as error:
                raise UserError(f"{root / MANIFEST}: cannot be read ({error}); take another checkpoint") from None
            if root == folder or any(name.startswith(prefix) for name in files):
                break
    else:
        if sealed:
            raise UserError(f"{folder}: has no {MANIFEST}, so it is half copied; copy the whole checkpoint folder")
        return
    for name in names:
        if fault := _fault_of_file(root, prefix + name, files):
            raise UserError(f"{root}: {fault}; take another checkpoint of the run")


def _listed(folder: Path) -> dict[str, dict]:
    """The files of a manifest; OSError or ValueError where it cannot be read, or is none."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"size", "sha256"} <= set(e) for e in files.values()
    ):
        raise ValueError("it is no list of files")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ValueError("it lists files outside its folder")
    return files


def _fault_of_file(root: Path, name: str, files: dict[str, dict]) -> str | None:
    if name not in files:
        return f"{MANIFEST} lists no {name}"
    path, listed = root / name, files[name]
    try:
        size = path.stat().st_size
        if size != listed["size"]:
            return f"{name} has {size} bytes, {MANIFEST} says {listed['size']}"
        if digest_of(path) != listed["sha256"]:
            return f"{name} is not what was saved (its SHA-256 is not that of {MANIFEST})"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


_digests: dict[tuple[int, ...], str] = {}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read once for a file that stays as it is, whatever its folder is renamed to.

    A resume looks at a checkpoint first and loads it then, and a run looks at its own checkpoints at every save.
    """
    status = path.stat()
    # Nobody can set the time of the last change of any kind; a copy may keep that of the contents.
    known_by = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
    if known_by not in _digests:
        with path.open("rb") as file:
            _digests[known_by] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[known_by]
