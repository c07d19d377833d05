import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from jaxcells.evaluation import comparison_figures
from jaxcells.evaluation.comparison_figures import plot_accuracy_against_time, plot_curves_together
from jaxcells.evaluation.comparison_table import Row


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was drawn last, in place of a file."""
    last = []
    monkeypatch.setattr(
        comparison_figures, "save_figure", lambda figure, path, dpi: last.append(figure)
    )
    return lambda: last[-1]


def figures(mean, low, high):
    return {"balanced_accuracy": mean, "interval_95": {"balanced_accuracy": [low, high]}}


def row(name, train_s, mean, *, chosen=False, test=None):
    validation = figures(mean, mean - 0.05, mean + 0.03)
    return Row(name, (0,), validation=validation, test=test, train_s=train_s, chosen=chosen)


STUDY = [
    row("resnet18", 143.0, 0.92, test=figures(0.80, 0.7, 0.85)),
    row("resnet34", 272.0, 0.95, test=figures(0.91, 0.85, 0.95), chosen=True),
    row("resnet50", 330.0, 0.955, test=figures(0.93, None, None)),
    row("resnet152", 905.0, 0.94),
    Row("preact1001", failure="out of memory"),
]


def points_of(axes):
    """Points by marker: {"o": [[x, y], ...], "s": ...}, without rings and ends of intervals."""
    points = {}
    for line in axes.get_lines():
        if line.get_marker() in "os" and line.get_markerfacecolor() != "none":
            points.setdefault(line.get_marker(), []).append(np.ravel(line.get_data()).tolist())
    return points


def test_accuracy_stands_over_time_with_intervals(drawn):
    plot_accuracy_against_time(STUDY, "a.png")
    (axes,) = drawn().axes
    minutes = [143 / 60, 272 / 60, 330 / 60, 905 / 60]
    assert points_of(axes)["o"] == [
        [x, y] for x, y in zip(minutes, (0.92, 0.95, 0.955, 0.94), strict=True)
    ]
    assert points_of(axes)["s"] == [[minutes[0], 0.80], [minutes[1], 0.91], [minutes[2], 0.93]]
    bars = [line.get_ydata() for line in axes.get_lines() if line.get_marker() == "_"]
    expected = [
        [0.87, 0.95],
        [0.7, 0.85],
        [0.90, 0.98],
        [0.85, 0.95],
        [0.905, 0.985],
        [0.89, 0.97],
    ]
    np.testing.assert_allclose(bars, expected)
    low, high = axes.get_ylim()
    assert low < 0.7  # the test intervals, drawn aside, are in sight too
    assert high > 0.985
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "training time (min)"
    (ring,) = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    assert np.ravel(ring.get_data()).tolist() == [minutes[1], 0.95]
    weights = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert weights == {
        "resnet18": "normal",
        "resnet34": "bold",
        "resnet50": "normal",
        "resnet152": "normal",
    }


def test_near_times_have_a_plain_axis_and_the_unit_that_fits(drawn):
    plot_accuracy_against_time([row("a", 40.0, 0.9), row("b", 90.0, 0.9)], "a.png")
    assert drawn().axes[0].get_xscale() == "linear"
    assert drawn().axes[0].get_xlabel() == "training time (s)"
    plot_accuracy_against_time([row("a", 7200.0, 0.9), row("b", 18000.0, 0.9)], "a.png")
    assert drawn().axes[0].get_xlabel() == "training time (h)"
    assert points_of(drawn().axes[0])["o"][1][0] == 5


@pytest.mark.parametrize(
    "times",
    [(143, 272, 330, 905), (143, 144, 145, 150), (100, 100, 100, 100), (905, 330, 272, 143)],
)
def test_names_meet_neither_each_other_nor_a_line(times, drawn):
    rows = [
        dataclasses.replace(STUDY[number], name=f"resnet{number}_of_a_long_name", train_s=time)
        for number, time in enumerate(times)
    ]
    plot_accuracy_against_time(rows, "a.png")
    figure = drawn()
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    names = [text.get_window_extent() for text in axes.texts]
    assert len(names) == 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))
    area = axes.get_window_extent()
    assert all(name.y0 >= area.y1 for name in names)
    flags = [line for line in axes.get_lines() if line.get_linewidth() == 0.7]
    assert len(flags) == 4
    for line in flags:
        start, end = line.get_transform().transform(np.column_stack(line.get_data()))
        assert not any(
            name.x0 <= start[0] <= name.x1 and start[1] < name.y1 and end[1] > name.y0
            for name in names
        )
    # Each line ends at the top of the interval of its own experiment.
    tops = sorted(0.03 + r.validation["balanced_accuracy"] for r in rows)
    feet = [line.get_transform().transform(line.get_xydata()[0]) for line in flags]
    feet = sorted(axes.transData.inverted().transform(foot)[1] for foot in feet)
    np.testing.assert_allclose(feet, tops, atol=1e-6)


def test_nothing_to_draw_is_an_empty_figure(tmp_path):
    plot_accuracy_against_time([STUDY[-1]], tmp_path / "a.png")
    plot_curves_together({}, tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 2


def records(losses, accuracies, *, per_epoch=10):
    lines = []
    for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1):
        common = {"step": per_epoch * epoch, "epoch": epoch}
        lines.append({**common, "split": "train", "loss": loss, "accuracy": 0.1})
        validated = {"loss": 9.0, "accuracy": 0.2, "balanced_accuracy": accuracy}
        lines.append({**common, "split": "val", **validated})
    return lines


def series(axes):
    """(colour, line style, width, points) of every line."""
    return [
        (
            to_hex(line.get_color()),
            line.get_linestyle(),
            line.get_linewidth(),
            np.column_stack(line.get_data()).tolist(),
        )
        for line in axes.get_lines()
    ]


def test_curves_of_all_experiments_share_the_axes(drawn):
    plot_curves_together(
        {
            "plain34": [records([1.0, 0.5, 0.4], [0.3, 0.5, 0.6])],
            "resnet34": [records([0.9, 0.2, 0.05], [0.2, 0.8, 0.9])],
        },
        "c.png",
    )
    loss, accuracy = drawn().axes
    assert [line[3] for line in series(loss)] == [
        [[1, 1.0], [2, 0.5], [3, 0.4]],
        [[1, 0.9], [2, 0.2], [3, 0.05]],
    ]
    assert [line[3] for line in series(accuracy)] == [
        [[1, 0.3], [2, 0.5], [3, 0.6]],
        [[1, 0.2], [2, 0.8], [3, 0.9]],
    ]
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    (legend,) = drawn().legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain34", "resnet34"]
    colors = [to_hex(handle.get_color()) for handle in legend.get_lines()]
    assert colors == [line[0] for line in series(loss)]
    assert len(set(colors)) == 2


def test_losses_of_one_size_keep_a_plain_axis(drawn):
    plot_curves_together({"a": [records([1.0, 0.5], [0.3, 0.5])]}, "c.png")
    assert drawn().axes[0].get_yscale() == "linear"


def test_seeds_are_thin_and_their_mean_is_thick_where_all_are(drawn):
    plot_curves_together(
        {
            "a": [
                records([1.0, 0.6, 0.2], [0.3, 0.5, 0.9]),
                records([0.8, 0.4], [0.5, 0.7]),  # not finished
                [],  # not begun
            ]
        },
        "c.png",
    )
    loss, accuracy = drawn().axes
    first, second, mean = series(loss)
    assert first[3] == [[1, 1.0], [2, 0.6], [3, 0.2]]
    assert second[3] == [[1, 0.8], [2, 0.4]]
    np.testing.assert_allclose(mean[3], [[1, 0.9], [2, 0.5]])
    assert mean[2] > 2 * first[2]
    assert {line[0] for line in series(loss)} == {first[0]}
    np.testing.assert_allclose(series(accuracy)[-1][3], [[1, 0.4], [2, 0.6]])


def test_many_experiments_are_told_apart(drawn):
    plot_curves_together(
        {f"network {n}": [records([1.0, 0.5], [0.3, 0.5])] for n in range(20)}, "c.png"
    )
    styles = [line[:2] for line in series(drawn().axes[0])]
    assert len(set(styles)) == 20
    assert len({color for color, _ in styles[:7]}) == 7


def test_an_experiment_has_one_colour_in_both_figures(drawn):
    rows = [STUDY[-1], *STUDY[:2]]  # the first failed
    plot_accuracy_against_time(rows, "a.png")
    in_time = [
        to_hex(line.get_color())
        for line in drawn().axes[0].get_lines()
        if line.get_marker() == "o" and line.get_markerfacecolor() != "none"
    ]
    plot_curves_together({r.name: [records([1.0], [0.5])] for r in rows}, "c.png")
    assert in_time == [line[0] for line in series(drawn().axes[0])][1:]


def test_figures_fit_print(tmp_path):
    plot_accuracy_against_time(STUDY, tmp_path / "a.png")
    names = ["resnet18", r"$\frac{$ 100 %"]  # no formula
    plot_curves_together(
        {name: [records([1.0, 0.1], [0.3, 0.5])] for name in names}, tmp_path / "c.png"
    )
    for name in ("a.png", "c.png"):
        with Image.open(tmp_path / name) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
            assert image.width / 300 < 7.5  # inches, a page's width
