"""The offline demo: vanilla -> SFT -> reward model -> PPO with the scripts a user runs, judged by the gold reward.

`make demo` runs one seed, judges it on validation prompts and fails when RLHF did not work. `-t results --seeds 0 1 2
--variants kl0 lora --split test` makes the tables of docs/results.md and the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config.user_error import UserError
from experiments.bench.host import Stolen
from experiments.demo.judge import judge_demo
from experiments.demo.picture import draw_demo, draw_kl_ablation
from experiments.demo.table import judged_table, results_table, seed_table
from experiments.markdown import number
from utils.runs.finding import newest_run
from utils.runs.folder import REPO, runs_root

GOLD = str(REPO / "src/utils/demo/gold.py") + ":gold_reward"


class Stage(NamedTuple):
    """One script of the demo: what it is called in the table, the script, and its flags."""

    name: str
    script: str
    flags: tuple[str, ...]


def stages(stem: str, variants: tuple[str, ...], flags: tuple[str, ...] = ()) -> list[Stage]:
    """The commands of one seed; `stem` tells its runs apart from other seeds', `flags` go to every script."""
    ppo = ("-a", f"sft_{stem}", "-c", f"rm_{stem}", "--eval-reward-fn", GOLD)
    # 300 steps on the world's plain text stand for GPT-2's pre-training.
    pretraining = ("-p", "scratch", "--dataset", "demo-text", "--epochs", "4", "--max-steps", "300")
    plan = [
        ("vanilla", "train_sft.py", ("-n", f"vanilla_{stem}", *pretraining)),
        ("SFT", "train_sft.py", ("-n", stem, "-p", f"sft_vanilla_{stem}")),
        ("reward model", "train_rm.py", ("-n", stem, "-p", f"sft_{stem}")),
        # Ten checkpoints are the ten dots of the pictures.
        ("PPO", "train_ppo.py", ("-n", stem, *ppo, "--save-every", "4", "--keep", "10")),
    ]
    extra = {
        "kl0": ("PPO, KL coefficient 0", "train_ppo.py", ("-n", f"{stem}_kl0", *ppo, "--kl-coef", "0")),
        "lora": ("PPO, LoRA", "train_ppo.py", ("-n", f"{stem}_lora", *ppo, "--config", "gpt2-nano/lora")),
    }
    return [Stage(name, script, own + flags) for name, script, own in [*plan, *(extra[v] for v in variants)]]


def run_stage(stage: Stage, seed: int, runs_dir: str, side_by_side: bool) -> float:
    """Run one script to its end; returns the seconds it took. Side by side with others it has one thread and a log.

    UserError where the script fails; its own message is on the terminal, or in the log file.
    """
    script, flags = f"src/training/{stage.script}", [*stage.flags, "--seed", str(seed)]
    shown = " ".join(["python", script, *flags])
    print(f"\n== {stage.name}\n$ {shown}", flush=True)
    started = time.perf_counter()
    root = runs_root(runs_dir)
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPO / script), *flags, "--runs-dir", runs_dir]
    if side_by_side:
        log, environment = root / f"{stage.flags[1]}_{stage.script[6:-3]}.log", os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    else:
        log, code = None, subprocess.run(command).returncode
    if code:
        raise UserError(f"{stage.name}: {shown} ended with exit code {code}" + (f"; see {log}" if log else ""))
    return time.perf_counter() - started


def run_seed(
    seed: int, runs_dir: str, variants: tuple[str, ...], prompts: int, flags: tuple[str, ...] = (),
    split: str = "validation", side_by_side: bool = False, train: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """All stages of one seed and their judgement on a held-out split; `flags` go to every script.

    With `train` False the newest runs of the seed are judged as they are.
    """
    stem = f"demo_s{seed}"
    plan = stages(stem, variants, flags) if train else []
    seconds = {stage.name: run_stage(stage, seed, runs_dir, side_by_side) for stage in plan}
    print("\n== judging by the gold reward", flush=True)
    started = time.perf_counter()
    runs = {"vanilla": f"sft_vanilla_{stem}", **{stage: f"{stage}_{stem}" for stage in ("sft", "rm", "ppo")}}
    runs |= {f"ppo_{v}": f"ppo_{stem}_{v}" for v in variants}
    result = judge_demo({name: newest_run(run, runs_dir) for name, run in runs.items()}, prompts, seed, split)
    seconds["judging"] = time.perf_counter() - started
    return {"seed": seed, "seconds": seconds, **result}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `-t demo` and `-t results` have in common."""
    parser.add_argument("--runs-dir", default="runs", help="where run folders are made")
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts to judge on; there are 400")


def run_demo(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """What `make demo` does; 1 when RLHF did not work."""
    add_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="matrix precision of all stages")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="of all stages")
    flags = parser.parse_args(rest)
    given = {"--dtype": flags.dtype, "--device": flags.device}
    everywhere = tuple(word for pair in given.items() if pair[1] for word in pair)
    started, stolen = time.perf_counter(), Stolen()
    result = run_seed(flags.seed, flags.runs_dir, (), flags.prompts, everywhere)
    print(seed_table(result))
    minutes = (time.perf_counter() - started) / 60
    took = ", ".join(f"{name} {s:.0f} s" for name, s in result["seconds"].items())
    root = runs_root(flags.runs_dir)
    path = root / "demo.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    others = number(stolen.share(), ".1%", " of the machine's time went to other guests of its host")
    print(f"\n{minutes:.1f} minutes ({took}){others and '; '}{others}")
    print(f"figures in {here(path)}")
    print(judged_table(result))
    draw_demo(Path(result["overoptimisation"]).with_suffix(".json"), root / "demo.png")
    print(next_steps(flags.seed, flags.runs_dir))
    failed = failures(result)
    for line in failed:
        print(f"FAILED: {line}")
    if not failed:
        print("RLHF worked: the policy beats the model it started from, by a reward that it never saw.")
    return 1 if failed else 0


def next_steps(seed: int, runs_dir: str) -> str:
    """The picture's place, and three commands that can be copied as they stand."""
    python, tensorboard = sys.executable, str(Path(sys.executable).with_name("tensorboard"))
    root, main = runs_root(runs_dir), [python, str(REPO / "src/experiments/main.py")]
    # A stem is looked up in the repository's runs/ alone by -t gpt.
    ppo = f"ppo_demo_s{seed}" if runs_dir == "runs" else here(newest_run(f"ppo_demo_s{seed}", runs_dir))
    commands = [
        ("ask the trained model", [*main, "-t", "gpt", "-m", ppo, "--prompt", "What is the capital of Italy?"]),
        ("see whether a run is healthy", [*main, "-t", "doctor", ppo]),
        ("all curves, in a browser", [tensorboard, "--logdir", str(root)]),
    ]
    lines = [f"{what}:\n    {shlex.join(map(here, words))}" for what, words in commands]
    return "\n".join([f"the course of PPO as a picture: {here(root / 'demo.png')}", "what to do next:", *lines])


def here(word: str | Path) -> str:
    """A path as it is named from the working folder; any other word as it stands."""
    path = Path(word)
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if inside else word)


def failures(result: dict[str, Any]) -> list[str]:
    """What a run of the demo must reach, on any machine; wide of the figures that docs/results.md gives."""
    ppo = result["systems"]["ppo"]
    gold, sft, best = (result["systems"][name]["gold"] for name in ("ppo", "sft", "best_of_16"))
    right, low = result["reward_model"]["noise_free_accuracy"], ppo["win_rate_ci"][0]
    checks = [
        (right > 0.85, f"reward model orders {right:.2f} of the noise-free pairs, expected over 0.85"),
        (low > 0.8, f"PPO's win rate over SFT has its lower bound at {low:.2f}, expected over 0.80"),
        (gold > sft + 1.5, f"PPO's gold reward {gold:.2f} is not 1.5 above SFT's {sft:.2f}"),
        (gold > best, f"PPO's gold reward {gold:.2f} is not above best-of-16's {best:.2f}"),
        (ppo["kl"] < 10, f"PPO went {ppo['kl']:.1f} nats away from SFT, expected under 10"),
        (ppo["eos_rate"] > 0.95, f"only {ppo['eos_rate']:.2f} of PPO's responses end, expected over 0.95"),
    ]
    return [message for passed, message in checks if not passed]


def run_results(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Several seeds and variants, `--parallel` at a time with one thread each; prints the tables of docs/results.md."""
    add_flags(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=["kl0", "lora"], choices=["kl0", "lora"])
    parser.add_argument("--parallel", type=int, default=1, help="seeds run at the same time, with one thread each")
    text = "test: for a final table alone"
    parser.add_argument("--split", choices=["validation", "test"], default="validation", help=text)
    text = "judge the newest runs of the seeds; train nothing"
    parser.add_argument("--judge-only", action="store_true", help=text)
    parser.add_argument("--picture", default="assets/overoptimisation.png", help="where to draw the KL ablation")
    flags = parser.parse_args(rest)
    runs_dir = flags.runs_dir
    with ThreadPoolExecutor(flags.parallel) as pool:
        one_seed = partial(
            run_seed, runs_dir=runs_dir, variants=tuple(flags.variants), prompts=flags.prompts, split=flags.split,
            side_by_side=flags.parallel > 1, train=not flags.judge_only,
        )  # fmt: skip
        results = list(pool.map(one_seed, flags.seeds))
    path = runs_root(runs_dir) / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(results_table(results))
    print(f"figures in {path}")
    if "kl0" in flags.variants:
        names = [(f"ppo_demo_s{seed}", f"ppo_demo_s{seed}_kl0") for seed in flags.seeds]
        runs = [(newest_run(with_penalty, runs_dir), newest_run(without, runs_dir)) for with_penalty, without in names]
        draw_kl_ablation(runs, Path(flags.picture))
        print(f"picture in {flags.picture}")
    failed = [f"seed {r['seed']}: {line}" for r in results for line in failures(r)]
    print("\n".join(f"FAILED: {line}" for line in failed))
    return 1 if failed else 0
