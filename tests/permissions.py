"""File permissions that count for the tests' own process, also where root runs it."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.runs.folder import REPO

_VERSION_3 = 0x20080522  # of the structures of capget(2)
_BYPASS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Within this, a file of mode 0 cannot be read and a folder of mode 0 not be entered, whoever runs the tests.

    Root gives up its right to pass over permissions, and takes it back behind this. It stays the owner of its files,
    so the repository and Python may be where nobody else may enter. Where they are another user's alone, it becomes
    that one. Skips the test where neither helps.
    """
    for give_up in (_without_bypass, _as_owner_of_the_repository):
        with give_up():
            if _readable(REPO / "src") and _readable(Path(sys.prefix)) and _readable(Path(os.__file__).parent):
                yield
                return
    pytest.skip("without root's rights the repository or Python cannot be read: run the tests as their owner")


def _readable(folder: Path) -> bool:
    try:
        return bool(os.listdir(folder))
    except PermissionError:
        return False


@contextlib.contextmanager
def _without_bypass() -> Iterator[None]:
    """Clear the two capabilities of this thread's effective set; its permitted set, and so the way back, stays."""
    if sys.platform != "linux":
        if os.geteuid() == 0:
            pytest.skip("nothing is forbidden to root here")
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)  # 0: the calling thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for capabilities from 32 on
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0]
    sets[0] = before & ~_BYPASS
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        sets[0] = before
        if libc.capset(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def _as_owner_of_the_repository() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(REPO.stat().st_uid)
    try:
        yield
    finally:
        os.seteuid(user)
