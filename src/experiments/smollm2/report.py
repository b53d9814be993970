"""What `-t smollm2` shows: tables, a verdict, samples before and after, both rewards over the KL as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.markdown import interval, number, table

_COLOURS = {"proxy": "#1f77b4", "gold": "#d99000"}
_MOST_KL, _MOST_PERPLEXITY, _LEAST_GAIN = 15.0, 2.0, 1.0


def verdict(part: str, result: dict[str, Any]) -> list[str]:
    """What a seed of a part falls short of; nothing when it worked."""
    ppo = result["ppo"]
    checks = [
        (ppo["kl"] <= _MOST_KL, f"PPO went {ppo['kl']:.1f} nats from SFT, at most {_MOST_KL:g} are wanted"),
        (
            result["perplexity_ratio"] <= _MOST_PERPLEXITY,
            f"perplexity under the SFT model is {result['perplexity_ratio']:.2f} times its own samples', at most "
            f"{_MOST_PERPLEXITY:g} is wanted",
        ),
    ]
    if part == "sentiment":
        text = f"gold rose by {result['gain']:.2f} of its deviations, at least {_LEAST_GAIN:g} is wanted"
        checks.append((result["gain"] >= _LEAST_GAIN, text))
    else:
        low = result["win_rate_ci"][0]
        checks.append((low > 0.5, f"the judge's win rate over SFT has its lower end at {low:.2f}, wanted: over 0.50"))
        rm = result["reward_model"]
        lowest = max(rm["longer_wins"], 1 - rm["longer_wins"])
        text = f"the reward model orders {rm['accuracy']:.3f} of new pairs, by length alone it is {lowest:.3f}"
        checks.append((rm["accuracy"] > lowest, text))
    return [f"seed {result['seed']}: {text}" for passed, text in checks if not passed]


def report(part: str, results: list[dict[str, Any]]) -> str:
    """Markdown: a table of the figures, for preferences one of the reward models, and ten samples of the first seed."""
    rows = []
    for result in results:
        for name in ("sft", "best_of", "ppo"):
            f = result[name]
            model = f"best of {result['draws']} by proxy" if name == "best_of" else name.upper()
            rewards = [f"{f[key]:.2f} {interval(f[key + '_ci'])}" for key in ("proxy", "gold")]
            rose = [f"{result['gain']:.2f} {interval(result['gain_ci'])}"] if name == "ppo" else [""]
            won = [f"{result['win_rate']:.3f} {interval(result['win_rate_ci'], '.3f')}"] if name == "ppo" else [""]
            about = (("kl", ".1f"), ("perplexity", ".1f"), ("distinct_2", ".2f"), ("tokens", ".0f"), ("ended", ".2f"))
            rows.append((result["seed"], model, *rewards, *rose, *won, *(number(f.get(k), form) for k, form in about)))
    head = (
        "seed | model | proxy (95 %) | gold (95 %) | gold's rise in deviations | win rate over SFT by gold | KL, nats "
        "| perplexity under SFT | distinct 2-grams | tokens | ended"
    )
    first = results[0]
    lines = [
        f"{first['prompts']} held-out prompts ({first['split']}), {first['draws']} answers each at temperature "
        f"{first['temperature']:g}, at most {first['tokens']} tokens. Over the SFT model's answers the two rewards "
        f"correlate by {first['correlation']:.2f}.", "", table(head, rows), "",
    ]  # fmt: skip
    if part == "preferences":
        models = [
            (r["seed"], name, m["pairs"], f"{m['accuracy']:.3f} {interval(m['accuracy_ci'], '.3f')}",
             f"{m['longer_wins']:.3f} {interval(m['longer_wins_ci'], '.3f')}")
            for r in results for name, m in (("proxy", r["reward_model"]), ("judge", r["judge"]))
        ]  # fmt: skip
        lines += [table("seed | reward model | pairs it never saw | accuracy (95 %) | longer wins", models), ""]
    shown = [
        (_cell(s["prompt"]), _cell(s["sft"]), f"{s['sft_gold']:.2f}", _cell(s["ppo"]), f"{s['ppo_gold']:.2f}")
        for s in first["samples"]
    ]
    return "\n".join([*lines, table("prompt | SFT | gold | PPO | gold", shown), ""])


def _cell(text: str) -> str:
    """A text as it can stand in a cell of a table: of a prompt what the person said last."""
    said = text.removesuffix("\n\nAssistant:").rpartition("\n\nHuman: ")[2]
    return " ".join(said.split()).replace("|", "\\|")


def draw_course(part: str, results: list[dict[str, Any]], path: Path) -> None:
    """Both rewards over the KL, above the SFT model's mean in deviations of its answers; a line a seed."""
    figure = Figure(figsize=(6.6, 4.4))
    axes = figure.subplots()
    for i, result in enumerate(results):
        course = [{**result["sft"], "kl": 0.0, "step": 0}, *result["course"]]
        kl = [row["kl"] for row in course]
        for reward, colour in _COLOURS.items():
            mean, deviation = result["sft"][reward], result["sft"][f"{reward}_sd"]
            points = [(row[reward], *row[f"{reward}_ci"]) for row in course]
            values, low, high = zip(*(((value - mean) / deviation for value in point) for point in points))
            label = {"proxy": "proxy: what PPO is trained on", "gold": "gold: never trained on"}[reward]
            axes.plot(kl, values, "o-", color=colour, label=None if i else label)
            axes.vlines(kl, low, high, color=colour, alpha=0.4, linewidth=2)  # the KL may go back: no band
    axes.set_xlabel("KL to the SFT model, nats per response")
    axes.set_ylabel("above the SFT model, in deviations of its answers")
    axes.set_title(f"SmolLM2-135M, {part}: {results[0]['prompts']} held-out prompts", fontsize=10.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
