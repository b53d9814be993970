"""The machine that the benchmark runs on: its facts, and how much of its time other guests of the host took."""

from __future__ import annotations

import math
import os
import platform
import time
from pathlib import Path
from typing import Any

STAT = Path("/proc/stat")
_STEAL = 8  # column of the line "cpu": its name, user, nice, system, idle, iowait, irq, softirq, steal (man proc_stat)
TOO_MUCH = 0.05


class Stolen:
    """Time that the host gave to others while a core here had work to do, from now on.

    It is missing from nobody's clock but the guest's own: what was measured meanwhile came out slower than it is.
    """

    def __init__(self) -> None:
        self._seconds, self._started = stolen_seconds(), time.monotonic()

    def share(self) -> float | None:
        """Stolen time over wall time x cores since the start; None where the kernel does not tell."""
        now = stolen_seconds()
        if now is None or self._seconds is None:
            return None
        return (now - self._seconds) / max((time.monotonic() - self._started) * (os.cpu_count() or 1), 1e-9)


def stolen_seconds() -> float | None:
    """Stolen seconds of all cores since boot, from /proc/stat; None where there are none to read (not Linux)."""
    try:
        words = STAT.read_text().partition("\n")[0].split()
        return int(words[_STEAL]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def describe_machine(rounds: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": memory_gb(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,  # Windows has none
    }


def memory_gb() -> float:
    """Memory of the machine in GB (1e9 bytes); NaN where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return math.nan
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def cpu_name() -> str:
    """The processor's name as Linux tells it, or the platform's word for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
