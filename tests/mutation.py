"""Mutation tests with mutmut: `python tests/mutation.py FOLDER GROUP [--sample N] [--again]`; see docs/mutation.md.

Copies the working tree to FOLDER, lets mutmut make the mutants of a group of modules there and run that group's tests
on each, and prints counts and survivors. mutmut leaves functions with a decorator out, so `@decorate def f` is first
rewritten as `def f` and `f = decorate(f)`, which is the same.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import libcst as cst

REPO = Path(__file__).resolve().parents[1]
SEED = 0
# Modules of src/, and the tests that are run on their mutants: a unit test of each, and what shows the rest.
GROUPS = {
    "loss": ("utils/loss", "utils/test_loss utils/test_loss_ppo utils/test_loss_reward"),
    "statistics": (
        "utils/statistics utils/metrics utils/judging/length_control inference/best_of_n "
        "experiments/overoptimisation/fit",
        "utils/test_statistics utils/test_metrics utils/judging/test_length_control inference/test_best_of_n "
        "experiments/overoptimisation/test_fit",
    ),
    "splits": (
        "utils/data/splits utils/demo/world",
        "utils/data/test_splits utils/demo/test_world utils/test_dataset",
    ),
    "models": ("models/lora models/vocabulary", "models/test_lora models/test_vocabulary models/test_roles"),
    "generate": ("models/generation", "models/test_generation models/test_stop_strings"),
    "rollouts": (
        "training/sampling training/reward_scale training/experience",
        "training/test_sampling training/test_experience training/test_reward_scale training/test_rm_trainer "
        "training/test_ppo_metrics training/test_token_budget",
    ),
    "trainers": (
        "training/trainers",
        "training/test_sft_trainer training/test_rm_trainer training/test_ppo_trainer training/engine/test_nonfinite "
        "training/test_loop",
    ),
    "demo": ("experiments/demo/judge", "experiments/demo/test_run"),
}
# One looks at a module's source, in which mutmut's import is one too many; the others start scripts, which lack it.
NOT_HERE = (
    "tests/utils/test_loss.py::test_loss_imports_torch_and_the_standard_library_only",
    "tests/utils/demo/test_world.py::test_scripts_run_from_src_as_well",
)
# Hundreds of trials each: run only on mutants that all other tests let pass (--again).
SLOW = (
    "utils/judging/test_length_control.py::test_the_interval_holds_the_truth_as_often_as_it_says",
    "utils/judging/test_length_control.py::test_a_judge_of_length_alone_says_nothing_about_quality",
    "utils/judging/test_length_control.py::test_the_fit_is_the_maximum_that_another_optimiser_finds",
    "utils/test_statistics.py::test_the_bootstrap_interval_holds_the_truth_as_often_as_it_says",
    "training/test_ppo_trainer.py::test_a_toy_learns_to_say_a_letter",
)
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {arguments}
do_not_mutate_patterns = ['raise \\w+\\(', 'tqdm\\.write\\(', 'tqdm\\(']
also_copy = ["assets", "docs", "README.md", "Makefile", "runs"]
track_dependencies = false
use_git_change_detection = false
timeout_multiplier = 10.0
timeout_constant = 5.0
"""


class Undecorate(cst.CSTTransformer):
    """`@a` above `def f` -> `f = a(f)` below it."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef):  # noqa: N802
        names = [d.decorator for d in updated_node.decorators]
        if not names or (len(names) == 1 and isinstance(names[0], cst.Name) and names[0].value.endswith("method")):
            return updated_node
        value: cst.BaseExpression = updated_node.name
        for decorator in reversed(names):
            value = cst.Call(decorator, [cst.Arg(value)])
        assigned = cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(updated_node.name)], value)])
        return cst.FlattenSentinel([updated_node.with_changes(decorators=[]), assigned])


def prepare(folder: Path, modules: list[str], tests: list[str]) -> None:
    """The working tree in `folder`, the modules without decorators, mutmut's settings."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, folder / name)
    for name in modules:
        path = folder / name
        path.write_text(cst.parse_module(path.read_text()).visit(Undecorate()).code)
    with (folder / "pyproject.toml").open("a") as file:
        arguments = ["-p", "no:cacheprovider", *(f"--deselect={test}" for test in NOT_HERE)]
        words = {"modules": modules, "tests": tests, "arguments": arguments}
        file.write(SETTINGS.format(**{name: json.dumps(value) for name, value in words.items()}))


def run(sample: int, again: bool) -> None:
    """mutmut in the present folder: mutants that have no result yet; with `again` those that survived, too."""
    from mutmut import __main__ as mutmut

    everything = mutmut.collect_source_file_mutation_data

    def chosen(*, mutant_names):
        mutants, data = everything(mutant_names=mutant_names)
        kept = []
        for path in data:
            of_file = [m for m in mutants if str(m[0].path) == path]
            random.Random(f"{SEED} {path}").shuffle(of_file)
            kept += of_file[: sample or None]
        done = {1, 3} if again else {0, 1, 3, 33}
        return [(m, name, result if result in done else None) for m, name, result in kept], data

    mutmut.collect_source_file_mutation_data = chosen
    if not again:
        os.environ["PYTEST_ADDOPTS"] = " ".join(f"--deselect=tests/{name}" for name in SLOW)
    mutmut._run([], 1)


def report(modules: list[str]) -> None:
    """Counts, and every mutant that was not killed, as a diff of one line."""
    from mutmut.__main__ import get_diff_for_mutant

    told = {0: "survived", 1: "killed", 3: "killed", 5: "no test", 33: "no test", None: "not run"}
    for name in modules:
        results = json.loads(Path("mutants", f"{name}.meta").read_text())["exit_code_by_key"]
        states = {key: told.get(code, "timeout") for key, code in results.items()}
        counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
        print(f"\n{name}: {len(states)} mutants: {counts}")
        for key, state in states.items():
            if state not in ("killed", "not run"):
                lines = re.findall(r"^[-+](?![-+]).*", get_diff_for_mutant(key, path=Path(name)), re.MULTILINE)
                print(f"  {key.rpartition('.')[2]} ({state})", *lines, sep="\n    ")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("group", choices=GROUPS)
    flags.add_argument("--sample", type=int, default=0, help="so many mutants of each module, drawn at random; 0: all")
    flags.add_argument("--again", action="store_true", help="once more those that were not killed, with slow tests")
    given = flags.parse_args()
    modules, tests = (
        [f"{top}/{word}.py" for word in words.split()] for top, words in zip(("src", "tests"), GROUPS[given.group])
    )
    folder = given.folder.resolve() / given.group
    prepare(folder, modules, tests)
    os.chdir(folder)
    run(given.sample, given.again)
    report(modules)


if __name__ == "__main__":
    main()
