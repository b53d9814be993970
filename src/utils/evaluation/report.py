"""What an evaluation leaves behind: evaluation.json for programs, evaluation.md for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from config.scrub import scrubbed
from utils.judging.pairwise import Comparison

MAIN_PAIRS = (("sft", "vanilla"), ("ppo", "vanilla"), ("ppo", "sft"))
EXAMPLES = 10  # of each main pair, half of them wins and half losses
_SHOWN_CHARACTERS = 1200
_MARKUP = "\\`*_[]|~$"

_HOW_TO_READ_PAIRS = """\
Every pair was judged in both orders. The win rate is that of the first-named system, with ties (and pairs whose two
orders contradict each other) as half; the interval is a bootstrap over prompts. An interval that holds 0.5 shows no
difference. The length-controlled rate says what the judge would prefer if both answers were equally long: where it
falls back to 0.5, length was what won. Consistency is the share of pairs whose two orders agree; a judge that only
looks at the position has consistency 0 and a first-position rate of 0 or 1 (0.5 is fair)."""

_HOW_TO_READ_SYSTEMS = """\
`ends` is the share of answers that stopped by themselves; distinct-2 (falling) and repetition (rising) show text that
collapses. KL is measured on the same samples, against the SFT model at the sampling temperature; for best-of-n it is
the analytic bound. Quote a proxy score only together with the KL that it was bought with. `corr.` is the correlation of
proxy and gold within the system. It falls when a policy starts to game its reward model, but also when its answers
become alike, as those of best-of-n do: alarming is a fall together with gold that stands still or sinks."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out.

    settings: how answers were made. judge: what the judge says of itself. comparisons: of all pairs. prompts: [N]. By
    name of the system: systems, figures; texts, answers [N]; proxy and gold, their rewards [N] where there are such.
    """

    name: str
    settings: dict[str, Any]
    judge: dict[str, Any]
    comparisons: list[Comparison]
    systems: dict[str, dict[str, Any]]
    prompts: Sequence[str]
    texts: Mapping[str, Sequence[str]]
    proxy: Mapping[str, np.ndarray] = field(default_factory=dict)
    gold: Mapping[str, np.ndarray] = field(default_factory=dict)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json and evaluation.md into a folder; the settings without secrets, the texts as they are."""
    told = {part: scrubbed(getattr(evaluation, part)) for part in ("settings", "judge", "systems")}
    pairs = [c.to_json() | {"proxy_agreement": proxy_agreement(c, evaluation.proxy)} for c in evaluation.comparisons]
    content = {"pairs": pairs, "systems": told["systems"], "judge": told["judge"], "settings": told["settings"]}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(_markdown(replace(evaluation, **told)), encoding="utf-8")


def proxy_agreement(comparison: Comparison, proxy: Mapping[str, np.ndarray]) -> float | None:
    """Share of the prompts with a winner on which the reward model prefers the same answer, equal scores as half.

    None without proxy scores of both systems, or without a winner.
    """
    if comparison.a not in proxy or comparison.b not in proxy:
        return None
    margins = np.asarray(proxy[comparison.a]) - np.asarray(proxy[comparison.b])
    decided = np.isfinite(comparison.scores) & (comparison.scores != 0.5)
    if not decided.any():
        return None
    right = 0.5 + 0.5 * np.sign(margins) * np.sign(comparison.scores - 0.5)
    return float(right[decided].mean())


def _markdown(evaluation: Evaluation) -> str:
    sections = [
        f"# Evaluation {evaluation.name}",
        _setting(evaluation),
        "![Win rates with their intervals](evaluation.png)",
        "## Pairs",
        pair_table(evaluation),
        _failures(evaluation),
        _HOW_TO_READ_PAIRS,
        "## Systems",
        system_table(evaluation),
        _HOW_TO_READ_SYSTEMS,
    ]
    for comparison in main_pairs(evaluation.comparisons):
        sections += examples(evaluation, comparison)
    return "\n\n".join(section for section in sections if section) + "\n"


def main_pairs(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """SFT vs vanilla, PPO vs vanilla and PPO vs SFT, as far as they were compared; without any, the first three."""
    return [c for c in comparisons if (c.a, c.b) in MAIN_PAIRS] or list(comparisons[:3])


def pair_table(evaluation: Evaluation) -> str:
    """Markdown table of all pairs."""
    header = (
        "pair", "win rate (95 %)", "length-controlled (95 %)", "wins / ties / losses", "consistency",
        "first position", "words", "prompts",
    )  # fmt: skip
    rows = [
        (
            f"{c.a} vs {c.b}",
            _interval(c.win_rate, c.win_rate_ci),
            _interval(c.lc_win_rate, c.lc_win_rate_ci),
            f"{c.decisive_wins} / {c.ties} / {c.decisive_losses}",
            _number(c.consistency),
            _number(c.first_position_rate),
            f"{_number(c.mean_length_a, 1)} / {_number(c.mean_length_b, 1)}",
            str(c.n),
        )
        for c in evaluation.comparisons
    ]
    return _table(header, rows)


def system_table(evaluation: Evaluation) -> str:
    """Markdown table of all systems."""
    header = ("system", "gold", "proxy", "corr.", "KL, nats", "ends", "distinct-2", "repetition", "words")
    digits = dict(
        gold=2, proxy=2, proxy_gold_correlation=2, kl=2, eos_rate=3, distinct_2=3, repetition=3, mean_length=1
    )
    rows = []
    for name, figures in evaluation.systems.items():
        cells = {key: _number(figures[key], places) for key, places in digits.items()}
        if figures.get("analytic_kl") is not None:
            cells["kl"] = f"at most {figures['analytic_kl']:.2f}"
        rows.append((name, *cells.values()))
    return _table(header, rows)


def examples(evaluation: Evaluation, comparison: Comparison) -> list[str]:
    """A heading and a table: the clearest wins of the first system, then its clearest losses."""
    a, b = comparison.a, comparison.b
    chosen = chosen_examples(comparison, evaluation.gold or evaluation.proxy)
    if not chosen:
        return []
    rows = []
    for i in chosen:
        score = comparison.scores[i]
        result = f"{a if score > 0.5 else b}{'' if score in (0, 1) else ' (one order a tie)'}"
        texts = (_question(evaluation.prompts[i]), evaluation.texts[a][i], evaluation.texts[b][i])
        rows.append((result, *map(_cell, texts)))
    wins = sum(comparison.scores[i] > 0.5 for i in chosen)
    heading = f"## {a} vs {b}: {wins} clear wins and {len(chosen) - wins} clear losses of {a}"
    return [heading, _table(("won by", "prompt", a, b), rows)]


def chosen_examples(comparison: Comparison, strength: Mapping[str, np.ndarray]) -> list[int]:
    """Places of the prompts to show: up to five best wins, then up to five worst losses.

    Both orders won (or lost) comes before one. Among equals the largest margin comes first, by the rewards [N] in
    `strength` where both systems have them; after that, the order of the prompts decides.
    """
    scores = comparison.scores
    margins = np.zeros(len(scores))
    if comparison.a in strength and comparison.b in strength:
        margins = np.asarray(strength[comparison.a]) - np.asarray(strength[comparison.b])
    wins = sorted(np.flatnonzero(scores > 0.5), key=lambda i: (-scores[i], -margins[i]))
    losses = sorted(np.flatnonzero(scores < 0.5), key=lambda i: (scores[i], margins[i]))
    return [int(i) for i in (*wins[: EXAMPLES // 2], *losses[: EXAMPLES // 2])]


def _setting(evaluation: Evaluation) -> str:
    s, judge = evaluation.settings, evaluation.judge
    who = f"{judge['model']} at {judge['base_url']}" if judge.get("model") else judge["kind"]
    sampled = f"sampled at temperature {s['temperature']:g} with seed {s['seed']}"
    decoding = "greedy" if s["temperature"] == 0 else sampled
    text = f"{s['prompt_count']} prompts from {s['prompts']}; answers {decoding}, at most {s['max_new_tokens']} tokens."
    text += f" Judge: {who}."
    if judge.get("cost_usd"):
        text += f" It cost about ${judge['cost_usd']:.2f}."
    cut = [f"{f['cut_prompts']} for {name}" for name, f in evaluation.systems.items() if f.get("cut_prompts")]
    if cut:
        text += f" Prompts that lost their beginning to fit the context: {', '.join(cut)}."
    return text


def reasons(judge: Mapping[str, Any]) -> list[str]:
    """Why questions have no clear verdict, with counts and what was said, from what the judge says of itself.

    Counts are of questions; a prompt has two for each pair of systems.
    """
    lines = []
    for key, told in (("failures", "without an answer"), ("unclear", "answered unclearly")):
        for reason, count in sorted(judge.get(key, {}).items(), key=lambda item: -item[1]):
            said = judge.get("examples", {}).get(reason)
            lines.append(f"{count} {told}: {reason}" + (f" ({said})" if said else ""))
    if judge.get("not_asked"):
        lines.append(f"{judge['not_asked']} not asked: {(judge.get('stopped') or 'stopped').split(';')[0]}")
    return lines


def _failures(evaluation: Evaluation) -> str:
    """A paragraph and the reasons when verdicts are missing."""
    missing = [c for c in evaluation.comparisons if c.unparsed or c.failed]
    if not missing:
        return ""
    told = "; ".join(f"{c.a} vs {c.b}: {c.unparsed} unclear, {c.failed} failed" for c in missing)
    lines = [f"**Not judged, and in no win rate** ({told}). The same command asks again for these only."]
    if why := reasons(evaluation.judge):
        lines += ["Questions, each pair of systems in two orders:", "\n".join(f"- {_cell(line)}" for line in why)]
    return "\n\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _interval(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if ends is None else f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def _question(prompt: str) -> str:
    """A prompt without what the template adds to a single question."""
    text = prompt.strip().removesuffix("Assistant:").strip()
    return text.removeprefix("Human:").strip() if text.count("Human:") == 1 else text


def _cell(text: str) -> str:
    """A text as it is, in a cell of a table: nothing in it is taken for markup."""
    text = text.strip()
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS].rstrip() + " ..."
    text = html.escape(text, quote=False)
    text = "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in text)
    return "<br>".join(line.strip() for line in text.splitlines())
