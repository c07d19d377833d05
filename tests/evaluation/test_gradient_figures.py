import dataclasses
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from jaxcells.evaluation import gradient_figures
from jaxcells.evaluation.gradient_figures import Measurement, describe_gradients, plot_gradients

LAYERS = ["conv1", "layer1_0/conv1", "layer1_0/conv2", "layer2_0/conv1", "layer2_0/conv2", "fc"]
EVEN = [1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3]


def measured(network, norms, losses, gradient_norms):
    return Measurement(
        network, norms, len(losses) - 1, losses, LAYERS, np.array(gradient_norms, float)
    )


PLAIN = measured("plain6", True, [1.5, 1.4, 1.3], [0.1, 0.1, 0.4, 1, 1, 1])
MEASURED = [
    measured("plain6", True, [1.5], [90, 40, 10, 4, 1, 0.5]),
    PLAIN,
    measured("plain6", False, [1.1], EVEN),
    measured("plain6", False, [1.1, 1.1, 1.1], EVEN),
    measured("resnet6", True, [2.0], [9, 3, 3, 2, 2, 5]),
    measured("resnet6", False, [9.0], [1, 2, 2, 8, 8, 9]),
    measured("resnet6", True, [2.0, 1.0, 0.2], [1, 1, 1, 1, 1, 1]),
    measured("resnet6", False, [9.0, math.inf, math.nan], [math.nan] * 6),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figure of `MEASURED`, in place of a file."""
    last = []
    monkeypatch.setattr(
        gradient_figures, "save_figure", lambda figure, path, dpi: last.append(figure)
    )
    plot_gradients(MEASURED, "gradients.png")
    return last[-1]


def test_four_panels_show_every_network(drawn):
    panels = drawn.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "a  With norms, at initialisation",
        "b  Without norms, at initialisation",
        "c  With norms, after 2 steps",
        "d  Without norms, after 2 steps\n    resnet6 diverged at step 1",
    ]
    lines = {line.get_label(): np.transpose(line.get_data()) for line in panels[0].lines}
    assert list(lines) == ["plain6", "resnet6"]
    np.testing.assert_array_equal(lines["plain6"], [*enumerate([90, 40, 10, 4, 1, 0.5], start=1)])
    np.testing.assert_array_equal(panels[2].lines[0].get_ydata(), PLAIN.gradient_norms)
    assert {axes.get_yscale() for axes in panels} == {"log"}
    assert panels[0].get_ylim() == panels[3].get_ylim()
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["plain6", "resnet6"]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in panels[0].lines}) == 2
    names = {text.get_text(): text.get_position()[0] for text in panels[0].texts}
    assert names == {"stage 1": 2.5, "stage 2": 4.5}
    (shaded,) = panels[0].patches
    assert (shaded.get_x(), shaded.get_width()) == (1.5, 2)


def test_the_caption_says_what_the_numbers_say():
    caption = describe_gradients(MEASURED, setting="batches of 32, seed 0")
    about, claim, table, _ = caption.split("\n\n")
    assert "after 2 steps of training" in about
    assert "batches of 32, seed 0" in about
    # Geometric means: sqrt(40 * 10) / sqrt(4 * 1) = 10, sqrt(0.1 * 0.4) / 1 = 0.2.
    assert claim.endswith(
        "the norm in the first stage of plain6 with norms, over that in its last, is "
        "10 at initialisation, and 0.2 after 2 steps."
    )
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")[2:]]
    start, end = "at initialisation", "after 2 steps"
    assert rows[0] == ["plain6", "with", start, "1.5", "20", "2", "10"]
    assert [row[:3] for row in rows[1:4]] == [
        ["resnet6", "with", start],
        ["plain6", "without", start],
        ["resnet6", "without", start],
    ]
    assert rows[4] == ["plain6", "with", end, "1.3", "0.2", "1", "0.2"]
    assert rows[7] == ["resnet6", "without", f"{end}, diverged at step 1", *["nan"] * 4]


@pytest.mark.parametrize(
    ("losses", "gradient_norms", "diverged"),
    [
        ([1, 1, 1], EVEN, None),
        ([1, 1, 1], [1, math.inf, 1, 1, 1, 1], 2),
        ([math.nan, 1, 1], EVEN, 0),
        ([1, math.inf, math.nan], [math.nan] * 6, 1),
    ],
)
def test_divergence_is_the_first_thing_that_is_not_finite(losses, gradient_norms, diverged):
    assert measured("plain6", True, losses, gradient_norms).diverged == diverged


@pytest.mark.parametrize(
    ("gradient_norms", "ratio"),
    [([1, 0, 1, 1, 1, 1], "0"), ([1, 1, 1, 0, 1, 1], "inf"), ([math.nan] * 6, "nan")],
)
def test_gradients_that_are_zero_or_not_finite_are_described(gradient_norms, ratio, tmp_path):
    odd = [dataclasses.replace(m, gradient_norms=np.array(gradient_norms)) for m in MEASURED]
    assert f"and {ratio} after 2 steps." in describe_gradients(odd, setting="")
    plot_gradients(odd, tmp_path / "gradients.png")
    with Image.open(tmp_path / "gradients.png") as image:
        assert image.width == pytest.approx(6.7 * 300, rel=0.1)
