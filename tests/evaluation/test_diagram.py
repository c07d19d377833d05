import collections
import functools

import pytest
from matplotlib.patches import Circle, FancyArrowPatch
from PIL import Image

from jaxcells.evaluation import diagram
from jaxcells.evaluation.diagram import plot_network
from jaxcells.models import create_model
from jaxcells.models.summary import summarize

SHAPE = (200, 200, 3)


@functools.cache
def layers_of(name):
    return summarize(create_model(name, num_classes=3), SHAPE)


def plot(name, path):
    shortcuts = not name.startswith("plain")
    plot_network(layers_of(name), path, input_shape=SHAPE, shortcuts=shortcuts, title=name)


@pytest.fixture
def draw(monkeypatch):
    """Draws the network of a name and returns the axes, in place of a file."""
    kept = []
    monkeypatch.setattr(diagram, "save_figure", lambda figure, path, dpi: kept.append(figure))

    def run(name):
        plot(name, "")
        (axes,) = kept.pop().axes
        return axes

    return run


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def shortcuts_of(axes):
    """Numbers of shortcuts and, among them, of projections; legend and twins not counted."""
    sums = sum(isinstance(patch, Circle) for patch in axes.patches)
    dashed = [
        patch
        for patch in axes.patches
        if isinstance(patch, FancyArrowPatch) and patch.get_linestyle() not in ("-", "solid")
    ]
    in_legend = any("projection" in text for text in texts_of(axes))
    return sums - 1, len(dashed) - in_legend


def test_every_convolution_of_a_network_is_a_box(draw):
    axes = draw("resnet34")
    counts = collections.Counter(texts_of(axes))
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        strided = channels > 64
        assert counts[f"3×3, {channels}"] == 2 * blocks - strided
        assert counts[f"3×3, {channels}, /2"] == strided
    assert counts["7×7, 64, /2"] == counts["max pool, /2"] == counts["global mean"] == 1
    assert counts["dense, 3"] == 1
    sizes = ["200×200×3", "100×100×64", "50×50×64", "25×25×128", "13×13×256", "7×7×512"]
    assert sorted(text for text in counts if text in sizes) == sorted(sizes)
    assert texts_of(axes)[0] == "resnet34 · 21.3 M parameters, 3.14 G multiply-adds"
    assert {"stem", "stage 1", "stage 4", "head"} < set(counts)
    assert "stage 5" not in counts


@pytest.mark.parametrize(
    ("name", "blocks", "projections"),
    [
        *[("resnet18", 8, 3), ("resnet34", 16, 3), ("resnet50", 16, 4), ("plain34", 0, 0)],
        *[("preact34", 16, 3), ("preact1001", 6, 3)],  # of 1001 layers, two units in a stage
    ],
)
def test_every_shortcut_is_drawn_as_what_it_is(draw, name, blocks, projections):
    assert shortcuts_of(draw(name)) == (blocks, projections)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet152", ["×2", "×7", "×35", "×2"]),
        # The first block of a plain stage differs from the others by its input only.
        ("plain152", ["×3", "×7", "×35", "×2"]),
        ("preact1001", ["×110"] * 3),
    ],
)
def test_equal_blocks_of_a_deep_network_are_drawn_once(draw, name, counts):
    texts = texts_of(draw(name))
    assert [text for text in texts if text.startswith("×")] == counts
    assert texts.count("3×3, 64, /2" if name == "preact1001" else "3×3, 256, /2") == 1


BASIC = ["3×3 conv, 64", "batch norm", "relu", "3×3 conv, 64", "batch norm"]
BOTTLENECK = [
    *("1×1 conv, 64", "batch norm", "relu", "3×3 conv, 64", "batch norm", "relu"),
    *("1×1 conv, 256", "batch norm"),
]
PREACTIVATION = ["batch norm", "relu", "3×3 conv, 64"] * 2


@pytest.mark.parametrize(
    ("name", "title", "twin", "branch"),
    [
        ("resnet18", "residual block", "its plain twin", BASIC),
        ("plain18", "plain block", "its residual twin", BASIC),
        ("resnet50", "residual block", "its plain twin", BOTTLENECK),
        ("preact34", "pre-activation unit", "its plain twin", PREACTIVATION),
    ],
)
def test_a_block_stands_beside_its_twin(draw, name, title, twin, branch):
    texts = texts_of(draw(name))
    start, middle = texts.index(title), texts.index(twin)
    end = next(i for i, text in enumerate(texts) if text in ("identity shortcut", "k×k, C, /s"))
    for name, drawn in ((title, texts[start:middle]), (twin, texts[middle:end])):
        joined = ["$F(x)$"] if "plain" in name else ["$F(x)+x$", "identity"]
        after = [] if branch is PREACTIVATION else ["relu"]
        assert drawn == [name, "$x$", *branch, *joined, *after]


@pytest.mark.parametrize("name", ["resnet34", "plain152", "resnet152", "preact101", "preact1001"])
def test_it_fits_a_printed_page_with_legible_letters(draw, name):
    axes = draw(name)
    width, height = axes.figure.get_size_inches() * 2.54
    assert (width < 17.1, height < 22) == (True, True)
    assert min(text.get_fontsize() for text in axes.texts) >= 6.5


def test_file_is_a_picture_for_print(tmp_path):
    plot("resnet18", tmp_path / "network.png")
    with Image.open(tmp_path / "network.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert 17 < image.width / 300 * 2.54 < 18  # cm, with a margin
