"""Memory that is freed and wanted again."""

import os
import subprocess
import sys

import pytest

from utils.runs.folder import REPO

pytestmark = pytest.mark.slow

# Each step wants three large blocks, the first one five, and frees them; with "holes" each leaves something small
# behind every block, so that its place is never used again.
STEPS = """
import ctypes, resource, sys
sys.path.insert(0, "src")
import torch
from training.engine.host_memory import HostMemory, resident_bytes
torch.set_num_threads(1)
memory = HostMemory()
kept = memory.keep_freed([torch.empty(int(sys.argv[1]))])
stays, most, faults = [], 0, []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = []
    for _ in range(3 if step else 5):
        large.append(torch.ones(10_000_000))  # 40 MB
        if sys.argv[2] == "holes":
            stays.append(torch.ones(1000))
    most = max(most, resident_bytes())
    large.clear()
    memory.after_step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, most // 10**6, sorted(faults)[6])
"""


def run(numbers: int, what: str = "", **environment: str) -> tuple[bool, int, int]:
    """Whether memory was kept, the most that was held (MB), and the page faults of the median step."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    command = [sys.executable, "-c", STEPS, str(numbers), what]
    done = subprocess.run(command, cwd=REPO, env=clean | environment, capture_output=True, text=True, check=True)
    kept, most, faults = done.stdout.split()
    if not environment and numbers == LARGE and kept == "False":
        pytest.skip("this C library has no mallopt")
    return kept == "True", int(most), int(faults)


LARGE, SMALL = 10_000_000, 1_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the switches are glibc's")
def test_kept_memory_is_not_cleared_again() -> None:
    assert run(LARGE)[2] < 1000
    assert run(SMALL)[2] > 20_000  # 120 MB in pages of 4 KB are 29,297


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the switches are glibc's")
def test_holes_are_given_back() -> None:
    _, plain, _ = run(SMALL, "holes")
    _, most, _ = run(LARGE, "holes")
    assert most < plain + 900  # of the 1,520 MB that twelve steps leave behind


def test_small_models_and_the_user_s_own_settings_are_left_alone() -> None:
    assert run(SMALL)[0] is False
    assert run(LARGE, MALLOC_MMAP_THRESHOLD_="1048576")[0] is False
