"""The picture: what is drawn, and that all of it is inside."""

import numpy as np
import pytest

from experiments import overoptimisation_picture
from experiments.overoptimisation_picture import draw_overoptimisation
from utils.overoptimisation_fit import best_of_n_curve, rl_curve


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
    ppo = {r: fit(rl_curve, 1, 0.4, last, 4.48) if fitted else None for r in ("proxy", "gold")}
    best = {r: fit(best_of_n_curve, 1, 0.4, 1.35, 1.25) if fitted else None for r in ("proxy", "gold")}
    return {
        "run": "ppo_a_rather_long_name_of_a_run_20260101000000", "judge": "rm:runs/a_large_reward_model",
        "prompts": 4000, "samples": 16, "fits": {"ppo": ppo, "best_of_n": best},
        "ppo": points(rl_curve, "step", [10, 20, 30], [last / 3, last / 2, last]),
        "best_of_n": points(best_of_n_curve, "n", [1, 2, 4, 16], [0, 0.44, 0.8, 1.35]),
    }  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(figures)`: the matplotlib figure behind the file."""
    kept = []
    monkeypatch.setattr(overoptimisation_picture.plt, "close", kept.append)

    def draw(content):
        path = tmp_path / "new" / "picture.png"
        draw_overoptimisation(content, path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        return kept[-1]

    yield draw
    monkeypatch.undo()
    for figure in kept:
        overoptimisation_picture.plt.close(figure)


@pytest.mark.parametrize(("last", "fitted"), [(0.8, True), (40.0, True), (6.0, False)])
def test_every_text_is_inside_the_picture(drawn, last, fitted):
    figure = drawn(figures(last, fitted))
    figure.canvas.draw()  # the file has another resolution than the figure
    renderer, width, height = figure.canvas.get_renderer(), *figure.canvas.get_width_height()
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
