"""Quick looks and the demo: `python src/experiments/main.py -t TASK [flags]`; `-t TASK --help` shows a task's flags.

gpt        continue a prompt with any checkpoint or Hugging Face model
reward     score a response with a reward model
dataset    show a batch with its masks
tokenizer  show how a text is cut into tokens
loss       what the losses give on a tiny example, term by term
demo       the whole offline demo on one seed (what `make demo` runs)
results    the demo over several seeds and variants: the tables of docs/results.md and the picture
overoptimisation    proxy and gold reward over the distance from SFT, of a PPO run and of best-of-n, as a picture
doctor     what is wrong with a run of any stage, from its figures, and what to change
memory     what every preset and stage needs on a GPU; --check: the plan against measured runs
bench      speed and memory beside transformers and TRL (what `make bench` runs)
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
ROOMS = ("overoptimisation", "doctor", "memory", "bench")  # experiments/TASK/run.py has run(parser, rest)
TASKS = (*QUICK_LOOKS, "demo", "results", *ROOMS, "soak")


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
    parser = Parser(prog=f"main.py -t {chosen.task}")
    # Imports wait until the task is known: `-t tokenizer` should not load what `-t demo` needs.
    if chosen.task in ("demo", "results"):
        return demo_task(chosen.task, parser, rest)
    if chosen.task in ROOMS:
        return importlib.import_module(f"experiments.{chosen.task}.run").run(parser, rest)
    if chosen.task == "soak":
        from experiments import soak

        return soak.run(parser, rest)
    from experiments import quick_looks

    return quick_looks.run(chosen.task, parser, rest)


def demo_task(task: str, parser: Parser, rest: list[str]) -> int:
    """Flags of `demo` and `results`."""
    from experiments.demo.run import run_demo, run_results

    parser.add_argument("--runs-dir", default="runs", help="where run folders are made")
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts to judge on; there are 400")
    if task == "demo":
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="matrix precision of all stages")
        parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="of all stages")
        flags = parser.parse_args(rest)
        given = {"--dtype": flags.dtype, "--device": flags.device}
        everywhere = tuple(word for pair in given.items() if pair[1] for word in pair)
        return run_demo(flags.seed, flags.runs_dir, flags.prompts, everywhere)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=["kl0", "lora"], choices=["kl0", "lora"])
    parser.add_argument("--parallel", type=int, default=1, help="seeds run at the same time, with one thread each")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="test: for a final table alone"
    )
    parser.add_argument("--judge-only", action="store_true", help="judge the newest runs of the seeds; train nothing")
    parser.add_argument("--picture", default="assets/overoptimisation.png", help="where to draw the KL ablation")
    flags = parser.parse_args(rest)
    return run_results(
        flags.seeds, flags.runs_dir, tuple(flags.variants), flags.prompts, flags.parallel, flags.picture, flags.split,
        not flags.judge_only,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
