import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from jaxcells.evaluation.comparison import Estimate
from jaxcells.evaluation.comparison_figures import (
    draw_accuracy_against_time,
    draw_curves_together,
    draw_learning_curves,
)
from jaxcells.evaluation.comparison_table import Row
from jaxcells.evaluation.figures import save_figure


def figures(mean, low, high):
    return Estimate(mean, mean, {"balanced_accuracy": (low, high)}, None)


def row(name, train_s, mean, test, *, chosen=False):
    validation = figures(mean, mean - 0.05, mean + 0.03)
    return Row(name, chosen, (0,), validation, test, 1, 1, train_s, 1, 1, 1, 1, 1)


STUDY = [
    row("resnet18", 143.0, 0.92, figures(0.80, 0.7, 0.85)),
    row("resnet34", 272.0, 0.95, figures(0.91, 0.85, 0.95), chosen=True),
    row("resnet50", 330.0, 0.955, figures(0.93, None, None)),
    row("resnet152", 905.0, 0.94, figures(0.90, None, None)),
]


def points_of(axes):
    """Points by marker: {"o": [[x, y], ...], "s": ...}, without rings and ends of intervals."""
    points = {}
    for line in axes.get_lines():
        if line.get_marker() in "os" and line.get_markerfacecolor() != "none":
            points.setdefault(line.get_marker(), []).append(np.ravel(line.get_data()).tolist())
    return points


def test_accuracy_stands_over_time_with_intervals():
    figure = draw_accuracy_against_time(STUDY, {})
    (axes,) = figure.axes
    minutes = [143 / 60, 272 / 60, 330 / 60, 905 / 60]
    for marker, values in (("o", (0.92, 0.95, 0.955, 0.94)), ("s", (0.80, 0.91, 0.93, 0.90))):
        assert points_of(axes)[marker] == [list(xy) for xy in zip(minutes, values, strict=True)]
    bars = [line.get_ydata() for line in axes.get_lines() if line.get_marker() == "_"]
    bars = [bar for bar in bars if len(bar)]
    expected = [(0.87, 0.95), (0.7, 0.85), (0.9, 0.98), (0.85, 0.95), (0.905, 0.985), (0.89, 0.97)]
    np.testing.assert_allclose(bars, expected)
    low, high = axes.get_ylim()
    assert low < 0.7  # the test intervals, drawn aside, are in sight too
    assert high > 0.985
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "training time (min)"
    (ring,) = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    assert np.ravel(ring.get_data()).tolist() == [minutes[1], 0.95]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [r.name for r in STUDY] + ["validation", "test (moved aside)", "chosen"]
    discs = [line for line in axes.get_lines() if line.get_markersize() == 6]
    colors = [line.get_color() for line in discs]
    assert colors == [handle.get_color() for handle in legend.get_lines()[:4]]
    assert len(set(colors)) == 4


def test_what_accuracies_must_beat_is_drawn_and_named():
    levels, curves = {"chance": 0.25, "brightness": 0.7}, [records([1.0, 0.5], [0.3, 0.5])]
    plots = draw_accuracy_against_time(STUDY, levels), draw_curves_together({"a": curves}, levels)
    for figure in plots:
        lines = {line.get_label(): line for line in figure.axes[-1].get_lines()}
        assert lines["chance (0.250)"].get_ydata() == [0.25, 0.25]
        assert lines["brightness alone, test (0.700)"].get_ydata() == [0.7, 0.7]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend[-2:] == ["chance (0.250)", "brightness alone, test (0.700)"]


def test_names_that_are_alike_when_short_stay_apart():
    names = ["x" * 40 + f"{n}" + "y" * 20 for n in range(2)]
    figure = draw_accuracy_against_time(
        [row(n, 9.0, 0.5, figures(0.5, 0.4, 0.6)) for n in names], {}
    )
    assert len({text.get_text() for text in figure.legends[0].get_texts()[:2]}) == 2


def test_near_times_have_a_plain_axis_and_the_unit_that_fits():
    for seconds, unit in ((90.0, "s"), (18000.0, "h")):
        rows = [dataclasses.replace(r, train_s=seconds / n) for n, r in enumerate(STUDY[:3], 1)]
        figure = draw_accuracy_against_time(rows, {})
        assert figure.axes[0].get_xscale() == "linear"
        assert figure.axes[0].get_xlabel() == f"training time ({unit})"
    assert points_of(figure.axes[0])["o"][0][0] == 5


def records(losses, accuracies):
    lines = []
    for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1):
        common = {"step": 10 * epoch, "epoch": epoch}
        lines.append({**common, "split": "train", "loss": loss, "accuracy": 0.1})
        validated = {"loss": 9.0, "accuracy": 0.2, "balanced_accuracy": accuracy}
        lines.append({**common, "split": "val", **validated})
    return lines


def points(axes):
    return [np.column_stack(line.get_data()).tolist() for line in axes.get_lines()]


def test_curves_of_all_experiments_share_the_axes():
    plain = [records([1.0, 0.5, 0.4], [0.3, 0.5, 0.6])]
    residual = [records([0.9, 0.2, 0.05], [0.2, 0.8, 0.9])]
    figure = draw_curves_together({"plain34": plain, "resnet34": residual}, {})
    loss, accuracy = figure.axes
    assert points(loss) == [[[1, 1.0], [2, 0.5], [3, 0.4]], [[1, 0.9], [2, 0.2], [3, 0.05]]]
    assert points(accuracy) == [[[1, 0.3], [2, 0.5], [3, 0.6]], [[1, 0.2], [2, 0.8], [3, 0.9]]]
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain34", "resnet34"]
    colors = [handle.get_color() for handle in legend.get_lines()]
    assert colors == [line.get_color() for line in loss.get_lines()]
    assert len(set(colors)) == 2

    figure = draw_curves_together({"a": [records([1.0, 0.5], [0.3, 0.5])]}, {})
    assert figure.axes[0].get_yscale() == "linear"


def test_seeds_are_thin_and_their_mean_is_thick_where_all_are():
    unfinished = records([0.8, 0.4], [0.5, 0.7])
    seeds = [records([1.0, 0.6, 0.2], [0.3, 0.5, 0.9]), unfinished, []]  # the last not begun
    figure = draw_curves_together({"a": seeds}, {})
    loss, accuracy = figure.axes
    first, second, mean = points(loss)
    assert first == [[1, 1.0], [2, 0.6], [3, 0.2]]
    assert second == [[1, 0.8], [2, 0.4]]
    np.testing.assert_allclose(mean, [[1, 0.9], [2, 0.5]])
    np.testing.assert_allclose(points(accuracy)[-1], [[1, 0.4], [2, 0.6]])
    thin, _, thick = loss.get_lines()
    assert thick.get_linewidth() > 2 * thin.get_linewidth()
    assert thick.get_color() == thin.get_color()


def test_many_experiments_are_told_apart_with_one_colour_in_both_figures():
    many = {f"network {n}": [records([1.0, 0.5], [0.3, 0.5])] for n in range(20)}
    figure = draw_curves_together(many, {})
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    colors = [to_hex(line.get_color()) for line in lines]
    assert len(set(colors[:7])) == 7
    assert "#f0e442" not in colors  # yellow is lost on white
    figure = draw_accuracy_against_time(STUDY[:2], {})
    discs = [line for line in figure.axes[0].get_lines() if line.get_markersize() == 6]
    assert [to_hex(disc.get_color()) for disc in discs] == colors[:2]


def test_a_learning_curve_stands_over_the_number_of_images():
    numbers = (3, 6, 12)
    rows = [
        dataclasses.replace(row(f"a_fraction{n}", 1, 0.7 + n / 100, None), training_images=n)
        for n in numbers
    ]
    figure = draw_learning_curves({"a": rows, "b": rows[1:]})
    (axes,) = figure.axes
    curve, *others = axes.get_lines()
    assert np.column_stack(curve.get_data()).tolist() == [[3, 0.73], [6, 0.76], [12, 0.82]]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3", "6", "12"]
    ends = [line.get_ydata().tolist() for line in others if line.get_marker() == "_"]
    assert ends[0] == pytest.approx([0.68, 0.76])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_figures_fit_print(tmp_path):
    curves = {"resnet18": [records([1.0, 0.1], [0.3, 0.5])]}
    for figure in (draw_accuracy_against_time(STUDY, {}), draw_curves_together(curves, {})):
        save_figure(figure, tmp_path / "a.png", dpi=300)
        with Image.open(tmp_path / "a.png") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
            assert image.width / 300 < 7.5  # inches, a page's width
