"""Compares systems on the same prompts, pair by pair, with a judge that sees every pair in both orders.

    python src/utils/evaluate.py -s sft_hh -p ppo_hh -v gpt2-medium            a language model judges (openai.key)
    python src/utils/evaluate.py -s sft_demo -p ppo_demo --best-of 4,16 --judge gold       the demo's own reward

Writes runs/eval_NAME_TIME/: evaluation.json, evaluation.md, evaluation.png, and answers/SYSTEM.jsonl, which --system
takes again. Exit code 1 when some verdicts could not be had: the report is written, and the same command once more asks
only for those.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config.configs import PPOConfig, stage_defaults
from config.terminal import outlive_terminal
from config.user_error import UserError, run_main
from inference.answer_sets import Answering, AnswerSet
from inference.answers import Machine, Sampling, score_texts
from inference.systems import (
    System,
    check_stage,
    common_template,
    find_reward_model,
    find_systems,
    load_reward_model,
    run_around,
)
from utils.demo.gold import gold_reward
from utils.evaluation.flags import EvaluateConfig, parse_flags
from utils.evaluation.picture import draw_evaluation
from utils.evaluation.prompts import DEFAULT_FILE, read_prompts
from utils.evaluation.report import Evaluation, pair_table, reasons, write_evaluation
from utils.judging.judges import ScoreJudge, make_judge
from utils.judging.pairwise import Comparison, Judge, both_orders, compare
from utils.judging.requests import JudgeOptions
from utils.runs.finding import find_checkpoint
from utils.runs.folder import create_run, runs_root, write_hyperparams

_RUN = re.compile(r"(.+)_\d{14}")
_LONGEST_NAME = 40  # characters of one system in the name of a folder


def main(argv: list[str] | None = None) -> int:
    """The command line; `argv` is for tests."""
    config = parse_flags(argv, __doc__)
    systems = find_systems(config.sft, config.ppo, config.vanilla, config.best_of_sizes, config.system, config.runs_dir)
    template = common_template(systems)
    prompts = read_prompts(config.prompts or _default_prompts(systems), template, config.limit)
    print(f"{len(prompts.texts)} prompts from {prompts.source}; {prompts.repeated} repeated ones left out")
    ppo = next((system for system in systems if system.flag.startswith("-p ")), None)
    rm_folder, line = find_reward_model(config.reward_model, ppo, config.runs_dir)
    if config.best_of and rm_folder is None:
        raise UserError(f"--best-of: a reward model has to choose; name it with -c ({line})")
    print(line)
    sampling = _sampling(config, ppo, systems)
    machine = Machine.chosen(config.device, config.dtype, config.batch_size, config.seed)
    judge = _judge(config, machine)
    if not isinstance(judge, ScoreJudge) and not config.yes and not sys.stdin.isatty():
        calls = len(prompts.texts) * len(systems) * (len(systems) - 1)
        raise UserError(f"--yes: is needed to ask the judge up to {calls} times without a terminal to confirm it on")

    reward_model = load_reward_model(rm_folder, "-c") if rm_folder else None
    cache = runs_root(config.runs_dir) / ".cache" / "answers"
    sets = Answering(prompts.texts, template, sampling, machine, reward_model, cache).answer_sets(systems)
    name = config.name or name_of(systems)
    run = create_run("eval", name, config.runs_dir)
    outlive_terminal()  # verdicts may be paid for
    settings = {
        **asdict(sampling), "prompts": prompts.source, "prompt_count": len(prompts.texts),
        "repeated_prompts": prompts.repeated, "reward_model": str(rm_folder) if rm_folder else None,
        "runs_on": machine.describe(),
    }  # fmt: skip
    write_hyperparams(run, "eval", asdict(config), {}, settings)
    _write_answers(run, sets)
    # Later systems against earlier ones: SFT vs vanilla, PPO vs vanilla, PPO vs SFT.
    pairs = [(later, earlier) for i, later in enumerate(sets) for earlier in sets[:i]]
    if not _agreed(judge, prompts.texts, pairs, config.yes):
        print(f"nothing was asked; the answers are in {run / 'answers'}")
        return 1

    try:
        comparisons = [compare(a.system.name, b.system.name, prompts.texts, a.texts, b.texts, judge) for a, b in pairs]
    except KeyboardInterrupt:
        print("\nstopped; verdicts so far are kept, and the same command asks for the others", file=sys.stderr)
        return 130
    gold = judge.score if isinstance(judge, ScoreJudge) else gold_reward if prompts.of_demo else None
    evaluation = Evaluation(
        name=name, settings=settings, judge=judge.describe(), comparisons=comparisons,
        systems={s.system.name: s.figures(gold) for s in sets}, prompts=prompts.texts,
        texts={s.system.name: s.texts for s in sets},
        proxy={s.system.name: s.proxy for s in sets if s.proxy is not None},
        gold={s.system.name: s.rewards(gold) for s in sets} if gold else {},
    )  # fmt: skip
    write_evaluation(run, evaluation)
    draw_evaluation(evaluation, run / "evaluation.png")
    print(f"\n{pair_table(evaluation)}\n\nwritten to {run}")
    return _exit_code(comparisons, evaluation.judge)


def name_of(systems: list[System]) -> str:
    """What is compared, as a name for a folder: ppo_hh_vs_sft_hh; best-of-n and systems beyond the fourth are left out.

    A run goes by its folder's name without the time, a Hugging Face model by its own, a --system by its NAME.
    """
    names = []
    for system in systems:
        name = system.name
        if system.kind == "best_of_n":
            continue
        if not system.flag.startswith("--system"):
            path = Path(system.source).absolute()
            runs = [match[1] for part in (path, *path.parents[:2]) if (match := _RUN.fullmatch(part.name))]
            name = next(iter(runs), path.name)
        names.append(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:_LONGEST_NAME] or system.name)
    names = list(dict.fromkeys(reversed(names)))  # later against earlier, as in the tables
    return "_vs_".join(names[:4])


def _default_prompts(systems: list[System]) -> str:
    """The demo's own prompts for its models: they know no other words."""
    if not next((system.of_demo for system in systems if system.kind != "file"), False):
        return str(DEFAULT_FILE)
    print("--prompts demo: these models know the demo's words only")
    return "demo"


def _sampling(config: EvaluateConfig, ppo: System | None, systems: list[System]) -> Sampling:
    """Temperature and length: the flags', the PPO run's, or the preset's."""
    trained = run_around(Path(ppo.source))[1].get("config", {}) if ppo is not None else {}
    temperature = config.temperature
    if temperature == -1:
        preset = stage_defaults(PPOConfig, "gpt2-nano" if any(s.of_demo for s in systems) else "gpt2")
        temperature = trained.get("temperature", preset.temperature)
    length = config.max_new_tokens or trained.get("response_length", 64)
    print(f"answers: temperature {temperature:g}, at most {length} tokens, seed {config.seed}")
    return Sampling(float(temperature), int(length), config.seed)


def _judge(config: EvaluateConfig, machine: Machine) -> Judge:
    def load_scores(argument: str):
        folder = find_checkpoint(argument, config.runs_dir, "--judge rm:")
        check_stage(folder, f"--judge rm:{argument}", ("rm",))
        return score_texts(load_reward_model(folder, f"--judge rm:{argument}"), machine)

    options = JudgeOptions(
        model=config.judge_model, base_url=config.base_url or None, concurrency=config.concurrency,
        cache=runs_root(config.runs_dir) / "judge_cache.jsonl", max_cost=config.max_cost or None, price=config.price,
        max_wait=config.max_wait,
    )  # fmt: skip
    return make_judge(config.judge, options, load_scores)


def _write_answers(run: Path, sets: list[AnswerSet]) -> None:
    """answers/SYSTEM.jsonl, in the form that --system takes."""
    (run / "answers").mkdir()
    for found in sets:
        with (run / "answers" / f"{found.system.name}.jsonl").open("w", encoding="utf-8") as file:
            for a in found.answers:
                row = {"prompt": a.prompt, "response": a.text, "tokens": a.tokens, "ended": a.ended}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _agreed(judge: Judge, prompts: list[str], pairs: list[tuple[AnswerSet, AnswerSet]], yes: bool) -> bool:
    """Tell what judging takes, and ask on a terminal whether that is all right."""
    questions = [q for a, b in pairs for q in both_orders(prompts, a.texts, b.texts)]
    plan = judge.plan(questions)
    print(f"pairs of systems: {len(pairs)}, questions: {plan.questions}; {plan.note}", flush=True)
    if yes or not plan.calls:
        return True
    try:
        return input("Go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _exit_code(comparisons: list[Comparison], judge: dict[str, Any]) -> int:
    """1 when verdicts are missing, and why, on the terminal."""
    unparsed, failed = sum(c.unparsed for c in comparisons), sum(c.failed for c in comparisons)
    if not unparsed + failed:
        return 0
    judged = sum(c.n for c in comparisons)
    print(
        f"{judged} comparisons have a verdict, {unparsed} were answered unclearly and {failed} not at all; they are in "
        "no win rate. The same command asks only for what is missing.",
        file=sys.stderr,
    )
    for line in reasons(judge):
        print(f"  questions {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_main(main)
