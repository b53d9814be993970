"""Two maps of the sources, made from the sources: `python tests/reading_order.py` writes them.

README.md gets the files to read for one iteration of PPO, in order and with their lines; docs/layout.md gets every
module with the first sentence of its docstring. A test fails when either is behind.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
README, LAYOUT = ROOT / "README.md", ROOT / "docs" / "layout.md"
CORE_BEGIN, CORE_END = "<!-- core:begin -->", "<!-- core:end -->"
MODULES_BEGIN, MODULES_END = "<!-- modules:begin -->", "<!-- modules:end -->"
# Where the README tells the sum outside of its map.
TOTAL = re.compile(r"[\d,]+(?= lines, the core)")

# What one iteration of PPO goes through, in the order in which it is read best.
CORE = [
    ("models/gpt.py", "the model: attention, blocks, positions from the mask; the classes of the roles"),
    ("models/trunk.py", "the blocks one after another"),
    ("models/lora.py", "adapters, freezing, one frozen base for all roles"),
    ("models/roles.py", "a trunk with a scalar head: critic, reward model"),
    ("models/vocabulary.py", "log-probabilities from the output projection, block by block"),
    ("models/kernels.py", "attention, GELU and products, each in a line of torch"),
    ("models/weight_copies.py", "what was made of a weight, until it changes"),
    ("models/causal_lm.py", "what all families share: log-probabilities, loading, sampling"),
    ("models/cache.py", "keys and values of what was read"),
    ("models/decoding.py", "one decoding step with few operations"),
    ("models/generation.py", "sampling a batch of responses, each until its EOS"),
    ("utils/loss.py", "every formula: rewards, GAE, clipped losses"),
    ("training/trainers.py", "the three loops; read `PPOTrainer.fit` and `iteration` first"),
    ("training/experience.py", "what the four roles make of a rollout"),
    ("training/sampling.py", "prompts in, rows of prompt and response out"),
    ("training/engine/runtime.py", "devices, precision; the optimizer's step"),
    ("training/reward_scale.py", "the reward's mean 0 and deviation 1"),
    ("training/loop.py", "order of the data, seeds, passes"),
    ("training/invariants.py", "what must hold, or the run stops"),
]

# Rooms have no docstring of their own.
ROOMS = {
    "config": "settings, the command line, devices, errors",
    "utils": "formulas, data, tokenizers, judging, run folders: nothing here knows a model",
    "utils/data": "from rows to batches",
    "utils/demo": "the world of the offline demo",
    "utils/evaluation": "what an evaluation asks and what it leaves behind",
    "utils/judging": "who decides between two answers, and the figures that come of it",
    "utils/runs": "what a run writes, and how it is found again",
    "utils/tokenizers": "between the forms of a byte-level BPE",
    "models": "GPT-2 and LLaMA, their roles, LoRA, sampling",
    "models/cpu": "what makes a CPU fast",
    "models/gpu": "what is a GPU's alone",
    "models/weights": "model folders, from and to Hugging Face's form",
    "inference": "answers of models to prompts",
    "training": "the three stages",
    "training/engine": "devices, precision, the optimizer's step",
    "training/memory": "will it fit, and which flags would make it fit",
    "training/storage": "checkpoints, and going on with a run",
    "experiments": "the tasks of `main.py -t TASK`",
    "experiments/bench": "speed and memory beside other libraries",
    "experiments/demo": "`make demo` and the tables of its results",
    "experiments/doctor": "what is wrong with a run",
    "experiments/export": "a run as a folder of transformers, held against the run",
    "experiments/gpu": "all that only a GPU can tell, in one command",
    "experiments/memory": "the plan of memory, and the plan held against measured runs",
    "experiments/overoptimisation": "proxy and gold reward over the distance from SFT",
    "experiments/smollm2": "RLHF on a real language model, offline",
}
# As the layers stand: a folder uses itself and those before it.
LAYERS = ("config", "utils", "models", "inference", "training", "experiments")


def lines_of(path: Path) -> int:
    """Lines of a file, as `wc -l` counts them."""
    return path.read_text(encoding="utf-8").count("\n")


def core_total() -> int:
    """Lines of all files of the core."""
    return sum(lines_of(SRC / name) for name, _ in CORE)


def core_table() -> str:
    """The core as a table, with its sum."""
    rows = ["| | file | lines | what it holds |", "|---|---|---|---|"]
    for number, (name, text) in enumerate(CORE, start=1):
        rows.append(f"| {number} | [{name}](src/{name}) | {lines_of(SRC / name)} | {text} |")
    return "\n".join([*rows, f"| | all {len(CORE)} | {core_total():,} | |"])


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    docstring = " ".join(
        (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split()
    )
    if not docstring:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring; its first sentence goes into docs/layout.md")
    return re.split(r"\.(?: |$)", docstring)[0].replace("|", "\\|")


def module_tables() -> str:
    """Every module of every room, room by room."""
    folders = {path.parent for path in SRC.rglob("*.py")}
    parts = []
    for folder in sorted(folders, key=lambda f: (LAYERS.index(f.relative_to(SRC).parts[0]), f.parts)):
        room = folder.relative_to(SRC).as_posix()
        if room not in ROOMS:
            raise ValueError(f"src/{room} is not in ROOMS of tests/reading_order.py: say there what the room is for")
        parts += [f"## `{room}/`", "", ROOMS[room], "", "| module | what it holds |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                link = f"[{path.name}](../src/{path.relative_to(SRC).as_posix()})"
                parts.append(f"| {link} | {first_sentence(path)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def between(text: str, begin: str, end: str, new: str) -> str:
    """`text` with `new` between its two marker lines."""
    head, rest = text.split(begin + "\n")
    _, tail = rest.split(end)
    return f"{head}{begin}\n{new}\n{end}{tail}"


def with_core(readme: str) -> str:
    """The README with a fresh map of the core."""
    return TOTAL.sub(f"{core_total():,}", between(readme, CORE_BEGIN, CORE_END, core_table()))


def with_modules(layout: str) -> str:
    """docs/layout.md with fresh tables of modules."""
    return between(layout, MODULES_BEGIN, MODULES_END, module_tables())


if __name__ == "__main__":
    README.write_text(with_core(README.read_text(encoding="utf-8")), encoding="utf-8")
    LAYOUT.write_text(with_modules(LAYOUT.read_text(encoding="utf-8")), encoding="utf-8")
