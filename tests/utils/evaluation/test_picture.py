"""The picture of an evaluation: it shows what was counted, for any number of pairs."""

import matplotlib.pyplot as plt
import pytest
from comparisons import LOSS, LOST, TIE, WIN, comparison
from matplotlib.image import imread

from utils.evaluation import picture as evaluation_picture
from utils.evaluation.picture import _BETTER, _UNDECIDED, _WORSE, colour, draw_evaluation
from utils.evaluation.report import Evaluation

pytestmark = pytest.mark.slow


def evaluation(comparisons) -> Evaluation:
    return Evaluation("x", {"prompt_count": 9}, {"kind": "gold"}, comparisons, {}, [], {})


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn, left open."""
    drawn = []
    monkeypatch.setattr(evaluation_picture.plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    for figure in drawn:
        plt.close(figure)


def test_points_and_counts_are_those_of_the_comparisons(figures, tmp_path):
    pairs = [
        comparison("sft", "vanilla", [WIN] * 3 + [LOSS] * 2 + [TIE] * 4),
        comparison("best_of_4", "sft", [WIN] * 9),
        comparison("ppo", "sft", [LOST] * 9),
    ]
    draw_evaluation(evaluation(pairs), tmp_path / "e.png")
    axis, text = figures[0].axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [pytest.approx(5 / 9), 1.0]
    diamonds = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]
    assert diamonds == [c.lc_win_rate for c in pairs if c.lc_win_rate is not None]
    assert any(list(line.get_xdata()) == [0.5, 0.5] and line.get_linestyle() == "--" for line in axis.lines)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "SFT vs vanilla",
        "best of 4 vs SFT",
        "PPO vs SFT",
    ]
    cells = {cell.get_text() for cell in text.texts}
    assert {"0.556", "3 / 4 / 2", "1.000", "9 / 0 / 0", "no verdict", "0 / 0 / 0"} <= cells


def test_intervals_lie_around_their_points(figures, tmp_path):
    pair = comparison("a", "b", [WIN] * 6 + [LOSS] * 3)
    draw_evaluation(evaluation([pair]), tmp_path / "e.png")
    ends = [tuple(line.get_xdata()) for line in figures[0].axes[0].lines if len(line.get_xdata()) == 2]
    assert pair.win_rate_ci in ends


@pytest.mark.parametrize("count", [1, 3, 15])
def test_the_picture_has_room_for_every_pair_and_all_its_text(count, figures, tmp_path):
    pairs = [comparison("a_long_name_of_a_system", f"other_{i}", [WIN] * 999) for i in range(count)]
    draw_evaluation(evaluation(pairs), tmp_path / "e.png")
    height, width, _ = imread(tmp_path / "e.png").shape
    assert width > 1000 and height > 60 * count
    figure = figures[0]
    edges = figure.bbox
    for axis in figure.axes:
        for label in [*axis.texts, *axis.get_yticklabels()]:
            box = label.get_window_extent()
            assert edges.x0 <= box.x0 and box.x1 <= edges.x1, label.get_text()


def test_colours_say_who_is_better():
    assert colour((0.51, 0.7)) == _BETTER and colour((0.3, 0.49)) == _WORSE
    assert colour((0.4, 0.6)) == colour((0.5, 0.6)) == colour(None) == _UNDECIDED
