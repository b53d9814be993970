"""Python files of the user's, imported together with what lies beside them, and apart from everything else.

As for a script that Python runs, the file's own folder comes first when it imports: a `lexicon.py` beside it is found,
and so is a `utils.py`, although there is a `utils` here. But only the code of that folder sees it. sys.path stays as
it is, and each folder is a package of its own in sys.modules, so nothing of ours, and no second file of the user's, can
get a module that was meant for another.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_PREFIX = "user_folder_"
_SRC = Path(__file__).resolve().parents[1]  # what is in there is ours, also for a file that was put there


def import_user_file(file: Path) -> ModuleType:
    """The module of a Python file, whatever its name. It is run anew each time; what lies beside it is run once.

    Raises whatever running it raises.
    """
    file = file.resolve()
    folder = _folder_package(file.parent)
    name = f"{folder}.{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}"
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles in the file look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _folder_package(folder: Path) -> str:
    """The name of the package that stands for a folder; made when it is first asked for."""
    name = _PREFIX + hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name, f"What was imported from {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    return name


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what lies in the users' folders, and has it run by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module below one of the folders' packages; None for all other modules."""
        spec = PathFinder.find_spec(fullname, path) if fullname.startswith(_PREFIX) else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module so that its imports, those inside functions as well, look into the user's folder first."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with an `__import__` of its own among its builtins."""
        folder = sys.modules[module.__name__.partition(".")[0]]

        def import_here(
            name: str, globals: dict[str, Any] | None = None, locals: dict[str, Any] | None = None,
            fromlist: Sequence[str] | None = (), level: int = 0,
        ) -> ModuleType:  # fmt: skip
            top = name.partition(".")[0]
            if level or not _is_beside(folder, top):
                return builtins.__import__(name, globals, locals, fromlist, level)
            found = builtins.__import__(f"{folder.__name__}.{name}", globals, locals, fromlist)
            return found if fromlist else sys.modules[f"{folder.__name__}.{top}"]

        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": import_here}
        super().exec_module(module)


def _is_beside(folder: ModuleType, name: str) -> bool:
    """Whether an import of `name` from a user's folder means a module or package in it, as it would to Python."""
    if name in sys.builtin_module_names or folder.__path__ == [str(_SRC)]:
        return False
    spec = PathFinder.find_spec(name, folder.__path__)
    if spec is not None and spec.loader is None:
        # A folder without __init__.py counts only where there is nothing else of that name.
        return name not in sys.modules and importlib.util.find_spec(name) is None
    return spec is not None
