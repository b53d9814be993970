"""docs/one-iteration.md walks through a PPO iteration file by file; a real one has to enter these files, and no others
but those that serve beside. None of them calls up the layers."""

import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import CodeType

import training

SRC = Path(training.__file__).resolve().parents[1]
PAGE = (SRC.parent / "docs" / "one-iteration.md").read_text()
LAYERS = ("config", "utils", "models", "inference", "training")
# Entered as well, but nothing that a reader must follow to know what the batch becomes.
BESIDE = {
    "config/configs.py": "holds settings",
    "config/model_configs.py": "holds sizes",
    "utils/tokenizers/interface.py": "says which id is PAD",
    "utils/data/batching.py": "pads lists of ids and cuts lists of rows, without arithmetic on the batch",
    "models/causal_lm.py": "hands calls on, to the trunk in gpt.py and to vocabulary.py",
    "models/trunk.py": "calls the blocks of gpt.py one after another",
    "models/gpu/graphs.py": "says whether steps are recorded, which they are not",
    "models/cache.py": "keeps keys and values; makes masks, which compact rows need not",
    "models/lora.py": "calls torch's matrix product by way of kernels.py",
    "models/kernels.py": "one line of torch for each operation, and which faster form serves",
    "models/weight_copies.py": "remembers what was made of a weight",
    "models/decoding.py": "GPT.hidden for one column: tests/models/test_decoding.py holds the two against each other",
    "models/cpu/attention.py": "torch's attention, faster on a CPU",
    "models/cpu/linear.py": "torch's matrix product, faster on a CPU",
    "models/cpu/activation.py": "torch's GELU, faster on a CPU",
    "models/cpu/packing.py": "weights in a layout that is read faster on a CPU",
    "training/loop.py": "draws prompts and seeds before the iteration begins to compute",
    "training/invariants.py": "only checks",
    "training/reward_scale.py": "only watches whether the first rewards are all alike",
    "training/engine/nonfinite.py": "only checks, as long as all numbers are finite",
    "training/engine/phases.py": "only clocks",
    "training/engine/host_memory.py": "keeps freed memory for the next step",
    "training/ppo_metrics.py": "makes figures of what the others made",
    "utils/metrics.py": "makes figures of what the others made",
}


@cache
def file_of(code: CodeType) -> str | None:
    """The file of src/ that holds a function; None for any other."""
    path = Path(code.co_filename)
    return path.relative_to(SRC).as_posix() if SRC in path.parents else None


def calls_between_files(action: Callable[[], object]) -> set[tuple[str, str]]:
    """(caller, callee) of all calls between files of src/, whatever stands between the two."""
    calls = set()

    def note(frame, event, argument) -> None:
        callee = file_of(frame.f_code) if event == "call" else None
        if callee is None:
            return
        caller = frame.f_back
        while caller is not None and file_of(caller.f_code) is None:
            if caller.f_code.co_filename.startswith("<frozen importlib"):
                return  # an import looks for modules of the user's, too
            caller = caller.f_back
        if caller is not None and file_of(caller.f_code) != callee:
            calls.add((file_of(caller.f_code), callee))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def test_an_iteration_is_read_in_ten_files_from_the_top_down(ppo_trainer) -> None:
    path = re.findall(r"^## \d+\. \[(.+)\]\(\.\./src/\1\)$", PAGE, re.MULTILINE)
    assert path[:2] == ["training/train_ppo.py", "training/trainers.py"] and len(path) <= 10

    trainer = ppo_trainer(kl_target=0.5, whiten_rewards=True, max_kl=50.0)
    calls = calls_between_files(partial(trainer.iteration, 1))
    assert {name for call in calls for name in call} - set(BESIDE) == set(path[1:])
    for caller, callee in calls:
        upper, lower = (LAYERS.index(name.partition("/")[0]) for name in (caller, callee))
        assert upper >= lower, f"{caller} calls {callee}"


def test_the_page_names_what_serves_beside_and_functions_that_exist() -> None:
    path, _, beside = PAGE.partition("## Beside the path")
    assert set(re.findall(r"\(\.\./src/(.+?)\)", beside)) == set(BESIDE)
    defined = re.findall(r"^\[`(\w+)`\]: \.\./src/(.+)$", PAGE, re.MULTILINE)
    assert {name for name, _ in defined} == set(re.findall(r"\[`(\w+)`\]", path))
    for name, file in defined:
        assert f"({Path('../src', file).as_posix()})" in path
        assert re.search(rf"(def|class) {name}\b", (SRC / file).read_text()), name
