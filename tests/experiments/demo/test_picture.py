"""The picture of the KL ablation: what is drawn in which panel, and under which name."""

import json

import pytest
from matplotlib import colors
from matplotlib.figure import Figure

from experiments.demo.picture import draw_kl_ablation
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
def panels(tmp_path, monkeypatch):
    """The three panels of two seeds, with their runs [(with the penalty, without)]."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **keys: kept.append(self) or save(self, *args, **keys))
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
