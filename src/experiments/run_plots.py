"""Curves of a run beside the range that is healthy and a sentence on how to read each: what tensorboard.ipynb shows.

Everything comes from a run's metrics.jsonl. The ranges are rules of thumb for responses of some 50 tokens and a reward
of mean 0 and deviation 1 on SFT samples: a curve that leaves its range is a reason to look closer, and not yet a fault.
Figures are made without pyplot, so that the notebook's own way of showing them stays as it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from experiments.doctor.ranges import ALARM, ENDS, KEEPS_LENGTH, SAMPLER_DRIFT, SAMPLER_FP32, SAMPLER_HALF, Range
from experiments.doctor.record import STAGES, read_series
from experiments.markdown import table

_COLOURS = ("#1f77b4", "#d99000", "#7a7a7a")
_HEALTHY, _SHADE = "#2e8b57", 0.13
_ALARM, _DASHES = "#c0392b", (0, (4, 3))
# Up to this many points of a line are marked: held-out figures, and runs of a few steps.
_FEW = 12

Metrics = dict[str, tuple[list[int], list[float]]]
"""Tag -> (steps, values)."""


@dataclass(frozen=True)
class Curve:
    """One panel: lines that belong together and what to make of them."""

    title: str
    tags: dict[str, str]
    """TensorBoard tag -> name in the legend. The healthy range is that of the first tag that the run logged."""
    reading: str
    """One sentence on how to read it."""
    healthy: Range | None = None
    alarm: tuple[float, ...] = ()
    """Values beyond which something is wrong, drawn as dashed lines."""
    shows: tuple[float, ...] = ()
    """Values that the vertical axis always has on it."""
    log: bool = False
    since: int = 0
    """Range and alarms count from this step on: before it a healthy run may be anywhere."""

    @property
    def expected(self) -> str:
        """The healthy range in words, "" where there is none."""
        return "" if self.healthy is None else f"{self.healthy}" + (f", from {self.since} on" if self.since else "")


# In recorded runs of the demo up to 0.52 of the values are clipped in iterations 1 to 3, single ratios reach 20 in the
# first two, and the critic explains nothing; from 5 on it is at most 0.15, at most 7, and more than half.
_SETTLED = 5
_TRAINED = 1  # what step 0 shows is the model before training

_VARIETY = Curve(
    "variety of the samples", {"resp/distinct_2": "distinct bigrams", "resp/repetition": "repeated 4-grams"},
    "Both should stay level: distinct bigrams that drop, or repetition that rises, mean that the samples become alike.",
    shows=(0.0,),
)  # fmt: skip

CURVES: dict[str, tuple[Curve, ...]] = {
    "sft": (
        Curve("loss, nats per response token", {"eval/loss": "held-out", "train/loss": "training"},
              "Both should fall and level off close together; held-out loss that turns up while training loss falls "
              "is overfitting, so `best/` is then the checkpoint to take."),
        Curve("gradient norm before clipping", {"train/grad_norm": "gradient norm"},
              "It should fall and then stay level; spikes mean a learning rate that is too high, or bad rows.",
              shows=(0.0,)),
        Curve("learning rate", {"train/lr": "learning rate"},
              "It rises linearly over the warm-up, then follows half a cosine down to `--min-lr-ratio` of its peak.",
              shows=(0.0,)),
        Curve("responses that end", {"resp/eos_rate": "samples"},
              "A share of 0.95 or more should end by themselves before you go on to the reward model and PPO; one "
              "that stays low means that EOS is not learned, or that `--sample-tokens` is short for the data.",
              ENDS, shows=(0.9, 1.0), since=_TRAINED),
        Curve("response length, tokens", {"resp/len_mean": "samples"},
              "It should settle near the length of the data's responses; a model that never ends has "
              "`--sample-tokens`.", shows=(0.0,)),
        _VARIETY,
    ),
    "rm": (
        Curve("ranking loss, nats per prompt", {"eval/nll": "held-out", "train/loss": "training"},
              "It should go below ln 2 = 0.693, which is what knowing nothing costs; held-out loss that rises again "
              "is overfitting.", Range(0, 0.693), alarm=(1.2,), shows=(0.693,), since=_TRAINED),
        Curve("pairs in the right order",
              {"eval/accuracy": "held-out", "train/accuracy": "training", "eval/longer_wins": "the longer one wins"},
              "It should rise well above 0.5, above the grey line and above 1 minus it (the shorter one wins); labels "
              "of people allow little more than 0.7, for people disagree.",
              Range(0.5, 1), shows=(0.5,), since=_TRAINED),
        Curve("margin, better minus worse", {"eval/margin_mean": "mean", "eval/margin_sd": "deviation"},
              "The mean should be positive and settle; a margin that grows while accuracy stands still is "
              "overconfidence and inflates the scale of the reward.", Range(0, None), shows=(0.0,), since=_TRAINED),
        Curve("calibration error", {"eval/ece": "expected calibration error"},
              "It is how far the claimed confidence, sigmoid of the margin, is from the share of right pairs; small "
              "means that margins can be trusted as they are.", Range(0, 0.1), shows=(0.0, 0.1), since=_TRAINED),
        Curve("correlation of score and length", {"eval/length_corr": "correlation"},
              "Near 0 is best unless the labels themselves care for length; what is far from it PPO will use, in the "
              "direction of its sign.", Range(-0.5, 0.5), shows=(-0.5, 0.5)),
        Curve("gradient norm before clipping", {"train/grad_norm": "gradient norm"},
              "It should come down from its start and stay level; spikes mean a learning rate that is too high, or "
              "bad rows.", shows=(0.0,)),
    ),
    "ppo": (
        Curve("reward", {"objective/score": "score", "objective/rlhf_reward": "score minus KL penalty"},
              "The score starts near 0 and should gain half a deviation to two and a half, and the reward, which is "
              "what PPO maximises, should rise with it; a score that is flat while the KL rises has learned nothing.",
              Range(0.5, 2.5, "above the start"), since=2 * _SETTLED),
        Curve("held-out prompts", {"eval/score": "proxy (reward model)", "eval/gold": "gold, never trained on"},
              "Both should rise; gold that is flat or falls while the proxy rises is over-optimisation, so take an "
              "earlier checkpoint or a higher `--kl-coef` (`--eval-reward-fn` gives the gold curve)."),
        Curve("KL to the SFT model, nats per response",
              {"objective/kl": "k1", "objective/kl_k3": "k3", "eval/kl": "held-out"},
              "It is 0 at iteration 1 and should rise slowly to some 2 to 15 nats, the less the shorter the "
              "responses; a negative one, beyond noise, means that sampled and scored distribution differ.",
              Range(-0.5, 15), alarm=ALARM["objective/kl"].edges, shows=(0.0,)),
        Curve("entropy, nats per response", {"objective/entropy": "entropy"},
              "It should decline slowly and keep a third of its start or more; a negative one is a mistake in a mask.",
              Range(0.33, None, "times the start"), alarm=ALARM["objective/entropy"].edges),
        Curve("approximate KL of an update", {"policy/approxkl": "old to new policy"},
              "It should be between 1e-4 and 1e-2 while the policy learns, and goes towards 0 with the learning rate "
              "at the end; above 0.03 the steps are too large.",
              Range(None, 1e-2), alarm=ALARM["policy/approxkl"].edges, log=True, since=_SETTLED),
        Curve("clipped tokens", {"policy/clipfrac": "policy", "val/clipfrac": "value"},
              "A share of 0.01 to 0.2 is usual for the policy at first, and 0 at the end; above 0.3 the steps are too "
              "large, and 0 from the beginning means that they are too small.",
              Range(0, 0.2), alarm=ALARM["policy/clipfrac"].edges, shows=(0.0, 0.2), since=_SETTLED),
        Curve("importance ratio, mean", {"policy/ratio_mean": "mean"},
              "It stays within 0.01 of 1; off by 0.05 means that old and new log-probabilities are not those of the "
              "same tokens, masks or temperature.",
              Range(0.99, 1.01), alarm=ALARM["policy/ratio_mean"].edges, shows=(0.98, 1.02)),
        Curve("importance ratio, largest", {"policy/ratio_max": "largest"},
              "Single digits are usual; above 10 some token became far likelier in one update, which one high "
              "learning rate or one wrong mask can do.",
              Range(1, 10), alarm=ALARM["policy/ratio_max"].edges, shows=(1.0, 10.0), log=True, since=_SETTLED),
        Curve("critic's explained variance",
              {"val/explained_var": "of variance", "val/explained_var_mse": "of squared error"},
              "It may be negative at first and is 0.3 to 0.9 or better later; still negative after 50 iterations "
              "means that the critic lags behind, and a gap between the lines is a bias in its values.",
              Range(0.3, 1), shows=(0.0, 1.0), since=_SETTLED),
        Curve("values and returns", {"val/mean": "values, mean", "val/return_mean": "returns, mean"},
              "The two should lie close together after the first iterations; a lasting gap means that the critic's "
              "scale is not that of the reward."),
        Curve("gradient norms before clipping", {"grad_norm/actor": "actor", "grad_norm/critic": "critic"},
              "Both should be steady, the critic's falling; spikes mean a learning rate that is too high.",
              shows=(0.0,)),
        Curve("sampler against training, log-probability", {SAMPLER_DRIFT: "largest difference"},
              "Sampling with the cache and training must see the same model: below 1e-4 in fp32 and below 0.05 in "
              "bf16.", SAMPLER_FP32, alarm=SAMPLER_HALF.edges, shows=(1e-4,), log=True),
        Curve("responses that end", {"resp/eos_rate": "samples", "eval/eos_rate": "held-out"},
              "Nearly all samples should end by themselves; a fall means that EOS is masked somewhere, or that "
              "running on pays.", ENDS, shows=(0.9, 1.0)),
        Curve("response length, tokens", {"resp/len_mean": "samples", "eval/len_mean": "held-out"},
              "It should stay near its start; steady growth with a correlation of length and score above 0.5 is a "
              "length bias of the reward model being used.", KEEPS_LENGTH),
        _VARIETY,
        Curve("correlation of length and score", {"resp/len_score_corr": "correlation"},
              "It may wander around any value; above 0.5 while the responses grow, the policy is paid for length.",
              Range(-0.5, 0.5), alarm=ALARM["resp/len_score_corr"].edges, shows=(-0.5, 0.5)),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their figures
# ---------------------------------------------------------------------------------------------------------------------


def newest_runs(root: Path) -> dict[str, Path | None]:
    """The newest run of each stage in `root` that has logged anything, by the time in its name; None without one."""
    logs = [log for log in root.glob("*/metrics.jsonl") if log.is_file() and log.stat().st_size]
    newest: dict[str, Path | None] = {}
    for stage in STAGES:
        named = [re.fullmatch(rf"{stage}_.+_(\d{{14}})", log.parent.name) for log in logs]
        found = [(match[1], match[0]) for match in named if match]  # (time, folder)
        newest[stage] = root / max(found)[1] if found else None
    return newest


def read_metrics(run: Path) -> Metrics:
    """Steps and values of every tag in a run's metrics.jsonl; undefined values are left out.

    Raises:
        UserError: the file is malformed. (A last line that is being written right now is not.)
    """
    defined = {tag: series.finite() for tag, series in read_series(run / "metrics.jsonl").items()}
    return {tag: (series.steps.tolist(), series.values.tolist()) for tag, series in defined.items() if len(series)}


# ---------------------------------------------------------------------------------------------------------------------
# What is shown of them
# ---------------------------------------------------------------------------------------------------------------------


def reading_table(stage: str, run: Path) -> str:
    """A Markdown table, one row a panel: its tags, the last value of the first, the healthy range, how to read it."""
    metrics = read_metrics(run)
    rows = []
    for curve in CURVES[stage]:
        logged = [tag for tag in curve.tags if tag in metrics]
        last = f"{metrics[logged[0]][1][-1]:.3g}" if logged else "none"
        tags = ", ".join(f"`{tag}`" for tag in (logged or curve.tags))
        rows.append((curve.title, tags, last, curve.expected, curve.reading))
    return table("curve | tags | last value | healthy | how to read it", rows) + "\n"


def draw_run(stage: str, run: Path) -> Figure:
    """All curves of a run as small panels, in the order of CURVES[stage]; green is healthy, dashed red an alarm."""
    metrics, curves = read_metrics(run), CURVES[stage]
    columns = 4 if len(curves) > 6 else 3
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.75 * rows + 0.5), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.07)
    figure.suptitle(f"{STAGES[stage]}: {run.name}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    handles = [Patch(color=_HEALTHY, alpha=_SHADE, linewidth=0, label="healthy")]
    if any(curve.alarm for curve in curves):
        handles.append(Line2D([], [], color=_ALARM, linestyle=_DASHES, linewidth=1, label="alarm"))
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9)
    for i, curve in enumerate(curves):
        axis = figure.add_subplot(rows, columns, i + 1)
        draw_curve(axis, curve, metrics)
        if i + columns >= len(curves):
            axis.set_xlabel("PPO iteration" if stage == "ppo" else "optimizer step")
    return figure


def draw_curve(axis: Axes, curve: Curve, metrics: Metrics) -> None:
    """Draw one panel; a curve without values is an empty panel that says so."""
    axis.set_title(curve.title, fontsize=10.5, loc="left", pad=19)  # the legend stands between
    axis.spines[["top", "right"]].set_visible(False)
    lines = [(label, *metrics[tag], i) for i, (tag, label) in enumerate(curve.tags.items()) if tag in metrics]
    if not lines:
        axis.text(0.5, 0.5, "no value in this run", ha="center", va="center", color="#888888", fontsize=9)
        axis.set_axis_off()
        return
    # The first tag leads: drawn last, on top of noisier ones.
    for label, steps, values, i in reversed(lines):
        few = len(steps) <= _FEW
        axis.plot(
            steps, values, color=_COLOURS[i], label=label, linewidth=1.7 if i == 0 else 1.3, alpha=1 if i == 0 else 0.8,
            linestyle="--" if i == 2 else "-", marker="o" if few else None, markersize=3.5,
        )  # fmt: skip
    healthy = curve.healthy.limits(start=lines[0][2][0]) if curve.healthy else None
    values = [v for _, _, line, _ in lines for v in line]
    log = curve.log and max(values) > 0  # nothing but zeros would be invisible
    low, high = _view(curve, values, healthy, log)
    if log:
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_ylim(low, high)
    left, right = axis.set_xlim(*axis.get_xlim())  # they stay, whatever is drawn below
    first = min((s for s in lines[0][1] if s >= curve.since), default=right) if curve.since else left
    if healthy:
        bottom, top = max(healthy[0], low), min(healthy[1], high)
        looks = {"color": _HEALTHY, "alpha": _SHADE, "linewidth": 0, "zorder": 0}
        axis.add_patch(Rectangle((first, bottom), right - first, top - bottom, **looks))
    for alarm in curve.alarm:
        if low < alarm < high:
            axis.plot([first, right], [alarm, alarm], color=_ALARM, linestyle=_DASHES, linewidth=1, zorder=1)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=9)
    axis.locator_params(axis="x", integer=True, nbins=6)
    if len(lines) > 1:
        handles, labels = axis.get_legend_handles_labels()
        # Above the panel, where no curve and no alarm can be under it.
        axis.legend(
            handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 0.97),
            ncols=len(lines), handlelength=1.4, columnspacing=1.0, borderpad=0.2, handletextpad=0.5,
        )  # fmt: skip


def _view(curve: Curve, values: list[float], healthy: tuple[float, float] | None, log: bool) -> tuple[float, float]:
    """Limits of a panel's vertical axis: the values of all its lines, what it always shows, and where the healthy range
    begins. On a logarithmic one, values that are not positive are not shown."""
    seen = [*values, *curve.shows]
    if healthy:
        if curve.healthy.of != "values":
            seen += [edge for edge in healthy if math.isfinite(edge)]
        # A curve wholly outside: show how far off it is.
        seen += [healthy[0]] if max(values) < healthy[0] else []
        seen += [healthy[1]] if min(values) > healthy[1] else []
    if log:
        seen = [math.log10(v) for v in seen if v > 0]
    low, high = min(seen), max(seen)
    margin = 0.07 * (high - low) or 0.07 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)
