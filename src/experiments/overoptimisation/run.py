"""Over-optimisation of a PPO run: the reward it was trained on and one it never saw, over the distance from SFT.

    python src/experiments/main.py -t overoptimisation ppo_demo_s0
    python src/experiments/main.py -t overoptimisation runs/ppo_hh_20260101120000 --judge rm:rm_large
    python src/experiments/main.py -t overoptimisation ppo_mine --reward-fn reward.py:score --judge gold.py:score

A run only tells which Python functions it was trained with; those that are run are named on the command line.

The policy is graded at every checkpoint that the run has kept (train_ppo.py --save-every 4 --keep 10 keeps ten of a run
of forty iterations; the default is two). Before the first of them stand the run's own held-out evaluations, one every
--eval-every: fewer prompts, no interval, and a gold reward only of a run with --eval-reward-fn. Best-of-n of the SFT
model is set beside it at n = 1, 2, 4, ... (Gao et al. 2022, figure 1). Writes overoptimisation.json and
overoptimisation.png into the run's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config.scrub import scrubbed
from config.user_error import UserError
from experiments.doctor.record import find_run, read_series
from experiments.graded_answers import Graded, Grader, Proxy, text_model
from experiments.markdown import interval, number, table
from experiments.overoptimisation.curves import REWARDS, by_step, highest_gold, overoptimisation_curves
from experiments.overoptimisation.picture import draw_overoptimisation
from inference.answers import Answer, Machine, Sampling, score_answers, score_texts
from inference.systems import check_stage, load_reward_model
from models.weights.checkpoint import describe
from training.engine.runtime import Runtime
from utils.data.sources import open_source
from utils.demo.gold import gold_reward
from utils.judging.judges import Score
from utils.reward_function import RewardFunction, load_reward_function, moved
from utils.runs.durable import write_file
from utils.runs.finding import find_checkpoint, step_checkpoints
from utils.runs.folder import typed_path
from utils.runs.origins import find_origin
from utils.template import PromptTemplate

_FEWEST_PROMPTS = 256
# What is used of a run's settings; a run from elsewhere may hold anything.
_SETTINGS = {
    "dataset": str, "batch_size": int, "temperature": (int, float), "response_length": int, "reward_fn": str,
    "reward_fn_weight": (int, float),
}  # fmt: skip
_DRAWING = threading.Lock()  # `-t results` judges several seeds side by side, and matplotlib is not made for that
# Of the rows that fit where training fits. There are no gradients here, but the log-probabilities of all tokens.
_ROWS_PER_TRAINED = 4


@dataclass(frozen=True)
class PPORun:
    """A run of train_ppo.py: its folder, its settings, and the checkpoints it started from (rm: None without one)."""

    folder: Path
    config: dict[str, Any]
    sft: Path
    rm: Path | None

    @classmethod
    def read(cls, folder: Path, runs_dir: str = "runs") -> PPORun:
        """From hyperparams.json; `runs_dir` is where else the models are looked for that it started from.

        UserError where it is no PPO run, or the models it started from are gone.
        """
        try:
            hyperparams = json.loads((folder / "hyperparams.json").read_text())
            stage, config = hyperparams.get("stage"), dict(hyperparams.get("config", {}))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"RUN {folder}: hyperparams.json cannot be read ({error}); give a PPO run") from None
        if stage != "ppo":
            raise UserError(f"RUN {folder}: is a run of stage {stage}; give a run of train_ppo.py")
        unusable = [name for name, kind in _SETTINGS.items() if not isinstance(config.get(name), kind)]
        if unusable:
            raise UserError(f"RUN {folder}: hyperparams.json has no usable {', '.join(unusable)}; give a PPO run")
        sft, rm = (find_origin(hyperparams, key, folder, runs_dir, f"RUN {folder}") for key in ("sft", "rm"))
        return cls(folder, config, sft, rm)

    def checkpoints(self) -> dict[int, Path]:
        """The policies that the run has kept, by step, without the one at step 0; UserError while there is none."""
        folders = [*step_checkpoints(self.folder), self.folder / "final"]
        found = {describe(f)["step"]: f for f in folders if (f / "model.json").is_file()}
        found.pop(0, None)
        if not found:
            raise UserError(f"RUN {self.folder}: has saved no checkpoint yet; wait for the first, see --save-every")
        return dict(sorted(found.items()))

    def evaluations(self, judge: str) -> list[dict[str, Any]]:
        """The run's own held-out evaluations as rows like those of `overoptimisation_curves`, without intervals.

        Rewards are above those of step 0, which is the SFT model. "gold" is None where the run had no --eval-reward-fn,
        or where that is another one than `judge`. UserError where metrics.jsonl is malformed.
        """
        log = self.folder / "metrics.jsonl"
        series = read_series(log) if log.is_file() else {}
        tags = {"kl": "eval/kl", "proxy": "eval/score", "gold": "eval/gold"}
        figures = {
            name: dict(zip(series[tag].steps.tolist(), series[tag].values.tolist()))
            for name, tag in tags.items()
            if tag in series and (name != "gold" or _same_judge(judge, self.config.get("eval_reward_fn")))
        }

        def gained(reward: str, step: int) -> float | None:
            values = figures.get(reward, {})
            above = values.get(step, math.nan) - values.get(0, math.nan)
            return above if math.isfinite(above) else None

        rows = (
            {"step": step, "source": "evaluation", "kl": kl, "d": math.sqrt(max(kl, 0.0))}
            | {reward: gained(reward, step) for reward in REWARDS}
            for step, kl in figures.get("kl", {}).items()
            if step > 0 and math.isfinite(kl)
        )
        return [row for row in rows if row["proxy"] is not None]


def _same_judge(judge: str, recorded: str | None) -> bool:
    """Whether the reward function that a run recorded is the one that --judge names."""
    if not recorded:
        return False
    if judge == "gold":
        return moved(recorded).endswith("utils/demo/gold.py:gold_reward")
    return os.path.realpath(judge) == os.path.realpath(recorded)


def reward_function_of(run: PPORun, given: str = "") -> RewardFunction | None:
    """The reward function that the run was trained on, as the user names it; None for a run without one.

    What the run recorded is only shown: a folder from elsewhere could name any file, and importing it runs it.
    UserError where the run had one and `given` (--reward-fn) is "", or the other way round, or it cannot be imported.
    """
    recorded = run.config["reward_fn"]
    # With a reward model a function of weight 0 does not count.
    if not recorded or not (run.rm is None or run.config["reward_fn_weight"]):
        if given:
            raise UserError(f"--reward-fn {given}: RUN {run.folder} was trained without one; leave it out")
        return None
    if not given:
        raise UserError(
            f"--reward-fn: RUN {run.folder} was trained on a reward function, recorded as {recorded!r}; what a run "
            "names is not imported: look at it and name it yourself: python src/experiments/main.py "
            f"-t overoptimisation {shlex.quote(str(run.folder))} --reward-fn FILE.py:FUNCTION"
        )
    return load_reward_function(given, "--reward-fn")


def proxy_of(run: PPORun, machine: Machine, function: RewardFunction | None) -> Proxy:
    """What the run maximised, without the KL penalty and the penalty for a missing EOS: the reward model on the sampled
    ids, and the run's own reward function (`reward_function_of`) with its weight."""
    rm = load_reward_model(run.rm, f"RUN {run.folder}") if run.rm else None
    weight = run.config["reward_fn_weight"] if rm else 1.0  # in place of the reward model it counts in full

    def proxy(answers: Sequence[Answer], name: str) -> np.ndarray:
        scores = np.zeros(len(answers)) if rm is None else score_answers(rm, answers, machine, name, own_ids=True)
        if function is not None:
            scores = scores + weight * np.array(function([a.prompt for a in answers], [a.text for a in answers]))
        return scores

    return proxy


def gold_of(spec: str, run: PPORun, runs_dir: str, machine: Machine) -> Score:
    """The judge that --judge names, as a function of (prompts, answers); "" is `gold` on the demo's data.

    UserError where there is no such judge, or none was named for data that have no gold reward.
    """
    dataset, recorded = run.config["dataset"], run.config.get("eval_reward_fn")
    if not spec and dataset != "demo":
        known = f" (the run recorded --eval-reward-fn {recorded!r}, which is not imported unasked)" if recorded else ""
        raise UserError(f"--judge: {dataset} has no gold reward{known}; give rm:CHECKPOINT or FILE.py:FUNCTION")
    if spec in ("", "gold"):
        return gold_reward
    if spec.startswith("rm:"):
        checkpoint = find_checkpoint(spec[3:], runs_dir, "--judge")
        check_stage(checkpoint, f"--judge {spec}", ("rm",))
        return score_texts(load_reward_model(checkpoint, f"--judge {spec}"), machine)
    if spec.rpartition(":")[0].endswith(".py"):
        return load_reward_function(spec, "--judge")
    raise UserError(f"--judge {spec}: there are gold, rm:CHECKPOINT and FILE.py:FUNCTION")


def held_out_prompts(dataset: str, template: PromptTemplate, count: int, split: str = "test") -> list[str]:
    """The first `count` different prompts of a held-out split, in the template's form."""
    rows = open_source(dataset, "ppo", template=template, skip_bad_rows=True).rows(split)
    return list(islice(dict.fromkeys(row.prompts[0] for row in rows), count))


def measure(run: PPORun, grader: Grader, known: dict[int, Graded] | None = None) -> dict[int, Graded]:
    """The run's checkpoints on the grader's prompts, all with the same random numbers, so that what differs is the
    policy. `known`: those that are graded already."""
    known = known or {}
    todo = {step: folder for step, folder in run.checkpoints().items() if step not in known}
    bar = tqdm(todo.items(), desc="checkpoints", unit="", leave=False, delay=1, disable=None)
    return known | {step: grader.grade(text_model(folder), "ppo") for step, folder in bar}


def write_overoptimisation(
    run: PPORun, checkpoints: dict[int, Graded], samples: Sequence[Graded], judge: str, sampling: Sampling, out: Path
) -> tuple[dict[str, Any], Path]:
    """Write overoptimisation.json and .png into `out`; returns the figures and the picture's path.

    Before the first checkpoint that was kept the run's own evaluations stand in for those that were not.
    """
    about = {"run": run.folder.name, "judge": judge, **asdict(sampling)}
    figures = about | overoptimisation_curves(checkpoints, samples, sampling.seed)
    figures["evaluations"] = [row for row in run.evaluations(judge) if row["step"] < min(checkpoints)]
    write_file(out / "overoptimisation.json", (json.dumps(scrubbed(figures), indent=2) + "\n").encode())
    picture = out / "overoptimisation.png"
    picture.unlink(missing_ok=True)  # in a run from elsewhere it could be a link
    with _DRAWING:
        draw_overoptimisation(figures, picture)
    return figures, picture


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """Grade, fit, write, draw, tell: `-t overoptimisation` with the flags `rest`; UserError where one is wrong."""
    parser.description = (
        "A PPO run is graded at the checkpoints that it has kept: train_ppo.py keeps the newest --keep of one every "
        "--save-every. Before these its own held-out evaluations are drawn (--eval-every; their gold reward needs "
        "--eval-reward-fn). So what can be drawn is decided when the run is started."
    )
    parser.add_argument("run", metavar="RUN", help="a PPO run: its folder, or its name such as ppo_demo")
    text = "gold (the demo's, the default there), rm:CHECKPOINT, FILE.py:FUNCTION"
    parser.add_argument("--judge", default="", help=text)
    text = "FILE.py:FUNCTION that the run was trained on; what it recorded is not imported"
    parser.add_argument("--reward-fn", default="", help=text)
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts, of the test split")
    parser.add_argument("--best-of", type=int, default=16, help="samples of the SFT model per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the bootstrap")
    parser.add_argument("--out", default="", help="folder to write to; the run's own by default")
    parser.add_argument("--runs-dir", default="runs", help="where run folders are looked for")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    flags = parser.parse_args(rest)
    for flag, count in (("--prompts", flags.prompts), ("--best-of", flags.best_of)):
        if count < 2:
            parser.error(f"argument {flag}: must be at least 2")
    ppo = PPORun.read(find_run(flags.run, flags.runs_dir), flags.runs_dir)
    judge = flags.judge or "gold"
    ppo.checkpoints(), ppo.evaluations(judge)  # before anything slow, like the next lines
    function = reward_function_of(ppo, flags.reward_fn)
    out = typed_path(flags.out) if flags.out else ppo.folder
    with contextlib.suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: cannot write there; give another folder")
    runtime = Runtime(flags.device, flags.dtype, flags.seed)
    machine = Machine(runtime.device, _ROWS_PER_TRAINED * ppo.config["batch_size"], runtime.autocast)
    dataset = ppo.config["dataset"]
    gold = gold_of(flags.judge, ppo, flags.runs_dir, machine)
    print(f"the run names SFT model {ppo.sft}, reward model {ppo.rm or 'none'}, data set {dataset}; they are read")
    sft = text_model(ppo.sft)
    prompts = held_out_prompts(dataset, sft.template, flags.prompts)
    if len(prompts) < _FEWEST_PROMPTS:
        print(f"note: {len(prompts)} prompts; the KL of the x axis is rough with fewer than {_FEWEST_PROMPTS}")
    sampling = Sampling(ppo.config["temperature"], ppo.config["response_length"], flags.seed)
    grader = Grader(sft, proxy_of(ppo, machine, function), gold, prompts, sampling, machine)
    samples = grader.draws(flags.best_of)
    figures, picture = write_overoptimisation(ppo, measure(ppo, grader), samples, judge, sampling, out)
    print(f"{report(figures)}\nover-optimisation picture: {picture}")
    return 0


def report(figures: dict[str, Any]) -> str:
    """The figures as a table, and a line per peak."""
    policies = by_step(figures)
    points = [(f"PPO, step {p['step']}" + (", by the run" if p["source"] == "evaluation" else ""), p) for p in policies]
    points += [(f"best of {p['n']}", p) for p in figures["best_of_n"][1:]]
    rows = []
    for name, p in points:
        ends = {r: f" {interval(p[f'{r}_ci'], '+.2f')}" if f"{r}_ci" in p else "" for r in REWARDS}
        rewards = (number(p[r], "+.2f", ends[r]) for r in REWARDS)
        rows.append((name, f"{p['kl']:.2f}", *rewards, number(p.get("correlation"), ".2f")))
    head = "policy | KL to SFT | proxy above SFT (95 % interval) | gold above SFT | correlation of the two"
    lines = ["", table(head, rows), ""]
    families = (
        ("ppo", "PPO", "three checkpoints are needed (train_ppo.py --save-every 4 --keep 10)"),
        ("best_of_n", "best-of-n", "--best-of 8"),
    )
    for key, name, remedy in families:
        for reward in REWARDS:
            fit = figures["fits"][key][reward]
            told = f"too few different distances to fit a curve; {remedy}" if fit is None else peak_in_words(fit)
            lines.append(f"{name}, {reward}: {told}")
    if figures["evaluations"]:
        lines.append('"by the run": no checkpoint was kept there; what its own evaluation logged, above that of step 0')
    best = highest_gold(policies)
    lines.append(f"highest gold reward measured: step {best['step']}, {best['gold']:+.2f} at a KL of {best['kl']:.2f}")
    return "\n".join(lines)


def peak_in_words(fit: dict[str, Any]) -> str:
    """What a fit says of its highest point."""
    text = f"a = {fit['a']:.3f}, b = {fit['b']:.3f}"
    if not fit["peak_within_data"]:
        return f"{text}; no peak within what was measured"
    low, high = (f"{end**2:.1f}" if end is not None else "never" for end in fit["peak_d_ci"])
    return f"{text}; peak at a KL of {fit['peak_d'] ** 2:.1f} nats ({low} to {high}), {fit['peak_reward']:+.2f}"
