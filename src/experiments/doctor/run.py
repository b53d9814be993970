"""The doctor: reads a run of any stage and says what is wrong with it, from what, and what to change.

    python src/experiments/main.py -t doctor ppo_demo

Exit code 0: healthy as far as can be told; 3: there are findings; 2: there is no such run, or it cannot be read.
docs/doctor.md has what each finding means.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from config.scrub import printable
from config.user_error import UserError
from experiments.doctor import ppo_curves as curves
from experiments.doctor import ppo_loop as loop
from experiments.doctor.record import RunRecord, find_run, read_run
from experiments.doctor.rules import (
    RM_RULES,
    SFT_RULES,
    Finding,
    Rule,
    Unclear,
    diagnose,
    gradient_spikes,
    not_a_number,
)
from utils.runs.folder import refuse_links

# In the order of the causes: a fault high up (dropout on, say) brings others further down with it.
_PPO_RULES: tuple[Rule, ...] = (
    not_a_number, loop.ratio_not_one, loop.kl_at_start, loop.sampler_differs, loop.entropy_negative,
    loop.ends_at_start, loop.reward_model_at_chance, loop.reward_not_normalised, loop.score_constant,
    loop.steps_too_large, loop.does_not_move, curves.over_optimised, curves.kl_explodes, curves.kl_negative,
    curves.kl_without_score, curves.reward_falls, curves.stops_ending, curves.length_changes, curves.entropy_collapses,
    curves.text_degenerates, curves.kl_coef_saturates, curves.critic_is_blind, curves.critic_off_scale,
    gradient_spikes(("grad_norm/actor", "grad_norm/critic")),
)  # fmt: skip
RULES: dict[str, tuple[Rule, ...]] = {"sft": SFT_RULES, "rm": RM_RULES, "ppo": _PPO_RULES}
_NAMES = {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """The task `-t doctor`: 0 healthy, 3 with findings.

    Raises:
        UserError: there is no such run, it cannot be read, or the pictures cannot be written.
    """
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a stem such as ppo_demo: its newest run")
    parser.add_argument("--runs-dir", default="runs", help="where stems are looked up")
    parser.add_argument("--pictures", default="", help="folder for the pictures of the findings; default: RUN/doctor")
    flags = parser.parse_args(rest)
    folder = find_run(flags.run, flags.runs_dir)
    record = read_run(folder, flags.runs_dir)
    findings, unclear = examine(record)
    pictures = draw(record, findings, Path(flags.pictures) if flags.pictures else None)
    print(printable(report(record, findings, unclear, pictures)))
    return 3 if findings else 0


def examine(record: RunRecord) -> tuple[list[Finding], list[Unclear]]:
    """What is wrong with a run, likeliest cause first, and what cannot be judged."""
    return diagnose(record, RULES[record.stage])


def draw(record: RunRecord, findings: list[Finding], elsewhere: Path | None) -> list[Path]:
    """One picture for each finding, in RUN/doctor in place of those of an earlier visit, or in a folder elsewhere.

    Raises:
        UserError: the folder cannot be written, or is a link out of the run.
    """
    folder = elsewhere or record.folder / "doctor"
    if not elsewhere:
        refuse_links(folder)
    try:
        for old in () if elsewhere else folder.glob("*.png"):
            old.unlink()
        if not findings:
            return []
        from experiments.doctor.picture import draw_finding  # matplotlib takes a second to import

        paths = [folder / f"{finding.code}.png" for finding in findings]
        for finding, path in zip(findings, paths):
            draw_finding(finding.of or record, finding, path)
        return paths
    except OSError as error:
        raise UserError(
            f"--pictures {folder}: cannot write there ({error.strerror}); give a folder that can be written"
        ) from None


def report(record: RunRecord, findings: list[Finding], unclear: list[Unclear], pictures: list[Path]) -> str:
    """The visit as text."""
    of = f" of {record.planned_steps}" if record.planned_steps else ""
    unit = "iterations" if record.stage == "ppo" else "steps"
    state = "finished" if record.finished else "not finished"
    lines = [f"{record.folder}: {_NAMES[record.stage]}, {record.last_step}{of} {unit}, {state}"]
    for number, (finding, picture) in enumerate(zip(findings, pictures), start=1):
        where = f" of its reward model's run {finding.of.folder.name}" if finding.of else ""
        rows = [
            (
                "seen",
                f"{finding.tag} is {finding.value:.4g} at step {finding.step}{where}; healthy: {healthy(finding)}",
            ),
            *(("", note) for note in finding.notes),
            ("picture", str(picture)),
            *(("likely" if i == 0 else "or", f"{c.why} -> {c.change}") for i, c in enumerate(finding.causes)),
        ]
        lines += ["", f"{number}. {finding.code}: {finding.title}"]
        lines += [_row(head, text) for head, text in rows]
    if unclear:
        lines += ["", "cannot be judged here, for want of:"]
        lines += [_row(item.code, item.missing, 24) for item in unclear]
    if not findings:
        lines += ["", "no findings" + (" in what can be judged" if unclear else "")]
    return "\n".join(lines)


def healthy(finding: Finding) -> str:
    """The healthy range of a finding's figure in words."""
    if finding.low is not None and finding.high is not None:
        return f"{finding.low:.4g} to {finding.high:.4g}"
    if finding.low is not None:
        return f"{finding.low:.4g} or more"
    return f"{finding.high:.4g} or less" if finding.high is not None else "see the note and the picture"


def _row(head: str, text: str, width: int = 10) -> str:
    """A line with a head of its own, wrapped under itself."""
    return textwrap.fill(
        text, 118, initial_indent=f"   {head:<{width}}", subsequent_indent=" " * (3 + width),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
