"""The report of a study made by hand: what it says."""

import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from jaxcells.evaluation import report, report_figures
from jaxcells.evaluation.report import Study, choose_crops, write_report
from tests.evaluation.studies import NAMES, NASTY, make_study


def words(text: str, start: str = "<body>", end: str = "</body>") -> str:
    """The text of a part of a page, on one line."""
    part = text[text.index(start) : text.index(end, text.index(start))]
    part = re.sub(r"<(script|style).*?</\1>|</t[dh]>", " ", part, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", "", part).split()))


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """What a report says of methods; its pictures, which take time, are left out."""
    names = ["roc", "precision_recall", "reliability", "classes", "foreground"]
    monkeypatch.setattr(report, "_figures", lambda study: dict.fromkeys(names))
    monkeypatch.setattr(report_figures, "as_svg", lambda *said: "")

    def text(study: Study) -> str:
        write_report(tmp_path / "report.html", study)
        whole = (tmp_path / "report.html").read_text()
        return words(whole, '<div id="methods-text"', "<details open>")

    return text


def test_the_page_says_what_was_found(study, page):
    text = words(page.read_text())
    right = round(72 * study.test.accuracy)
    assert study.test.accuracy == pytest.approx(63 / 72)
    low, high = study.test.interval_95["accuracy"]
    assert (
        f"{right} of 72 crops from 18 independent fields are classified rightly: an accuracy of "
        f"87.5 % (95 % interval {100 * low:.1f} % to {100 * high:.1f} %)"
    ) in text
    assert "Read this first" not in text
    for check in study.checks:
        assert check.name.capitalize() in text
        assert check.reason[1:] in text
        assert check.advice in text
    for score in study.test.scores.values():
        assert f"{score.value:z.3f}".replace("-", "−") in text
    for part in ("few <fields>", "images are small", "abc123", "'--config.data.root=my images'"):
        assert part in text
    assert "72 of 72 tested crops are shown" in text


def test_names_of_folders_are_text_everywhere(page):
    text = page.read_text()
    assert NASTY not in text
    assert NASTY in words(text)


def test_names_that_begin_with_an_underline_stand_in_legends(images):
    predictions = make_study(images, names=("_a", "b")).predictions
    for drawn in (
        report_figures.draw_against_rest(predictions, "roc"),
        report_figures.draw_against_rest(predictions, "precision_recall"),
        report_figures.draw_feature_map(predictions),
    ):
        shown = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert [text.strip("\u200b") for text in shown if text != "chance"] == ["_a", "b"]


def test_pictures_repeat_and_share_no_id(study, page, tmp_path):
    text = page.read_text()
    assert text.count('<svg role="img"') == 7
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="|url\()#([^")]*)', text):
        assert used in ids
    write_report(tmp_path / "again.html", study)
    assert (tmp_path / "again.html").read_text() == text


def test_a_baseline_that_is_not_beaten_comes_first(images, tmp_path):
    study = make_study(images)
    baselines = {
        "brightness": dataclasses.replace(study.evidence.baselines["brightness"], beaten=False)
    }
    evidence = dataclasses.replace(study.evidence, baselines=baselines)
    write_report(tmp_path / "r.html", dataclasses.replace(study, evidence=evidence))
    text = words((tmp_path / "r.html").read_text(), '<section id="answer">', "</section>")
    assert text.index("Read this first") < text.index("Can a resnet34")


def test_methods_say_what_the_config_did(images, methods):
    plain = methods(make_study(images))
    for said in (
        "crops of 32×32 pixels were drawn from them at random places, with 1 colour channel",
        "Whole images were divided at random into training, validation and test sets; no image",
        "resnet34 network (He et al. 2016a), started from random parameters. Pixels were divided",
        "a learning rate of 0.001 throughout. There was no augmentation. The checkpoint",
        "The test split was opened once",
        "scikit-learn (Pedregosa et al. 2011) 1.9.1.",
    ):
        assert said in plain
    for unsaid in ("decay", "frozen", "kept as", "smoothed", "weighed", "Optax", "64 channels"):
        assert unsaid not in plain

    config = {
        "optim.freeze": ("layer1", "conv1"),
        "optim.freeze_epochs": 2,
        "optim.schedule": "cosine",
        "optim.weight_decay": 0.01,
        "optim.label_smoothing": 0.1,
        "optim.class_weights": "balanced",
        "optim.multipliers": ("fc=10",),
        "data.augment.dihedral": True,
        "data.augment.intensity": 0.2,
        "data.split_by": r"plate(\d)",
        "data.border": (0, 0, 40, 0),
        "data.min_foreground": 0.1,
        "model.name": "preact18",
        "model.width": 16,
    }
    changed = methods(make_study(images, config=config))
    for said in (
        "kept as they were for the first 2 epochs",
        "layer1 or conv1",
        "fell to zero along half a cosine (times a factor for some parameters: fc=10)",
        "weight decay of 0.01",
        "smoothed by 0.1",
        "Every class weighed the same",
        "flipped and turned",
        "a gain within 1 ± 0.2",
        r"found in their paths by “plate(\d)”",
        "of 18 independent groups",
        "A border of 0, 0, 40, 0 pixels",
        "less than 10.0 % of foreground",
        "preact18 network (residual blocks with identity mappings, He et al. 2016b), with 16",
    ):
        assert said in changed
    assert "no augmentation" not in changed

    by_crop = methods(make_study(images, config={"data.split_by": "crop"}))
    assert "25.0 % of the test pixels are seen in training, too" in by_crop
    assert "no image gave" not in by_crop
    study = make_study(images)
    records = tuple(dataclasses.replace(r, y=0, x=0) for r in study.crop_set.records)
    whole = dataclasses.replace(study.crop_set, records=records, came_split=True)
    text = methods(dataclasses.replace(study, crop_set=whole))
    assert "each was used whole (32×32 pixels), with 1 colour channel" in text
    assert "test images came with them (see also the notes on the data)." in text
    results = dataclasses.replace(
        study.results,
        init={"kind": "imagenet", "source": "a", "sha256": "b", "tensors": "216 loaded"},
        test_opened=3,
    )
    text = methods(dataclasses.replace(study, results=results))
    assert "weights trained on ImageNet (Russakovsky et al. 2015) (tensors: 216 loaded)" in text
    assert "The test split had been opened 2 times before" in text
    assert "once" not in text


@pytest.mark.parametrize(
    ("plane", "said"),
    [
        ("T=0", "Read of image stacks: the plane T=0."),
        ("Z=max", "Read of image stacks: the maximum along Z."),
        ("z=Mean, T=0", "Read of image stacks: the mean along Z, the plane T=0."),
        ("I=C", "Read of image stacks: unnamed pages as channels."),
        ("", ""),
    ],
)
def test_methods_say_what_of_stacks_was_read(study, methods, plane, said):
    settings = dataclasses.replace(study.crop_set.settings, plane=plane)
    crop_set = dataclasses.replace(study.crop_set, settings=settings)
    text = methods(dataclasses.replace(study, crop_set=crop_set))
    assert said in text
    assert ("stacks" in text) == bool(plane)
    assert "  " not in text


def test_methods_count_each_group_and_image_once(study, methods):
    of = study.crop_set  # 3 classes with 6 fields of 4 crops
    groups = [r.source[-6:-4] for r in of.records]  # every group shows all classes
    splits = ["train" if group < "f3" else "val" if group < "f5" else "test" for group in groups]
    changed = zip(of.records, groups, splits, strict=True)
    records = tuple(dataclasses.replace(r, group=g, split=s) for r, g, s in changed)
    sources = {**of.sources, "no crop.png": {}}
    of = dataclasses.replace(of, records=records, sources=sources, split_by="group")
    text = methods(dataclasses.replace(study, crop_set=of))
    assert "18 images of 3 classes" in text
    assert "Training: 36 crops of 3 independent groups; validation: 24 crops of 2" in text
    assert "test: 12 crops of 1 independent groups." in text


@pytest.mark.parametrize(
    ("temperatures", "said"),
    [
        ([1.5], "calibrated by a temperature fitted on the validation split (Guo et al. 2017);"),
        ([1.0], "as the network gave them: no validation crop was wrong, and no temperature was"),
        ([1.0, 1.5], "(Guo et al. 2017), but for folds without an error there; their"),
        ([19.99], "(Guo et al. 2017), which reached its limit of 20, so that they are not to be"),
    ],
)
def test_methods_say_how_probabilities_were_calibrated(study, methods, temperatures, said):
    predictions = dataclasses.replace(study.predictions, temperature=np.resize(temperatures, 72))
    text = methods(dataclasses.replace(study, predictions=predictions))
    assert said in text
    assert ("fitted on the validation" in text) == (temperatures != [1.0])


def test_methods_say_who_saw_the_test_split_when(study, methods):
    again = methods(dataclasses.replace(study, opened=3))
    said = "The test split was opened after training and choice. After these figures it was opened"
    assert f"{said} 2 times more." in again
    kinds = {"kind": "comparison", "tested_before_choice": ("a_seed0", "b_seed0")}
    before = methods(dataclasses.replace(study, **kinds))
    assert "Before the choice, a_seed0, b_seed0 had been evaluated on the test split" in before
    assert "after training and choice" not in before


def test_folds_are_named_and_have_no_map(images, methods, tmp_path):
    study = make_study(images)
    predictions = dataclasses.replace(study.predictions, features=None, folds=np.arange(72) % 3 + 1)
    parts = ["Per fold:", (("fold", "accuracy"), [["fold1", "0.9"], ["fold2", "0.7"]])]
    pooled = dataclasses.replace(
        study, kind="cross_validation", predictions=predictions, curves=(), parts=parts
    )
    text = methods(pooled)
    assert "by the network of the one fold that had not seen its field (3 folds)" in text
    assert "opened" not in text
    text = words((tmp_path / "report.html").read_text())
    assert "Per fold: fold accuracy fold1 0.9 fold2 0.7" in text


def test_folds_have_no_map_of_features(study):
    assert report._figures(study).keys() >= {"features", "curves"}
    predictions = dataclasses.replace(study.predictions, features=None)
    drawn = report._figures(dataclasses.replace(study, predictions=predictions, curves=()))
    assert drawn.keys() == {"classes", "roc", "precision_recall", "reliability", "foreground"}


def test_crops_are_chosen_from_all_cells_alike(study):
    predictions, chosen = study.predictions, choose_crops(study.predictions)
    sure, wrong = predictions.calibrated.max(axis=1), predictions.predicted != predictions.labels
    assert set(chosen["errors"]) == set(np.flatnonzero(wrong))
    assert (np.diff(sure[chosen["errors"]]) <= 0).all()
    margins = np.sort(predictions.calibrated)[:, -1] - np.sort(predictions.calibrated)[:, -2]
    assert set(chosen["borderline"]) == set(np.argsort(margins)[:12])
    assert [NAMES[predictions.labels[n]] for n in chosen["typical"]] == [
        n for n in NAMES for _ in range(4)
    ]
    assert not wrong[chosen["typical"]].any()
    assert sorted(chosen["more"]) == list(range(72))
    cells = list(
        zip(predictions.labels[chosen["more"]], predictions.predicted[chosen["more"]], strict=True)
    )
    number = len(set(cells))
    assert len(set(cells[:number])) == number == 6


def test_a_page_of_ten_thousand_crops_is_below_6_mb(images, tmp_path):
    study = make_study(images, names=[f"class {n}" for n in range(10)], fields=10, side=100)
    many, small = np.arange(10_000) % 400, study.predictions
    arrays = {
        key: getattr(small, key)[many] for key in ("logits", "temperature", "unknown", "features")
    }
    records = tuple(small.records[n] for n in many)
    predictions = dataclasses.replace(small, records=records, **arrays)
    study = dataclasses.replace(study, predictions=predictions, images=study.images[many])
    write_report(tmp_path / "report.html", study)
    assert (tmp_path / "report.html").stat().st_size < 6e6
    text = (tmp_path / "report.html").read_text()
    shown = int(re.search(r"(\d+) of 10000 tested crops are shown", text)[1])
    assert text.count("data:image/jpeg") >= shown > 200


def test_images_that_are_gone_are_not_shown(study, tmp_path):
    crop_set = dataclasses.replace(study.crop_set, root=str(tmp_path / "gone"))
    write_report(tmp_path / "report.html", dataclasses.replace(study, crop_set=crop_set))
    assert "or cannot be read: they are not shown" in words((tmp_path / "report.html").read_text())


def test_a_field_thinner_than_a_square_is_shrunk_to_one_row():
    image = np.arange(13_000, dtype=np.uint16) * np.ones((32, 1), np.uint16)
    small = report._shrunk(image[..., None], 112)
    assert small.shape == (1, 111, 1)
    assert small[0, :2, 0].tolist() == [58, 175]  # means of 0 to 116 and of 117 to 233
    assert report._shrunk(image.T[..., None], 112).shape == (111, 1, 1)


def test_sixteen_bits_and_many_channels_are_shown_on_one_scale(study, tmp_path):
    images = np.zeros((72, 64, 64, 5), np.uint16)
    images[:, :, :, 0] = 10 * np.arange(72)[:, None, None]
    images[:, :32] += 20
    write_report(tmp_path / "report.html", dataclasses.replace(study, images=images))
    text = (tmp_path / "report.html").read_text()
    sources = re.findall(r'<li class="[^>]*>\s*<img src="data:image/jpeg;base64,([^"]*)"', text)
    means = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(s)))).mean(axis=(0, 1)) for s in sources
    ]
    assert len(means) == 72
    assert np.ptp([mean[0] for mean in means]) > 150  # red follows the first channel
    assert "All are on one scale, each channel scaled for display." in text
