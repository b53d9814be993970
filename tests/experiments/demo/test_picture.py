"""The demo's pictures: what is drawn in which panel, and under which name."""

import json

import pytest
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.demo.picture import draw_demo, draw_kl_ablation, what_it_shows
from experiments.run_plots import read_metrics

pytestmark = pytest.mark.slow


def new_run(root, name, start):
    """A run whose held-out figures nobody can take for one another's, nor for another run's."""
    (root / name).mkdir()
    lines = [
        {"step": step, "eval/score": start + step, "eval/gold": start + step + 0.25, "eval/kl": start + step + 0.5}
        for step in (0, 10, 20)
    ]
    lines += [{"step": 15, "objective/score": -1.0}, {"step": 30, "eval/score": start, "eval/gold": None}]
    (root / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / name


def test_evaluations_of_a_run(tmp_path):
    run = new_run(tmp_path, "a", 100)
    assert read_metrics(run)["eval/score"] == ([0, 10, 20, 30], [100, 110, 120, 100])
    assert read_metrics(run)["eval/gold"] == ([0, 10, 20], [100.25, 110.25, 120.25])


@pytest.fixture
def kept(monkeypatch):
    """The figures behind the files that are written."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **keys: found.append(self) or save(self, *args, **keys))
    return found


def graded(golds, half=0.1):
    """An overoptimisation.json: gold above SFT at iterations 4, 8, ..., with proxy and KL that are nobody else's."""
    rows = [
        {"step": 4 * i, "kl": i + 0.5, "kl_ci": [i, i + 1], "proxy": i / 10, "proxy_ci": [i / 10 - 0.02, i / 10 + 0.02]}
        | {"gold": gold, "gold_ci": [gold - half, gold + half]}
        for i, gold in enumerate(golds, start=1)
    ]
    sft = {"proxy": {"mean": 0.07}, "gold": {"mean": -0.4}}
    return {"run": "ppo_demo_s0_20260101000000", "prompts": 400, "sft": sft, "ppo": rows, "evaluations": []}


def test_a_newcomer_sees_both_rewards_over_the_iterations_and_the_kl(kept, tmp_path):
    figures = graded([1.0, 2.0, 2.4])
    (tmp_path / "graded.json").write_text(json.dumps(figures))
    draw_demo(tmp_path / "graded.json", tmp_path / "demo.png")
    (figure,) = kept
    rewards, distance = figure.axes
    named = {text.get_text(): handle for text, handle in zip(
        rewards.get_legend().get_texts(), rewards.get_legend().legend_handles, strict=True)}  # fmt: skip
    assert [name.split(":")[0] for name in named] == ["proxy", "gold", "where each was before"]
    colour = {name.split(":")[0]: colors.to_hex(handle.get_color()) for name, handle in named.items()}
    lines = {colors.to_hex(line.get_color()): line for line in rewards.lines if line.get_marker() == "o"}
    assert list(lines[colour["proxy"]].get_ydata()) == pytest.approx([0.07, 0.17, 0.27, 0.37])
    assert list(lines[colour["gold"]].get_ydata()) == pytest.approx([-0.4, 0.6, 1.6, 2.0])
    assert all(list(line.get_xdata()) == [0, 4, 8, 12] for line in lines.values())
    dashed = [line for line in rewards.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    levels = {colors.to_hex(line.get_color()): line.get_ydata()[0] for line in dashed}
    assert levels == {colour["proxy"]: 0.07, colour["gold"]: -0.4}
    assert [list(line.get_ydata()) for line in distance.lines] == [[0, 1.5, 2.5, 3.5]]
    at = {text.get_text(): (text.xy, colors.to_hex(text.get_color())) for text in rewards.texts}
    assert at["PPO 2.00"] == ((12, pytest.approx(2.0)), colour["gold"])
    assert at["SFT 0.07"] == ((12, 0.07), colour["proxy"])
    assert set(at) == {"PPO 2.00", "SFT -0.40", "PPO 0.37", "SFT 0.07"}
    assert {rewards.get_xlabel(), distance.get_xlabel()} == {"PPO iteration"} and "KL" in distance.get_ylabel()

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, width, height = canvas.get_renderer(), *canvas.get_width_height()
    for text in [*figure.texts, *rewards.texts, *rewards.get_legend().get_texts()]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()


@pytest.mark.parametrize(
    ("golds", "shown"),
    [
        ([1.0, 2.0, 2.4], "the true reward (gold) rises with it"),
        ([1.0, 2.45, 2.4], "the true reward (gold) rises with it"),  # within the interval
        ([1.0, 2.4, 1.5], "highest at iteration 8 and then fell: over-optimisation"),
        ([0.5, 0.2, 0.05], "but not the true reward"),
    ],
)
def test_the_sentence_above_says_what_happened(golds, shown):
    assert shown in what_it_shows(graded(golds))


@pytest.fixture
def panels(tmp_path, kept):
    """The three panels of two seeds, with their runs [(with the penalty, without)]."""
    starts = [(1000, 2000), (3000, 4000)]
    pairs = [tuple(new_run(tmp_path, str(start), start) for start in pair) for pair in starts]
    draw_kl_ablation(pairs, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    return kept[0].axes, pairs


def shown(axis):
    """{what a line shows: (its colour, its style)}"""
    return {
        (tuple(line.get_xdata()), tuple(line.get_ydata())): (colors.to_hex(line.get_color()), line.get_linestyle())
        for line in axis.lines
    }


def legend(axis):
    """{name in the legend: (colour, style)}"""
    texts, handles = axis.get_legend().get_texts(), axis.get_legend().legend_handles
    assert len({text.get_text() for text in texts}) == len(texts)
    return {t.get_text(): (colors.to_hex(h.get_color()), h.get_linestyle()) for t, h in zip(texts, handles)}


def test_proxy_and_gold_stand_in_their_panels_under_their_names(panels):
    axes, pairs = panels
    assert [axis.get_title() for axis in axes] == [
        "with the KL penalty (default)", "without it (--kl-coef 0)", "KL to the SFT model",
    ]  # fmt: skip
    names = legend(axes[0])
    proxy, gold = names["reward model (proxy)"], names["gold reward, never trained on"]
    assert len(names) == 2 and proxy[0] != gold[0]
    for which in (0, 1):
        expected = {}
        for pair in pairs:
            for tag, look in (("eval/score", proxy), ("eval/gold", gold)):
                expected[tuple(map(tuple, read_metrics(pair[which])[tag]))] = look
        assert shown(axes[which]) == expected and len(expected) == 4
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_the_kl_is_drawn_with_and_without_the_penalty(panels):
    axes, pairs = panels
    names = legend(axes[2])
    assert set(names) == {"with", "without"} and names["with"] != names["without"]
    assert shown(axes[2]) == {
        tuple(map(tuple, read_metrics(pair[which])["eval/kl"])): names[name]
        for pair in pairs for which, name in ((0, "with"), (1, "without"))
    }  # fmt: skip
