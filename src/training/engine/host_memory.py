"""How the C library deals with memory that a step frees and the next step wants again.

glibc gives every block above 32 MB back to the system at once and asks for it anew, and the system clears every page
of it. GPT-2's logits, its token table's gradient and their like are such blocks: on 2 cores a sixth of the time of an
SFT step and a quarter of full PPO's went there (docs/memory.md has the figures). Kept by the process they cost nothing,
and its peak is what counts anyway.

What is kept can become a heap full of holes: glibc does not reuse the place of a freed tensor for one of the same size,
because torch asks for aligned memory. So the holes are given back whenever the process has grown by a tenth.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_LARGE = 32 * 2**20  # bytes; glibc's DEFAULT_MMAP_THRESHOLD_MAX
GROWTH = 1.1
SETTLED = 4  # steps until every block has found its place


class HostMemory:
    """The process's memory on a CPU; does nothing where the C library is not glibc.

    Settings of the user's own (`MALLOC_MMAP_MAX_` and the like, see `man mallopt`) are left alone.
    """

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._usual = self._steps = 0

    def keep_freed(self, tensors: Iterable[Tensor]) -> bool:
        """From now on keep what is freed, if a tensor that a step works with is a large one; whether it is kept."""
        if self._library is None and any(t.numel() * t.element_size() > _LARGE for t in tensors):
            library = _glibc()
            # No block comes from mmap, so none is unmapped; and the end of the heap is never given back.
            if library and library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1):
                self._library = library
        return self._library is not None

    def after_step(self) -> None:
        """Give the holes back if the process has grown; to be called after each optimizer step."""
        if self._library is None:
            return
        used, self._steps = resident_bytes(), self._steps + 1
        if self._steps <= SETTLED:
            self._usual = max(self._usual, used)
        elif used > GROWTH * self._usual:
            self._library.malloc_trim(0)
            self._usual = self._steps = 0


def resident_bytes(process: int | None = None) -> int:
    """Memory that a process holds now, this one if none is given; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{process or 'self'}/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE
    except (OSError, IndexError):
        if process is not None or resource is None:
            return 0
        # Not Linux: the most that this one has held; macOS counts in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has glibc's switches and the user has not set them."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return None
    try:
        library = ctypes.CDLL(None)
        _ = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows wants a library's name
        return None
    return library
