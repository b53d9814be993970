"""Curves of runs: which run is shown, what is read from it, what a panel and its axis show, and how it is explained."""

import json
import math
import re
import tarfile
from pathlib import Path

import pytest
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.run_plots import (
    CURVES,
    STAGES,
    Curve,
    Range,
    draw_curve,
    draw_run,
    newest_runs,
    read_metrics,
    reading_table,
)

pytestmark = pytest.mark.slow

CURVE = Curve("KL", {"a": "first", "b": "second"}, "Read it.", Range(0, 15), alarm=(30,), shows=(0.0,))


def new_run(root, name, *lines):
    (root / name).mkdir(parents=True)
    (root / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / name


def panel(curve, **lines):
    """A panel of lines that begin at step 0."""
    axis = Figure().add_subplot()
    draw_curve(axis, curve, {tag: (list(range(len(values))), values) for tag, values in lines.items()})
    return axis


def texts(axis):
    return [text.get_text() for text in axis.texts]


def shaded(axis):
    """Lower and upper edge of the healthy range in a panel, or None."""
    edges = [patch.get_bbox().intervaly for patch in axis.patches]
    assert len(edges) <= 1
    return pytest.approx(tuple(edges[0])) if edges else None


# Which run ------------------------------------------------------------------------------------------------------------


def test_the_newest_run_of_a_stage_is_the_one_of_the_latest_time(tmp_path):
    line = {"step": 0, "time": 0.1, "eval/loss": 1.0}
    new_run(tmp_path, "sft_zzz_20260101000000", line)
    new_run(tmp_path, "sft_ppo_one_20260102000000", line)
    new_run(tmp_path, "sft_later_but_silent_20270101000000")
    (tmp_path / "sft_no_file_20270101000000").mkdir()
    new_run(tmp_path, "eval_one_20270101000000", line)
    new_run(tmp_path, "rm_one_2026", line)
    (tmp_path / "ppo_file_20270101000000").write_text("not a folder")
    found = newest_runs(tmp_path)
    assert {stage: run and run.name for stage, run in found.items()} == {
        "sft": "sft_ppo_one_20260102000000", "rm": None, "ppo": None,
    }  # fmt: skip


def test_no_folder_of_runs_is_no_run(tmp_path):
    assert newest_runs(tmp_path / "nowhere") == dict.fromkeys(STAGES)


def test_metrics_leave_out_undefined_values_and_a_line_that_is_being_written(tmp_path):
    run = new_run(
        tmp_path, "ppo_x_20260101000000",
        {"step": 0, "time": 1, "a": 1.0}, {"step": 0, "time": 2, "b": 5.0}, {"step": 2, "time": 3, "a": None, "b": 6.0},
    )  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 5, "a": 7')
    assert read_metrics(run) == {"a": ([0], [1.0]), "b": ([0, 2], [5.0, 6.0])}


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("healthy", "start", "limits", "text"),
    [
        (Range(0, 15), 3.0, (0, 15), "0 to 15"),
        (Range(0.7, 1.3, "times the start"), 20.0, (14, 26), "0.7 to 1.3 times the start"),
        (Range(1, 2.5, "above the start"), -0.5, (0.5, 2), "1 to 2.5 above the start"),
        (Range(0.95, None), 1.0, (0.95, math.inf), "at least 0.95"),
        (Range(None, 1e-4), 1.0, (-math.inf, 1e-4), "at most 0.0001"),
        (Range(0.5, None, "times the start"), 8.0, (4, math.inf), "at least 0.5 times the start"),
        (Range(0.5, None, "times the start"), -8.0, None, "at least 0.5 times the start"),
    ],
)
def test_ranges(healthy, start, limits, text):
    assert healthy.limits(start) == (limits and pytest.approx(limits)) and str(healthy) == text


def test_a_relative_range_counts_from_the_first_value_of_the_first_line_that_was_logged():
    curve = Curve("t", {"a": "x", "b": "y"}, "Read it.", Range(0.5, 1.5, "times the start"))
    assert shaded(panel(curve, a=[10.0, 12.0], b=[100.0, 1.0])) == (5, 15)
    assert shaded(panel(curve, b=[100.0, 1.0])) == (50, 150)


# Panels ---------------------------------------------------------------------------------------------------------------


def test_a_panel_shows_its_lines_in_order_with_the_first_on_top():
    axis = panel(CURVE, a=[0.0, 1.0], b=[3.0, 2.0])
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["first", "second"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn == {"second": [3.0, 2.0], "first": [0.0, 1.0]} and list(drawn)[-1] == "first"
    assert panel(CURVE, a=[0.0, 1.0]).get_legend() is None


def test_a_colour_belongs_to_a_tag_whatever_else_was_logged():
    both, one = panel(CURVE, a=[0.0], b=[1.0]), panel(CURVE, b=[1.0])
    assert both.lines[0].get_color() == one.lines[0].get_color() != both.lines[1].get_color()


def test_the_healthy_range_is_cut_to_what_is_in_view_and_alarms_appear_when_reached():
    axis = panel(CURVE, a=[0.0, 2.0])
    assert axis.get_ylim()[1] < 3 and shaded(axis) == (0, axis.get_ylim()[1]) and len(axis.lines) == 1
    axis = panel(CURVE, a=[0.0, 40.0])
    assert shaded(axis) == (0, 15) and len(axis.lines) == 2
    assert list(axis.lines[1].get_ydata()) == [30, 30] and colors.to_hex(axis.lines[1].get_color()) == "#c0392b"


def test_a_curve_that_is_outside_everywhere_has_the_edge_of_its_range_in_view():
    curve = Curve("t", {"a": "x"}, "Read it.", Range(0.95, 1))
    assert panel(curve, a=[0.1, 0.2]).get_ylim()[1] > 0.95
    assert panel(Curve("t", {"a": "x"}, "Read it.", Range(0, 15)), a=[50.0, 60.0]).get_ylim()[0] < 15


def test_range_and_alarm_begin_where_they_count():
    """At the first point of the leading line from there on, so that the way to it is not under the colour."""
    curve = Curve("t", {"a": "x", "b": "y"}, "Read it.", Range(0, 1), alarm=(2,), since=5)
    axis = Figure().add_subplot()
    draw_curve(axis, curve, {"a": ([0, 10, 20], [3.0, 0.5, 0.5]), "b": ([0, 6, 20], [0.0, 0.0, 0.0])})
    left, right = axis.get_xlim()
    assert left < 0 and right > 20 and list(axis.patches[0].get_bbox().intervalx) == [10, right]
    alarm = axis.lines[-1]
    assert (list(alarm.get_xdata()), list(alarm.get_ydata())) == ([10, right], [2, 2])
    assert curve.expected == "0 to 1, from 5 on" and CURVE.expected == "0 to 15"
    early = Figure().add_subplot()
    draw_curve(early, curve, {"a": ([0, 4], [3.0, 0.5])})
    assert early.patches[0].get_width() == 0 and set(early.lines[-1].get_xdata()) == {early.get_xlim()[1]}


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0], [1e-9, 1e9]])
def test_axes_have_room_for_any_values(values):
    for curve in (Curve("t", {"a": "x"}, "."), Curve("t", {"a": "x"}, ".", Range(1e-4, 1e-2), log=True)):
        axis = panel(curve, a=values)
        low, high = axis.get_ylim()
        assert low < high and all(low < v < high for v in values)
        assert axis.get_yscale() == ("log" if curve.log and values != [0.0] else "linear")


def test_what_was_not_logged_is_said():
    axis = panel(CURVE)
    assert texts(axis) == ["no value in this run"] and not axis.lines and axis.get_title(loc="left") == "KL"


def test_few_points_are_marked_and_many_are_not():
    few, many = panel(CURVE, a=[1.0, 2.0]), panel(CURVE, a=[1.0] * 50)
    assert few.lines[0].get_marker() == "o" and many.lines[0].get_marker() in ("None", "none", "")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_has_a_panel_and_a_row_for_every_curve(stage, tmp_path):
    tags = [tag for curve in CURVES[stage] for tag in curve.tags]
    lines = [{"step": step, "time": step, **dict.fromkeys(tags, 0.25 + step / 8)} for step in (1, 2)]
    run = new_run(tmp_path, f"{stage}_x_20260101000000", *lines)
    figure = draw_run(stage, run)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [curve.title for curve in CURVES[stage]]
    assert [bool(axis.patches) for axis in figure.axes] == [curve.healthy is not None for curve in CURVES[stage]]
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 20_000

    head, rule, *rows = reading_table(stage, run).splitlines()
    assert {row.count("|") for row in (head, rule, *rows)} == {6} and len(rows) == len(CURVES[stage])
    for row, curve in zip(rows, CURVES[stage]):
        _, title, shown, last, healthy, reading, _ = (cell.strip() for cell in row.split("|"))
        assert (title, last, healthy) == (curve.title, "0.5", curve.expected)
        assert re.findall("`([^`]+)`", shown) == list(curve.tags) and reading == curve.reading


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_a_panel_shows_the_tag_that_its_name_stands_for(stage, tmp_path):
    """Gold under the proxy's name would show no over-optimisation at all."""
    tags = {tag: 0.25 + 0.01 * i for i, tag in enumerate(t for curve in CURVES[stage] for t in curve.tags)}
    lines = [{"step": step, "time": 1, **{tag: step * value for tag, value in tags.items()}} for step in (1, 2)]
    figure = draw_run(stage, new_run(tmp_path, f"{stage}_x_20260101000000", *lines))
    for axis, curve in zip(figure.axes, CURVES[stage], strict=True):
        found = {line.get_label(): list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) == 2}
        own = {name: found[name] for name in curve.tags.values()}  # alarms are lines, too
        assert own == {name: [tags[tag], 2 * tags[tag]] for tag, name in curve.tags.items()}
    if stage == "ppo":
        names = {tag: name for curve in CURVES[stage] for tag, name in curve.tags.items()}
        assert "proxy" in names["eval/score"] and "gold" in names["eval/gold"] and "proxy" not in names["eval/gold"]


def test_a_table_says_what_was_not_logged(tmp_path):
    run = new_run(tmp_path, "sft_x_20260101000000", {"step": 0, "time": 0, "train/loss": 3.25})
    rows = reading_table("sft", run).splitlines()[2:]
    assert "`train/loss` | 3.25 |" in rows[0] and "eval/loss" not in rows[0]
    assert all("| none |" in row for row in rows[1:])


# Healthy runs --------------------------------------------------------------------------------------------------------

PACKED = Path(__file__).parent / "doctor/runs"
# Three seeds of an earlier recipe, and metrics.jsonl of `make demo` at ee24ce9.
HEALTHY = [path for path in sorted(PACKED.glob("*_demo_s?*.tar.gz")) if "kl0" not in path.name]
HEALTHY += sorted((Path(__file__).parent / "demo").glob("*_ee24ce9.tar.gz"))


def unpacked(archive, folder):
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(folder.iterdir())


def beyond(figure):
    """{panel: points beyond one of its alarms, where that is drawn}; an alarm lies above or below the healthy range."""
    found = {}
    for axis in figure.axes:
        alarms = [line for line in axis.lines if colors.to_hex(line.get_color()) == "#c0392b"]
        points = [p for line in axis.lines if line not in alarms for p in zip(line.get_xdata(), line.get_ydata())]
        for alarm in alarms:
            (first, last), (level, _), (bottom, top) = alarm.get_xdata(), alarm.get_ydata(), shaded(axis).expected
            assert level <= bottom or level >= top, axis.get_title(loc="left")
            for step, value in points:
                if first <= step <= last and (value > level if level >= top else value < level):
                    found.setdefault(axis.get_title(loc="left"), []).append((step, value))
    return found


def test_the_demos_of_three_seeds_are_there():
    assert len(HEALTHY) == 15 + 4, HEALTHY  # of each seed two of SFT, one of the reward model, two of PPO


@pytest.mark.parametrize("archive", HEALTHY, ids=lambda path: path.name[:-7])
def test_a_healthy_run_crosses_no_alarm_and_is_in_every_range_where_that_counts(archive, tmp_path):
    run = unpacked(archive, tmp_path)
    stage = run.name.partition("_")[0]
    assert beyond(draw_run(stage, run)) == {}
    metrics = read_metrics(run)
    for curve in CURVES[stage]:
        leading = next((metrics[tag] for tag in curve.tags if tag in metrics), None)
        if curve.healthy and leading:
            low, high = curve.healthy.limits(start=leading[1][0])
            assert [(s, v) for s, v in zip(*leading) if s >= curve.since and not low <= v <= high] == [], curve.title


@pytest.mark.parametrize(
    ("name", "panel"),
    [
        ("ppo_doctor_lr30", "approximate KL of an update"),
        ("rm_doctor_lr30_s2", "ranking loss, nats per prompt"),
    ],
)
def test_a_broken_run_crosses_one(name, panel, tmp_path):
    run = unpacked(PACKED / f"{name}.tar.gz", tmp_path)
    assert panel in beyond(draw_run(name.partition("_")[0], run))


def is_title(axis):
    """Whether an artist of a panel is the text of its title."""
    return lambda artist: isinstance(artist, Text) and artist.get_text() == axis.get_title(loc="left")


@pytest.mark.parametrize("stage", STAGES)
def test_legends_lie_over_no_curve_and_beside_no_other_panel(stage, tmp_path):
    tags = [tag for curve in CURVES[stage] for tag in curve.tags]
    lines = [{"step": step, "time": step, **dict.fromkeys(tags, 0.25 + step / 8)} for step in (1, 2)]
    figure = draw_run(stage, new_run(tmp_path, f"{stage}_x_20260101000000", *lines))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legends = [axis for axis in figure.axes if axis.get_legend()]
    assert legends
    for axis in legends:
        legend, panel = axis.get_legend().get_window_extent(canvas.get_renderer()), axis.get_window_extent()
        (title,) = axis.findobj(match=is_title(axis))
        title = title.get_window_extent(canvas.get_renderer())
        assert panel.y1 - 4 <= legend.y0 and legend.y1 <= title.y0 + 4, axis.get_title(loc="left")
        assert legend.x1 <= panel.x1 + 4, axis.get_title(loc="left")


@pytest.mark.parametrize("stage", STAGES)
def test_every_reading_is_one_sentence(stage):
    for curve in CURVES[stage]:
        assert re.fullmatch(r"[A-Z][^|\n]*\.", curve.reading) and not re.search(r"\.\s", curve.reading), curve.title
        assert 60 < len(curve.reading) < 260, curve.title
