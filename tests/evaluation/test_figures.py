import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxcells.evaluation import figures
from jaxcells.evaluation.figures import plot_confusion, plot_crops_sheet, plot_curves


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


def test_curves_show_the_records(drawn):
    plot_curves(RECORDS, "curves.png")
    loss, accuracy = drawn()
    assert [axes.get_title() for axes in drawn()] == ["Loss", "Accuracy"]
    assert lines_of(loss) == {
        "train": [[1, 0.9], [2, 0.4], [3, 0.2]],  # two records of the first epoch: their mean
        "validation": [[1, 0.9], [2, 0.7], [3, 0.8]],
        "best: epoch 2 (0.700)": [[2, 0.7]],  # of two equally accurate epochs the one of lower loss
    }
    assert lines_of(accuracy)["validation"] == [[1, 0.6], [2, 0.9], [3, 0.9]]
    assert lines_of(accuracy)["best: epoch 2 (0.900)"] == [[2, 0.9]]


def test_curves_prefer_the_lower_loss_whichever_comes_first(drawn):
    later = [*RECORDS[:-1], record(30, 3, "val", 0.6, 0.9)]
    plot_curves(later, "curves.png")
    assert lines_of(drawn()[0])["best: epoch 3 (0.600)"] == [[3, 0.6]]


def test_curves_mark_the_step_that_was_chosen(drawn):
    plot_curves(RECORDS, "curves.png", best_step=30)
    assert lines_of(drawn()[0])["best: epoch 3 (0.800)"] == [[3, 0.8]]


def test_curves_of_a_resumed_run_and_of_a_run_just_begun(drawn):
    plot_curves([*RECORDS, record(30, 3, "val", 0.1, 0.95)], "curves.png")
    assert lines_of(drawn()[1])["validation"] == [[1, 0.6], [2, 0.9], [3, 0.95]]
    plot_curves(RECORDS[:1], "curves.png")
    assert lines_of(drawn()[0]) == {"train": [[1, 1.0]]}


def texts_of(axes, num_classes):
    return np.reshape([text.get_text() for text in axes.texts], (num_classes, num_classes))


def test_confusion_writes_counts_and_shares_of_the_row(drawn):
    plot_confusion([[999, 1, 0], [0, 0, 0], [30, 10, 40]], ["A", "B", "C"], "confusion.png")
    (axes,) = drawn()
    assert texts_of(axes, 3).tolist() == [
        ["999\n>99 %", "1\n<1 %", "0"],
        ["–", "–", "–"],
        ["30\n38 %", "10\n12 %", "40\n50 %"],
    ]
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[0.999, 0.001, 0], [0, 0, 0], [0.375, 0.125, 0.5]]
    )
    assert axes.texts[0].get_color() == "white"  # on dark blue
    assert axes.texts[1].get_color() == "black"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_confusion_keeps_both_ends_of_long_names(drawn):
    names = ["a long name of a cell line, passage 4", "a long name of a cell line, passage 5"]
    plot_confusion(np.eye(2, dtype=int), names, "confusion.png")
    (axes,) = drawn()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [label.get_text() for label in labels]
        assert [name[-9:] for name in shown] == ["passage 4", "passage 5"]
        assert max(map(len, shown)) == 28


@pytest.mark.parametrize("num_classes", [2, 30])
def test_confusion_cells_hold_their_text(num_classes, tmp_path, monkeypatch):
    kept = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda f, path: (kept.append(f), save(f, path)))
    confusion = np.full((num_classes, num_classes), 9999)
    plot_confusion(confusion, [f"cell line {k}" for k in range(num_classes)], tmp_path / "c.png")
    (axes,) = kept[0].axes
    cell = axes.get_window_extent().width / num_classes
    text = axes.texts[0].get_window_extent()
    assert text.width < cell
    assert text.height < cell
    assert axes.texts[0].get_fontsize() >= 6.5
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(names))


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    names = [r"$\frac{$", "A_1^$x$ 100%"]
    plot_confusion(np.eye(2, dtype=int), names, tmp_path / "a.png", title=names[0])
    crops = {name: [np.zeros((8, 8, 1), np.uint8)] for name in names}
    plot_crops_sheet(crops, tmp_path / "b.png", title=names[0])
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_sheet_places_every_crop_in_the_row_of_its_class(drawn):
    crops = {
        "A": [np.full((60, 60, 3), value, np.uint8) for value in (10, 20)],
        "B": [np.full((60, 60, 3), 30, np.uint8)],
    }
    plot_crops_sheet(crops, "sheet.png")
    (axes,) = drawn()
    sheet = axes.images[0].get_array()
    assert sheet.shape == (122, 122, 3)
    corners = sheet[[0, 0, 62, 62, 60], [0, 62, 0, 62, 0], 0]
    assert corners.tolist() == [10, 20, 30, 255, 255]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]


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
    assert dimmer.mean() < 0.4 * dim.mean()


def test_sheet_shows_8_bits_unchanged_and_channels_in_their_colours(drawn):
    rng = np.random.default_rng(0)
    crop = rng.integers(100, 120, (20, 20, 5)).astype(np.uint8)
    for channels, shown in [
        (1, crop[..., [0, 0, 0]]),
        (2, crop[..., [0, 1, 0]]),
        (3, crop[..., :3]),
        (5, crop[..., :3]),
    ]:
        plot_crops_sheet({"A": [crop[..., :channels]]}, "sheet.png")
        np.testing.assert_array_equal(drawn()[0].images[0].get_array(), shown)


def test_sheet_of_constant_float_crops(drawn):
    plot_crops_sheet({"A": [np.full((4, 4, 1), 0.3, np.float32)]}, "sheet.png")
    assert (drawn()[0].images[0].get_array() == 0).all()


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    plot_curves(RECORDS, path)
    before = path.read_bytes()
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000

    def half(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(RECORDS, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from jaxcells.evaluation.figures import plot_confusion;"
        f"plot_confusion([[1, 0], [0, 1]], ['A', 'B'], {str(tmp_path / 'c.png')!r});"
        "print({'matplotlib.pyplot', 'tkinter', 'jax'} & set(sys.modules))"
    )
    environment = {"MPLBACKEND": "TkAgg", "PATH": "", "MPLCONFIGDIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert out.stdout.strip() == "set()"
    assert (tmp_path / "c.png").exists()


def test_examples_are_spread_over_each_class(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "plot_crops_sheet", lambda rows, path, title: shown.update(rows))
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    labels = np.array([0] * 17 + [1] * 3)
    figures.plot_examples(images, labels, ["A", "B"], tmp_path / "crops.png", per_class=5)
    assert [int(crop.item()) for crop in shown["A"]] == [0, 4, 8, 12, 16]
    assert [int(crop.item()) for crop in shown["B"]] == [17, 18, 19]
