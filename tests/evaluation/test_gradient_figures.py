import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from jaxcells.evaluation import gradient_figures
from jaxcells.evaluation.gradient_figures import describe_gradients, plot_gradients

LAYERS = ["conv1", "layer1_0/conv1", "layer1_0/conv2", "layer2_0/conv1", "layer2_0/conv2", "fc"]
# {network: (with norms at first, without, with norms at last, without)}, a norm per layer.
NORMS = {
    "plain6": (
        [90, 40, 10, 4, 1, 0.5],
        [1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3],
        [0.1, 0.1, 0.4, 1, 1, 1],
        [1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3],
    ),
    "resnet6": ([9, 3, 3, 2, 2, 5], [1, 2, 2, 8, 8, 9], [1, 1, 1, 1, 1, 1], [math.nan] * 6),
}
STEPS = 4
LOSSES = {
    ("plain6", True): [1.5, 1.4, 1.3, 1.2],
    ("plain6", False): [1.1, 1.1, 1.1, 1.1],
    ("resnet6", True): [2.0, 1.0, 0.5, 0.2],
    ("resnet6", False): [9.0, 1e30, math.inf, math.nan],
}


def make_rows(norms_of=NORMS):
    rows = []
    for network, panels in norms_of.items():
        for panel, (step, norms) in enumerate(
            [(0, True), (0, False), (STEPS, True), (STEPS, False)]
        ):
            loss = LOSSES[network, norms][0 if step == 0 else -1]
            shared = {"network": network, "norms": norms, "step": step, "loss": loss}
            rows += [
                shared | {"depth": depth, "layer": layer, "gradient_norm": value}
                for depth, (layer, value) in enumerate(
                    zip(LAYERS, panels[panel], strict=True), start=1
                )
            ]
            rows.append(
                shared | {"depth": None, "layer": "layer2_0/downsample_conv", "gradient_norm": 1e9}
            )
    return rows


def make_losses():
    return [
        {"network": network, "norms": norms, "step": step, "loss": loss}
        for (network, norms), trace in LOSSES.items()
        for step, loss in enumerate(trace)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was drawn last, in place of a file."""
    last = []
    monkeypatch.setattr(
        gradient_figures, "save_figure", lambda figure, path, dpi: last.append(figure)
    )
    return lambda: last[-1]


def lines_of(axes):
    return {line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines}


def test_four_panels_show_the_main_path_of_every_network(drawn):
    plot_gradients(make_rows(), make_losses(), "gradients.png")
    panels = drawn().axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "a  With norms, at initialisation",
        "b  Without norms, at initialisation",
        "c  With norms, after 4 steps",
        "d  Without norms, after 4 steps\n    resnet6 diverged at step 2",
    ]
    for number, axes in enumerate(panels):
        assert axes.get_yscale() == "log"
        lines = lines_of(axes)
        assert list(lines) == list(NORMS)
        for network, line in lines.items():
            expected = list(zip(range(1, 7), NORMS[network][number], strict=True))
            np.testing.assert_array_equal(line, expected)
    assert [text.get_text() for text in drawn().legends[0].get_texts()] == list(NORMS)
    styles = {(to_hex(line.get_color()), line.get_marker()) for line in panels[0].lines}
    assert len(styles) == 2
    assert panels[0].get_ylim() == panels[3].get_ylim()


def test_stages_are_marked_where_they_are(drawn):
    plot_gradients(make_rows(), make_losses(), "gradients.png")
    axes = drawn().axes[0]
    assert {text.get_text(): text.get_position()[0] for text in axes.texts} == {
        "stage 1": 2.5,
        "stage 2": 4.5,
    }
    (shaded,) = axes.patches
    assert (shaded.get_x(), shaded.get_width()) == (1.5, 2)


def test_the_order_of_the_rows_does_not_matter(drawn):
    plot_gradients(make_rows()[::-1], make_losses()[::-1], "gradients.png")
    backwards = [lines_of(axes) for axes in drawn().axes]
    plot_gradients(make_rows(), make_losses(), "gradients.png")
    assert backwards[0]["plain6"] == lines_of(drawn().axes[0])["plain6"]


def test_the_caption_says_what_the_numbers_say():
    caption = describe_gradients(make_rows(), make_losses(), setting="batches of 32, seed 0")
    about, ratios, plain, table = caption.split("\n\n", maxsplit=3)
    assert "after 4 steps of training" in about
    assert "batches of 32, seed 0" in about
    # Geometric means: sqrt(40 * 10) / sqrt(4 * 1) = 10, sqrt(0.1 * 0.4) / 1 = 0.2.
    assert ratios == (
        "Norm in the first stage over that in the last, and median of all layers: "
        "(a) with norms, at initialisation, plain6 10 (median 7), resnet6 1.5 (median 3); "
        "(b) without norms, at initialisation, plain6 0.5 (median 0.0015), "
        "resnet6 0.25 (median 5); "
        "(c) with norms, after 4 steps, plain6 0.2 (median 0.7), resnet6 1 (median 1); "
        "(d) without norms, after 4 steps, plain6 0.5 (median 0.0015), resnet6 diverged at step 2."
    )
    assert plain.endswith(
        "that of plain6 with norms is 10 times larger at initialisation, and 5 times smaller after "
        "4 steps."
    )
    assert "| plain6 | with | at initialisation | 1.5 | 20 | 2 | 10 | 0.5 | 90 |\n" in table
    assert "| resnet6 | without | after 4 steps | nan | nan | nan | nan | nan | nan |\n" in table


@pytest.mark.parametrize(
    ("last", "text"),
    [
        ([1, 0, 1, 1, 1, 1], "and zero in a layer after 4 steps."),
        ([1, math.inf, 1, 1, 1, 1], "and not finite after 4 steps."),
    ],
)
def test_gradients_that_are_zero_or_infinite_are_said_to_be_so(last, text, tmp_path):
    norms_of = NORMS | {"plain6": (*NORMS["plain6"][:2], last, NORMS["plain6"][3])}
    caption = describe_gradients(make_rows(norms_of), make_losses(), setting="")
    assert text in caption
    plot_gradients(make_rows(norms_of), make_losses(), tmp_path / "gradients.png")
    with Image.open(tmp_path / "gradients.png") as image:
        assert image.width == pytest.approx(6.7 * 300, rel=0.1)


def test_a_figure_of_networks_that_all_diverged_is_drawn(tmp_path):
    nothing = ([math.nan] * 6,) * 4
    plot_gradients(make_rows(dict.fromkeys(NORMS, nothing)), make_losses(), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
