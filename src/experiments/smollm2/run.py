"""RLHF on a real language model, SmolLM2-135M-Instruct, with the scripts a user runs and files on this machine.

    python src/experiments/main.py -t smollm2 --part sentiment
    python src/experiments/main.py -t smollm2 --part preferences --dataset harmless-base.jsonl.gz

sentiment: PPO makes review openings go on in a friendly way, by a lexicon; another lexicon judges. preferences: SFT, a
reward model and PPO on pairs that people ranked; a second reward model, trained on other pairs, judges. Flags that are
not of this command go to train_ppo.py: `--kl-coef 0.1`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from config.command_line import parse_cli
from config.configs import PPOConfig
from config.user_error import UserError
from experiments.demo.run import Stage, here, run_stage
from experiments.graded_answers import text_model
from experiments.overoptimisation.run import PPORun, held_out_prompts, proxy_of
from experiments.smollm2.continuations import write_continuations
from experiments.smollm2.judge import Examiner, final_of, judge_run, pair_accuracy
from experiments.smollm2.report import draw_course, report, verdict
from inference.answers import Machine, Sampling, score_texts
from inference.systems import load_reward_model
from utils.data.files import read_rows
from utils.data.rows import BadRow, parse_row
from utils.data.splits import SplitOptions
from utils.reward_function import load_reward_function
from utils.runs.durable import write_file
from utils.runs.folder import REPO, runs_root, typed_path
from utils.template import PromptTemplate

OPENINGS = REPO / "assets/smollm2/openings.txt"
REWARDS = str(REPO / "src/experiments/smollm2/sentiment.py")
PROXY, GOLD = f"{REWARDS}:vader", f"{REWARDS}:textblob"
MODEL = "smollm2-135m-instruct"
CONFIG = ("--config", "smollm2-135m/lora")
FORM = ("--template", "human-assistant")  # all that follows was measured in this form, and not in the model's own
TOKENS = {"sentiment": 48, "preferences": 32}
DRAWS = {"sentiment": 8, "preferences": 2}
Rows = tuple[Path, ...]
_PROMPTS, _PAIRS = 200, 120  # held-out ones at most, of a file
_REWARD_SHARE = 2 / 3  # of the conversations the reward model's file holds so many, the judge's the others
_JUDGE_SPLIT = SplitOptions(seed=1)  # another hash than the one that divides each of the two files
_LONGEST_ROW = ("--max-length", "320")  # dialogues lose their beginning
_PPO = (
    "--ppo-epochs", "2", "--minibatches", "2", "--lr", "1e-3", "--critic-lr", "1e-3", "--temperature", "1",
    "--kl-coef", "0.05", "--max-kl", "40", "--warmup-iterations", "2", "--eval-every", "100", "--eval-examples", "16",
    "--keep", "20",
)  # fmt: skip
# Iterations, rollouts of each, iterations between checkpoints: for two CPU cores, and for a GPU.
_ROUNDS = {
    ("sentiment", "cpu"): (24, 16, 6), ("sentiment", "gpu"): (40, 128, 5),
    ("preferences", "cpu"): (6, 16, 3), ("preferences", "gpu"): (40, 64, 5),
}  # fmt: skip


def ppo_flags_of(part: str, device: str) -> tuple[str, ...]:
    """The recipe of PPO, and its size for a device."""
    iterations, rollouts, between = _ROUNDS[part, "cpu" if device == "cpu" else "gpu"]
    sizes = {
        "--iterations": iterations, "--global-batch-size": rollouts, "--save-every": between,
        "--response-length": TOKENS[part],
    }  # fmt: skip
    return (*_PPO, *(str(word) for pair in sizes.items() for word in pair))


def sentiment_stages(stem: str, model: str, device: str, continuations: Path) -> list[Stage]:
    """SFT on the model's own continuations, then PPO on the openings, rewarded by a lexicon."""
    sft = ("-n", stem, "-p", model, *CONFIG, *FORM, "--dataset", str(continuations), "--max-length", "96")
    ppo = (
        "-n", stem, "-a", f"sft_{stem}", *CONFIG, "--dataset", str(OPENINGS), "--reward-fn", PROXY,
        "--eval-reward-fn", GOLD, "--missing-eos-penalty", "0", "--share-adapter", "--max-length", "96",
        *ppo_flags_of("sentiment", device),
    )  # fmt: skip
    return [
        Stage("SFT", "train_sft.py", (*sft, "--global-batch-size", "16", "--lr", "1e-3", "--warmup-steps", "4",
                                      "--max-steps", "20")),
        Stage("PPO", "train_ppo.py", ppo),
    ]


def preference_stages(stem: str, model: str, device: str, reward_rows: Path, judge_rows: Path) -> list[Stage]:
    """SFT, reward model and PPO on one part of the rows, and the judge, a reward model, on the other."""
    rows = ("--dataset", str(reward_rows), "--skip-bad-rows", *_LONGEST_ROW)
    sft = ("-n", stem, "-p", model, *CONFIG, *FORM, *rows, "--global-batch-size", "16", "--lr", "5e-4",
           "--warmup-steps", "2")  # fmt: skip
    rm = (*CONFIG, "--global-batch-size", "8", "--lr", "2e-4", "--warmup-steps", "5", "--temperature", "1",
          "--normalise-prompts", "32", "--response-length", str(TOKENS["preferences"]))  # fmt: skip
    other = ("--dataset", str(judge_rows), "--skip-bad-rows", *_LONGEST_ROW)
    ppo = (
        "-n", stem, "-a", f"sft_{stem}", "-c", f"rm_{stem}", *CONFIG, *rows, "--prompt-length", "128",
        *ppo_flags_of("preferences", device),
    )  # fmt: skip
    return [
        Stage("SFT", "train_sft.py", (*sft, "--max-steps", "10")),
        Stage("reward model", "train_rm.py", ("-n", stem, "-p", f"sft_{stem}", *rm, *rows)),
        Stage("judge", "train_rm.py", ("-n", f"{stem}_judge", "-p", f"sft_{stem}", *rm, *other)),
        Stage("PPO", "train_ppo.py", ppo),
    ]


def divide(dataset: str, folder: Path) -> tuple[Path, Path]:
    """Write the rows for the reward model and those for the judge as two files, no conversation in both.

    UserError where the file cannot be read, or has no pairs for both.
    """
    template = PromptTemplate()
    parts: tuple[list[Any], list[Any]] = ([], [])
    for number, data in read_rows(typed_path(dataset)):
        try:
            if isinstance(data, BadRow) or (row := parse_row(data, "rm", f"{dataset}:{number}", template)) is None:
                continue
        except BadRow:
            continue
        point = _JUDGE_SPLIT.point(template.opening(row.prompts[0]))
        parts[point >= _REWARD_SHARE].append(data)
    if not all(parts):
        raise UserError(f"--dataset {dataset}: has no pairs for a reward model and a judge; some hundred are needed")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "reward-rows.jsonl", folder / "judge-rows.jsonl"
    for path, rows in zip(paths, parts):
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    print(f"{len(parts[0])} pairs for the reward model and PPO, {len(parts[1])} of other conversations for the judge")
    return paths


def run_seed(
    part: str, seed: int, model: str, dataset: str, flags: tuple[str, ...], ppo_flags: tuple[str, ...],
    machine: Machine, runs_dir: str, split: str, train: bool,
) -> dict[str, Any]:  # fmt: skip
    """All stages of one seed of a part, and their judgement on a held-out split; `ppo_flags` go to train_ppo.py."""
    folder, stem = runs_root(runs_dir) / "smollm2", f"smollm2_{part}_s{seed}"
    seconds: dict[str, float] = {}
    if part == "sentiment":
        rows = (folder / f"continuations-s{seed}.jsonl",)
        if train:
            started = time.perf_counter()
            print("\n== continuations: the pre-trained model goes on with every opening", flush=True)
            count = write_continuations(model, OPENINGS, TOKENS[part], seed, machine, rows[0])
            seconds["continuations"] = time.perf_counter() - started
            print(f"{count} continuations of whole sentences in {here(rows[0])}")
        stages = sentiment_stages(stem, model, machine.device.type, *rows)
    else:
        rows = divide(dataset, folder)
        stages = preference_stages(stem, model, machine.device.type, *rows)
    for name, script, own in stages if train else ():
        own = own + flags + (ppo_flags if script == "train_ppo.py" else ())
        seconds[name] = run_stage(Stage(name, script, own), seed, runs_dir, side_by_side=False)
    print(f"\n== judging on held-out prompts ({split})", flush=True)
    started = time.perf_counter()
    judge = judge_sentiment if part == "sentiment" else judge_preferences
    result = judge(stem, rows, machine, runs_dir, split)
    seconds["judging"] = time.perf_counter() - started
    return {"part": part, "seed": seed, "split": split, "seconds": seconds, **result}


def judge_sentiment(stem: str, _: Rows, machine: Machine, runs_dir: str, split: str) -> dict[str, Any]:
    """PPO against SFT on openings that neither has seen, by the other lexicon."""
    run = PPORun.read(final_of(f"ppo_{stem}", runs_dir).parent, runs_dir)
    start, sampling = text_model(run.sft), sampling_of(run)
    prompts = held_out_prompts(str(OPENINGS), start.template, _PROMPTS, split)
    proxy = proxy_of(run, machine, load_reward_function(PROXY, "--reward-fn"))
    gold = load_reward_function(GOLD, "--eval-reward-fn")
    return judge_run(run, Examiner(start, proxy, gold, prompts, DRAWS["sentiment"], sampling, machine))


def judge_preferences(stem: str, rows: Rows, machine: Machine, runs_dir: str, split: str) -> dict[str, Any]:
    """PPO against SFT by the judge on prompts that no stage was trained on; both reward models on the other's pairs."""
    run = PPORun.read(final_of(f"ppo_{stem}", runs_dir).parent, runs_dir)
    scorers = [
        score_texts(load_reward_model(final_of(f"rm_{name}", runs_dir), "rm"), machine)
        for name in (stem, f"{stem}_judge")
    ]
    start, sampling = text_model(run.sft), sampling_of(run)
    held_out = (held_out_prompts(str(path), start.template, _PROMPTS, split) for path in rows)
    prompts = [prompt for part in held_out for prompt in part]
    proxy, draws = proxy_of(run, machine, None), DRAWS["preferences"]
    examiner = Examiner(start, proxy, scorers[1], prompts, draws, sampling, machine)
    accuracies = [pair_accuracy(score, pairs_of(path)[:_PAIRS]) for score, path in zip(scorers, reversed(rows))]
    return {**judge_run(run, examiner), "reward_model": accuracies[0], "judge": accuracies[1]}


def sampling_of(run: PPORun) -> Sampling:
    """Answers as PPO samples them."""
    return Sampling(run.config["temperature"], run.config["response_length"])


def pairs_of(path: Path) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of a file that `divide` wrote, as ((prompt, chosen), (prompt, rejected))."""
    rows = (parse_row(data, "rm", f"{path}:{number}", PromptTemplate()) for number, data in read_rows(path))
    return [tuple(zip(row.prompts[:2], row.completions[:2])) for row in rows if row is not None]


def check_inputs(model: str, part: str, dataset: str) -> None:
    """UserError where something is missing, before anything runs."""
    if not (Path(model) / "config.json").is_file():
        raise UserError(
            f"--model {model}: holds no model in Hugging Face's form; make it with python src/experiments/main.py "
            "-t fetch smollm2, or give a folder with SmolLM2-135M-Instruct"
        )
    missing = [name for name in ("vaderSentiment", "textblob") if importlib.util.find_spec(name) is None]
    if part == "sentiment" and missing:
        raise UserError(f"--part sentiment: {missing[0]} is not installed; pip install -r requirements-smollm2.txt")
    if part == "preferences" and not typed_path(dataset or ".").is_file():
        what = f"{dataset}: no such file" if dataset else "is needed"
        raise UserError(f"--dataset {what}; give pairs such as harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """`-t smollm2`: 0 when every seed reached what `verdict` asks for, else 1."""
    parser.description = __doc__.partition("\n")[0]
    parser.allow_abbrev = False  # so that a flag of train_ppo.py is never taken for one of these
    parser.epilog = "flags that are not listed here go to train_ppo.py"
    parser.add_argument("--part", choices=sorted(TOKENS), default="sentiment")
    parser.add_argument("--model", default="", help=f"folder of SmolLM2-135M-Instruct; runs/models/{MODEL} by default")
    parser.add_argument("--dataset", default="", help="file of ranked pairs, for preferences")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    text = "test: for a final table alone"
    parser.add_argument("--split", choices=["validation", "test"], default="validation", help=text)
    parser.add_argument("--judge-only", action="store_true", help="judge the newest runs of the seeds; train nothing")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--runs-dir", default="runs", help="where run folders are made")
    flags, ppo_flags = parser.parse_known_args(rest)
    model = str(typed_path(flags.model) if flags.model else runs_root("runs") / "models" / MODEL)
    check_inputs(model, flags.part, flags.dataset)
    machine = Machine.chosen(flags.device, flags.dtype, 64, 0)
    parse_cli(PPOConfig, ppo_flags)  # a wrong one is told now, not when PPO's turn comes
    everywhere = ("--device", str(machine.device), "--dtype", machine.dtype)
    started = time.perf_counter()
    results = [
        run_seed(flags.part, seed, model, flags.dataset, everywhere, tuple(ppo_flags), machine, flags.runs_dir,
                 flags.split, not flags.judge_only)
        for seed in flags.seeds
    ]  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    write_results(flags.part, results, machine.describe(), runs_root(flags.runs_dir) / "smollm2")
    steps = (f"{name} {s:.0f} s" for name, s in results[0]["seconds"].items())
    print(f"{minutes:.1f} minutes on {machine.describe()} (seed {flags.seeds[0]}: {', '.join(steps)})")
    failed = [line for result in results for line in verdict(flags.part, result)]
    print("\n".join(f"FAILED: {line}" for line in failed) or f"RLHF worked: {flags.part}, {len(results)} seed(s)")
    return 1 if failed else 0


def write_results(part: str, results: list[dict[str, Any]], machine: str, folder: Path) -> None:
    """PART.json, PART.md and PART.png in the folder; the table is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    text, figures = report(part, results), {"machine": machine, "results": results}
    write_file(folder / f"{part}.json", (json.dumps(figures, indent=2) + "\n").encode())
    write_file(folder / f"{part}.md", text.encode())
    draw_course(part, results, folder / f"{part}.png")
    print(f"\n{text}\nfigures, table and picture: {here(folder / part)}.json, .md, .png")
