"""The doctor: reads a run of any stage and says what is wrong with it, from what, and what to change.

    python src/experiments/main.py -t doctor ppo_demo

Exit code 0: healthy as far as can be told; 3: there are findings; 2: there is no such run, or it cannot be read.
docs/doctor.md has what each finding means.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from config.scrub import printable
from config.user_error import UserError
from experiments.doctor.record import STAGES, RunRecord, find_run, read_run
from experiments.doctor.signs import Cause, Finding
from experiments.doctor.table import RULES, Rule
from utils.runs.folder import refuse_links


@dataclass(frozen=True)
class Unclear:
    """A rule that cannot judge this run: its code, and what is missing."""

    code: str
    missing: str


def run(parser: argparse.ArgumentParser, rest: list[str]) -> int:
    """The task `-t doctor`: 0 healthy, 3 with findings.

    Raises:
        UserError: there is no such run, it cannot be read, or the pictures cannot be written.
    """
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a name such as ppo_demo: its newest run")
    parser.add_argument("--runs-dir", default="runs", help="where names are looked up")
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
    findings: dict[str, Finding] = {}
    unclear = []
    for rule in RULES[record.stage]:
        excluded = any(name in findings or record.config.get(name) for name in (rule.code, *rule.unless))
        seen = None if excluded or (rule.given and not record.config.get(rule.given)) else rule.check(record)
        if isinstance(seen, str):
            unclear.append(Unclear(rule.code, seen))
        elif seen:
            findings[rule.code] = _explained(seen, rule, seen.of or record)
    return list(findings.values()), unclear


def _explained(seen: Finding, rule: Rule, record: RunRecord) -> Finding:
    """What a rule's check has seen in a record, with the rule's texts; a cause is told once, in its likeliest place."""
    causes = rule.causes[seen.case] if isinstance(rule.causes, dict) else rule.causes
    texts = dict.fromkeys(cause if isinstance(cause, str) else cause(record) for cause in causes)
    return replace(
        seen, code=rule.code, title=rule.title.replace("{case}", seen.case), beside=rule.beside,
        causes=tuple(Cause(*text.replace("{case}", seen.case).split(" -> ")) for text in texts if text),
    )  # fmt: skip


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
    lines = [f"{record.folder}: {STAGES[record.stage]}, {record.last_step}{of} {unit}, {state}"]
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
