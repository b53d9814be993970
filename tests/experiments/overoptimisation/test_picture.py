"""The picture: what is drawn where, and that all of it is inside."""

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.overoptimisation.fit import BEST_OF_N, RL
from experiments.overoptimisation.picture import draw_overoptimisation

pytestmark = pytest.mark.slow


def fit(curve, a, b, last, peak):
    d = np.linspace(0, last, 20)
    r = curve(d, a, b)
    return {
        "a": a, "b": b, "peak_d": peak, "peak_d_ci": [peak, peak], "peak_reward": float(curve(np.array(peak), a, b)),
        "peak_within_data": peak <= last, "curve": {"d": d.tolist(), "r": r.tolist()},
        "band": {"low": (r - 0.1).tolist(), "high": (r + 0.1).tolist()},
    }  # fmt: skip


def points(curve, name, values, ds):
    return [
        {name: v, "d": d, "d_ci": (d, d), "kl": d * d}
        | {r: float(curve(d, 1, 0.4)) for r in ("proxy", "gold")}
        | {f"{r}_ci": (float(curve(d, 1, 0.4)) - 0.1, float(curve(d, 1, 0.4)) + 0.1) for r in ("proxy", "gold")}
        for v, d in zip(values, ds)
    ]


def figures(last=6.0, fitted=True):
    ppo = {r: fit(RL.curve, 1, 0.4, last, 4.48) if fitted else None for r in ("proxy", "gold")}
    best = {r: fit(BEST_OF_N.curve, 1, 0.4, 1.35, 1.25) if fitted else None for r in ("proxy", "gold")}
    return {
        "run": "ppo_a_rather_long_name_of_a_run_20260101000000", "judge": "rm:runs/a_large_reward_model",
        "prompts": 4000, "samples": 16, "fits": {"ppo": ppo, "best_of_n": best},
        "ppo": points(RL.curve, "step", [10, 20, 30], [last / 3, last / 2, last]),
        "best_of_n": points(BEST_OF_N.curve, "n", [1, 2, 4, 16], [0, 0.44, 0.8, 1.35]), "evaluations": [],
    }  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(figures)`: the matplotlib figure behind the file."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **keys: kept.append(self) or save(self, *args, **keys))

    def draw(content):
        path = tmp_path / "new" / "picture.png"
        draw_overoptimisation(content, path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        return kept[-1]

    return draw


@pytest.mark.parametrize(("last", "fitted"), [(0.8, True), (40.0, True), (6.0, False)])
def test_every_text_is_inside_the_picture(drawn, last, fitted):
    figure = drawn(figures(last, fitted))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the file has another resolution than the figure
    renderer, width, height = canvas.get_renderer(), *canvas.get_width_height()
    assert sum(len(line.get_xdata()) == 20 for line in figure.axes[0].lines) == 4 * fitted
    texts = [*figure.texts, *figure.axes[0].texts, *figure.axes[0].get_legend().get_texts()]
    assert len(texts) >= 10
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()


def test_peaks_and_points_are_named(drawn):
    axes = drawn(figures(last=9.0)).axes[0]
    assert sum(len(line.get_xdata()) == 20 for line in axes.lines) == 4  # the fits
    shown = [t.get_text() for t in axes.texts]
    assert {"SFT", "n=2", "n=4", "n=16", "step 10", "step 20, best", "step 30"} - set(shown) == set()
    assert "n=1" not in shown
    assert {"PPO: fitted gold peak at 20.1 nats", "best-of-n: fitted gold peak at 1.6 nats"} <= set(shown)
    shown = [t.get_text() for t in drawn(figures(last=2.0)).axes[0].texts]
    # PPO's peak is beyond what was measured.
    assert [t for t in shown if "peak" in t] == ["best-of-n: fitted gold peak at 1.6 nats"]


def test_evaluations_stand_in_for_checkpoints_that_were_not_kept(drawn):
    """Of few checkpoints there is no fit: a dotted line joins all points in the order of their steps."""
    content = figures(fitted=False)
    content["ppo"] = content["ppo"][2:]
    content["evaluations"] = [
        {"step": 10, "d": 1.0, "proxy": 0.5, "gold": 3.5}, {"step": 20, "d": 2.5, "proxy": 0.7, "gold": None},
    ]  # fmt: skip
    axes = drawn(content).axes[0]
    diamonds = {
        (tuple(line.get_xdata()), tuple(line.get_ydata())): colors.to_hex(line.get_color())
        for line in axes.lines if line.get_marker() == "D" and colors.to_hex(line.get_color()) != "#000000"
    }  # fmt: skip
    assert diamonds == {((1, 2.5), (0.5, 0.7)): "#1f77b4", ((1,), (3.5,)): "#d99000"}
    last = content["ppo"][0]
    ways = [line for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata()) > 2]
    assert [list(line.get_ydata()) for line in ways] == [[0, 0.5, 0.7, last["proxy"]], [0, 3.5, last["gold"]]]
    at = {text.get_text(): text.xy for text in axes.texts if text.get_text().startswith("step")}
    assert at == {"step 10, best": (1.0, 3.5), "step 30": (last["d"], last["gold"])}
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "PPO, no checkpoint kept: its own evaluation" in named
    assert not any("evaluation" in text.get_text() for text in drawn(figures()).axes[0].get_legend().get_texts())


FAMILIES, REWARDS = ("ppo", "best_of_n"), ("proxy", "gold")


def all_different():
    """Figures in which no reward, fit, band, interval or peak has the values of another."""
    content, level = figures(last=6.0), 0.0
    for family in FAMILIES:
        for reward in REWARDS:
            level += 1
            fitted = content["fits"][family][reward]
            fitted["curve"]["r"] = [r + level for r in fitted["curve"]["r"]]
            fitted["band"] = {"low": [level - 0.3] * 20, "high": [level + 0.4] * 20}
            fitted |= {"peak_d": 0.1 * level, "peak_reward": 10 * level}
            for row in content[family]:
                row[reward] += level
                row[f"{reward}_ci"] = (row[reward] - level / 10, row[reward] + level / 5)
                row["d_ci"] = (row["d"] - 0.01, row["d"] + 0.02)
    return content


def looks(line):
    """What tells a line of points from others: colour, marker, whether it is filled."""
    colour = colors.to_hex(line.get_color())
    return colour, line.get_marker(), colors.to_hex(line.get_markerfacecolor()) == colour


def shapes(axes, kind):
    """{(colour, lowest y, highest y)} of the bands, {(colour, left, right, lowest y, highest y)} of the bars."""
    found = set()
    for shape in axes.collections:
        is_band = len(shape.get_facecolor()) > 0
        if is_band == (kind == "bands"):
            colour = colors.to_hex(shape.get_edgecolor()[0])
            for path in shape.get_paths():
                (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
                place = () if is_band else (round(left, 9), round(right, 9))
                found.add((colour, *place, round(low, 9), round(high, 9)))
    return found


def test_every_reward_is_drawn_in_its_own_colour_and_named_so(drawn):
    content = all_different()
    axes = drawn(content).axes[0]
    legend = axes.get_legend()
    named = dict(zip([t.get_text() for t in legend.get_texts()], legend.legend_handles))
    label = {
        ("ppo", "proxy"): "PPO: proxy, the reward it was trained on",
        ("ppo", "gold"): "PPO: the judge, never trained on",
        ("best_of_n", "proxy"): "best-of-n: proxy",
        ("best_of_n", "gold"): "best-of-n: the judge",
    }
    assert set(named) == set(label.values()) and len({looks(handle) for handle in named.values()}) == 4
    lines = {tuple(line.get_ydata()): line for line in axes.lines if len(line.get_xdata()) > 2}
    bands, bars = set(), set()
    for (family, reward), text in label.items():
        rows = [row for row in content[family] if row.get("n") != 1]
        points = lines.pop(tuple(row[reward] for row in rows))
        assert list(points.get_xdata()) == [row["d"] for row in rows]
        assert looks(points) == looks(named[text])
        fitted, colour = content["fits"][family][reward], looks(named[text])[0]
        curve = lines.pop(tuple(fitted["curve"]["r"]))
        assert list(curve.get_xdata()) == fitted["curve"]["d"] and colors.to_hex(curve.get_color()) == colour
        assert (curve.get_linestyle() == "-") == (named[text].get_linestyle() == "-") == (family == "ppo")
        bands.add((colour, round(fitted["band"]["low"][0], 9), round(fitted["band"]["high"][0], 9)))
        for row in rows:
            (left, right), (low, high) = row["d_ci"], row[f"{reward}_ci"]
            bars.add((colour, *(round(v, 9) for v in (row["d"], row["d"], low, high))))
            bars.add((colour, *(round(v, 9) for v in (left, right, row[reward], row[reward]))))
    assert not lines and shapes(axes, "bands") == bands and shapes(axes, "bars") == bars


def test_texts_and_stars_stand_at_the_gold_reward(drawn):
    """The proxy's peak, which is far beyond, tells nobody where to stop."""
    content = all_different()
    axes = drawn(content).axes[0]
    at = {text.get_text(): text.xy for text in axes.texts}
    first, _, last = ((row["d"], row["gold"]) for row in content["ppo"])
    assert (at["step 10"], at["step 30, best"]) == (first, last)
    for row in content["best_of_n"][1:]:
        assert at[f"n={row['n']}"] == (row["d"], row["gold"])  # gold is the upper curve here
    peaks = {(content["fits"][f]["gold"]["peak_d"], content["fits"][f]["gold"]["peak_reward"]) for f in FAMILIES}
    stars = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "*"}
    assert stars == peaks
    lower = all_different()
    for row in lower["best_of_n"]:
        row["gold"] = row["proxy"] - 1
    at = {text.get_text(): text.xy for text in drawn(lower).axes[0].texts}
    assert [at[f"n={row['n']}"] for row in lower["best_of_n"][1:]] == [
        (row["d"], row["proxy"]) for row in lower["best_of_n"][1:]
    ]
