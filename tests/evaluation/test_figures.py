import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jaxcells.evaluation import figures
from jaxcells.evaluation.figures import (
    COLORS,
    draw_curves,
    log_axis_if_wide,
    plot_confusion,
    plot_crops_sheet,
    save_figure,
)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figure that was drawn last, in place of a file."""
    last = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: last.append(figure))
    return lambda: last[-1].axes


def record(step, epoch, split, loss, accuracy):
    return {"step": step, "epoch": epoch, "split": split, "loss": loss, "accuracy": accuracy}


RECORDS = [
    record(5, 1, "train", 1.0, 0.3),
    record(10, 1, "train", 0.8, 0.5),
    record(10, 1, "val", 0.9, 0.6),
    record(20, 2, "train", 0.4, 0.8),
    record(20, 2, "val", 0.7, 0.9),
    record(30, 3, "train", 0.2, 0.9),
    record(30, 3, "val", 0.8, 0.9),
]


def lines_of(axes):
    return {
        line.get_label(): np.column_stack(line.get_data()).tolist() for line in axes.get_lines()
    }


def test_curves_show_the_records():
    loss, accuracy = draw_curves(RECORDS, {}, best_step=20).axes
    assert [axes.get_title() for axes in (loss, accuracy)] == ["Loss", "Accuracy"]
    assert lines_of(loss) == {
        "train": [[1, 0.9], [2, 0.4], [3, 0.2]],  # two records of the first epoch: their mean
        "validation": [[1, 0.9], [2, 0.7], [3, 0.8]],
        "best: epoch 2 (0.700)": [[2, 0.7]],
    }
    assert lines_of(accuracy)["validation"] == [[1, 0.6], [2, 0.9], [3, 0.9]]
    assert lines_of(accuracy)["best: epoch 2 (0.900)"] == [[2, 0.9]]


def test_curves_of_a_resumed_run_and_of_a_run_just_begun():
    _, accuracy = draw_curves([*RECORDS, record(30, 3, "val", 0.1, 0.95)], {}, best_step=30).axes
    assert lines_of(accuracy)["validation"] == [[1, 0.6], [2, 0.9], [3, 0.95]]
    assert lines_of(accuracy)["best: epoch 3 (0.950)"] == [[3, 0.95]]
    assert lines_of(draw_curves(RECORDS[:1], {}, best_step=30).axes[0]) == {"train": [[1, 1.0]]}


@pytest.mark.parametrize(
    ("val_losses", "scale"),
    [
        ([167, 1.5, 0.5], "log"),  # running statistics are far off in the first epoch
        ([0.9, 0.7, 0.5], "linear"),
        ([0.9, math.inf, 0.5], "linear"),
        ([0.9, 0.3, 0], "linear"),
        ([0.9, 0.7, 0.5, 0.5, 0.5, 9], "log"),  # overfitting, not batch norm
    ],
)
def test_loss_axis_and_first_epochs(val_losses, scale):
    records = [record(1, 1, "train", 1.0, 0.5)]
    records += [record(e, e, "val", loss, 0.5) for e, loss in enumerate(val_losses, start=1)]
    loss, accuracy = draw_curves(records, {}, best_step=1).axes
    assert (loss.get_yscale(), accuracy.get_yscale()) == (scale, "linear")


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [(0.9, 4, "1 2 3"), (0.03, 4, "0.05 0.1 0.2 0.5 1 2"), (0.03, 400, "0.1 1 10 100")],
)
def test_a_logarithmic_axis_has_plain_numbers(low, high, numbers):
    axes = Figure().subplots()
    axes.set_xlim(low, high)
    log_axis_if_wide(axes.xaxis, [high, low])
    assert axes.get_xscale() == "log"
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert " ".join(axes.xaxis.get_major_formatter().format_ticks(ticks)) == numbers
    assert len(axes.get_xticks(minor=True)) == 0


def test_colors_are_those_of_okabe_and_ito_without_yellow():
    assert COLORS == ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def test_confusion_writes_counts_and_shares_of_the_row(drawn):
    confusion = [[999, 1, 0], [0, 0, 0], [30, 10, 40]]
    names = ["A", "B", "a long name of a cell line, passage 4"]
    plot_confusion(confusion, names, "confusion.png", title="validation")
    (axes,) = drawn()
    assert [text.get_text() for text in axes.texts] == [
        *("999\n>99 %", "1\n<1 %", "0"),
        *("–", "–", "–"),
        *("30\n38 %", "10\n12 %", "40\n50 %"),
    ]
    assert axes.images[0].get_array()[0].tolist() == [0.999, 0.001, 0]
    assert [text.get_color() for text in axes.texts[:2]] == ["white", "black"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert axes.get_title() == "validation"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["A", "B", "a long name of a c…passage 4"]


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    names = [r"$\frac{$", "A_1^$x$ 100%"]
    plot_confusion(np.eye(2, dtype=int), names, tmp_path / "a.png", title=names[0])
    crops = {name: [np.zeros((8, 8, 1), np.uint8)] for name in names}
    plot_crops_sheet(crops, tmp_path / "b.png", title=names[0])
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def test_sheet_scales_16_bits_by_percentiles_of_all_crops(drawn):
    ramp = np.linspace(1000, 2000, 10000).astype(np.uint16).reshape(100, 100, 1)
    bright = ramp.copy()
    bright[0, 0] = 65535  # one hot pixel must not darken the rest
    plot_crops_sheet({"dim": [ramp], "dimmer": [ramp // 2], "hot": [bright]}, "sheet.png")
    sheet = drawn()[0].images[0].get_array().astype(int)
    dim, dimmer, hot = sheet[:100, :100], sheet[103:203, :100], sheet[206:, :100]
    low, high = np.percentile(np.stack([ramp, ramp // 2, bright]), [0.5, 99.5])
    expected = 255 * np.clip((ramp - low) / (high - low), 0, 1)
    np.testing.assert_allclose(dim, np.repeat(expected, 3, axis=-1), atol=1)
    np.testing.assert_array_equal(hot[1:], dim[1:])
    assert drawn()[0].get_title() == "each channel scaled for display"
    assert dimmer.mean() < 0.4 * dim.mean()


def test_sheet_shows_8_bits_unchanged_and_channels_in_their_colours(drawn):
    rng = np.random.default_rng(0)
    crop = rng.integers(100, 220, (20, 20, 5)).astype(np.uint8)
    for channels, shown in [
        (1, crop[..., [0, 0, 0]]),
        (2, crop[..., [0, 1, 0]]),
        (3, crop[..., :3]),
        (5, crop[..., :3]),
    ]:
        plot_crops_sheet({"A": [crop[..., :channels]]}, "sheet.png")
        np.testing.assert_array_equal(drawn()[0].images[0].get_array(), shown)
        assert drawn()[0].get_title() == ""


def test_sheet_brightens_dark_8_bits_with_their_colours_and_says_so(drawn):
    crop = np.random.default_rng(0).integers(0, 52, (100, 100, 3)).astype(np.uint8)
    crop[..., 1] //= 25  # an empty channel: its noise stays as dark as it is beside the others
    crop[0, 0] = 255
    plot_crops_sheet({"A": [crop]}, "sheet.png", title="training crops")
    sheet = drawn()[0].images[0].get_array()
    np.testing.assert_allclose(sheet, np.minimum(crop * (255 / 51), 255), atol=0.51)
    assert drawn()[0].get_title() == "training crops, brightened 5.0 times for display"
    plot_crops_sheet({"A": [np.zeros((8, 8, 1), np.uint8)]}, "sheet.png")
    assert not drawn()[0].images[0].get_array().any()


def test_rows_stand_in_the_order_of_their_numbers_and_stay_apart(drawn):
    names = ["day 1", "day 10", "day 2"]
    images = np.full((3, 60, 60, 1), 200, np.uint8)
    images[1] = 150
    figures.plot_examples(images, np.arange(3), names, "crops.png")
    (axes,) = drawn()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["day 1", "day 2", "day 10"]
    assert axes.images[0].get_array()[[0, 62, 124], 0, 0].tolist() == [200, 200, 150]
    plot_confusion([[1, 2, 3], [4, 5, 6], [7, 8, 9]], names, "c.png", title="")
    (axes,) = drawn()
    counts = [text.get_text().split("\n")[0] for text in axes.texts]
    assert counts == ["1", "3", "2", "7", "9", "8", "4", "6", "5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["day 1", "day 2", "day 10"]
    alike = ["x" * 30 + middle + "y" * 20 for middle in "12"]
    plot_confusion(np.eye(2, dtype=int), alike, "c.png", title="")
    assert len({label.get_text() for label in drawn()[0].get_yticklabels()}) == 2


def test_confusion_has_a_footer_in_lines_that_fit(drawn):
    note = "balanced accuracy 0.812, 95 % interval 0.701 to 0.903; shared pixels: " * 3
    plot_confusion(np.eye(3, dtype=int), list("ABC"), "c.png", title="test split", footer=note)
    figure = drawn()[0].figure
    assert figure.get_supxlabel().replace("\n", " ") == note.strip()
    assert max(map(len, figure.get_supxlabel().splitlines())) < 14 * figure.get_figwidth()


def test_curves_show_what_they_must_beat():
    levels = {"chance": 0.25, "brightness": 0.7125}
    loss, accuracy = draw_curves(RECORDS, levels, best_step=20).axes
    floors = {name: line for name, line in lines_of(accuracy).items() if "(0." in name[-8:]}
    assert floors["chance (0.250)"] == [[0, 0.25], [1, 0.25]]  # across the whole width
    assert floors["brightness alone, test (0.713)"] == [[0, 0.7125], [1, 0.7125]]
    assert "chance (0.250)" in [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert len(lines_of(loss)) == 3


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    figure = draw_curves(RECORDS, {}, best_step=20)
    save_figure(figure, path)
    before = path.read_bytes()
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000

    def half(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_bytes() == before


def test_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from jaxcells.evaluation.figures import Path, plot_confusion;"
        f"plot_confusion([[1, 0], [0, 1]], 'AB', Path({str(tmp_path / 'c.png')!r}), title='');"
        "print({'matplotlib.pyplot', 'tkinter', 'jax'} & set(sys.modules))"
    )
    environment = {"MPLBACKEND": "TkAgg", "PATH": "", "MPLCONFIGDIR": str(tmp_path)}
    out = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert out.strip() == "set()"
    assert (tmp_path / "c.png").exists()


def test_examples_are_spread_over_each_class_and_stand_in_its_row(drawn):
    images = np.arange(201, 234, dtype=np.uint8)[:, None, None, None].repeat(60, axis=1)
    labels = np.array([0] * 30 + [1] * 3)
    figures.plot_examples(images, labels, ["A", "B"], "crops.png")
    (axes,) = drawn()
    sheet = axes.images[0].get_array()[..., 0]
    assert sheet.shape == (122, 22)  # with gaps of two pixels
    assert sheet[0, ::3].tolist() == [201, 205, 209, 213, 217, 221, 225, 230]
    assert (sheet[:, 1::3] == 255).all()
    assert sheet[121, ::3].tolist() == [231, 232, 233, *[255] * 5]
    assert (sheet[60:62] == 255).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]
