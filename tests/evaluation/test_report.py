"""The report of a study made by hand: what it says, and the page in a browser."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcells.config import default_config
from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import CropRecord, CropSet
from jaxcells.data.crops import CropSettings
from jaxcells.evaluation import report, report_figures
from jaxcells.evaluation.calibration import Calibration
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.evidence import gather_evidence
from jaxcells.evaluation.metrics import split_metrics
from jaxcells.evaluation.predictions import Predictions
from jaxcells.evaluation.report import Study, choose_crops, write_report
from jaxcells.evaluation.results import RunResults, Timing
from tests.data.folders import textured, write_image

ROOT = Path(__file__).parents[2]
NASTY = '<b>&"x'  # a folder may be called so
NAMES = (NASTY, "HeLa", "K562")
SIDE = 32

ENVIRONMENT = {
    "jaxcells": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux",
    "dependencies": {"jax": "0.10.1", "scikit-learn": "1.9.1"},
    "git_commit": None,
    "command": ["launch.py", "--config.data.root=my images"],
}


def make_study(root, *, names=NAMES, fields=6, crops=4, side=SIDE, **changed) -> Study:
    """A run whose every eighth crop is taken for the next class, of images that are there."""
    records = []
    for label, name in enumerate(names):
        for field in range(fields):
            source = f"class{label}/f{field}.png"
            path = root / source
            if not path.exists():
                write_image(path, textured(64, 80, 10 * label + field))
            records += [
                CropRecord(
                    f"c{crop}", name, "", source, source, 8 * (crop % 5), crop % 49, 0.5, "test", ""
                )
                for crop in range(crops)
            ]
    labels = np.repeat(np.arange(len(names)), fields * crops)
    guesses = (labels + (np.arange(len(labels)) % 8 == 3)) % len(names)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(labels), len(names))).astype(np.float32)
    logits[np.arange(len(labels)), guesses] += 5
    predictions = Predictions(
        records=tuple(records),
        class_names=tuple(names),
        logits=logits,
        temperature=np.full(len(labels), 1.5),
        unknown=np.where(np.arange(len(labels)) % 20 == 0, 0.1, -0.1),
        features=rng.normal(size=(len(labels), 8)).astype(np.float32) + labels[:, None],
        baselines={
            "majority": np.zeros_like(labels),
            "brightness": rng.integers(len(names), size=len(labels)),
            "background": rng.integers(len(names), size=len(labels)),
        },
    )
    test = split_metrics(predictions, seed=0)
    evidence = gather_evidence(predictions, seed=0)
    counts = {name: {"crops": fields * crops, "fields": fields} for name in names}
    audit = Audit(
        (),
        ("few <fields>",),
        dict.fromkeys(("train", "val", "test"), counts),
        {"val": 0.0, "test": 0.25},
    )
    config = default_config()
    config.update_from_flattened_dict(changed.pop("config", {}))
    settings = {key: config.data[key] for key in ("split_by", "border", "min_foreground")}
    crop_set = CropSet(
        directory=root,
        records=tuple(records),
        class_names=tuple(names),
        manifest_sha256="abc123",
        settings=CropSettings(0, side, 1, (1, 1, 1), **settings),
        root=str(root),
        sources={record.source: {} for record in records},
        came_split=False,
        field_kinds={},
        notes=("images are small",),
        split_by=config.data.split_by,
        num_folds=0,
    )
    curves = [
        {
            "step": epoch,
            "epoch": epoch,
            "split": split,
            "loss": 1 / epoch,
            "accuracy": 0.8,
            "balanced_accuracy": 0.1 * epoch,
        }
        for epoch in (1, 2, 3)
        for split in ("train", "val")
    ]
    results = RunResults(
        validation=test,
        test=test,
        test_opened=1,
        evidence=evidence,
        calibration=Calibration(3, 1.5, "largest softmax", -0.5, ""),
        init={"kind": "random", "source": None, "sha256": None},
        data={
            "source": "folder",
            "image": {"shape": [side, side, 1], "dtype": "uint8"},
            "normalization": {"kind": "imagenet"},
        },
        timing=Timing(*[1.0] * 9),
        memory={},
        best_step=3,
        num_steps=3,
        num_epochs=3,
        model=config.model.to_dict(),
        environment=ENVIRONMENT,
    )
    values = {
        "kind": "run",
        "test": test,
        "evidence": evidence,
        "checks": run_checks(test, evidence, audit, curves, config.data.split_by),
        "predictions": predictions,
        "images": rng.integers(0, 256, (len(labels), side, side, 1), np.uint8),
        "crop_set": crop_set,
        "audit": audit,
        "curves": curves,
        "config": config.to_dict(),
        "changes": {"optim.freeze": ("(?!fc)",)},
        "results": results,
    }
    return Study(**values | changed)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def study(images) -> Study:
    return make_study(images)


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, study)
    return path


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Starts headless Chromium, with or without JavaScript; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here")
    started = []

    def start(*, javascript=True):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        profile = tmp_path_factory.mktemp("profile")
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *("disable-dev-shm-usage", f"user-data-dir={profile}", "window-size=1280,900"),
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        if not javascript:
            content = {"profile.managed_default_content_settings.javascript": 2}
            options.add_experimental_option("prefs", content)
        service = webdriver.ChromeService(executable_path=driver)
        started.append(webdriver.Chrome(options=options, service=service))
        return started[-1]

    yield start
    for driver in started:
        driver.quit()


@pytest.fixture(scope="module")
def chromium(browser, page):
    """The page, opened."""
    driver = browser()
    driver.get(page.as_uri())
    return driver


def test_the_page_is_quiet_and_asks_for_nothing(chromium, page):
    assert chromium.get_log("browser") == []
    messages = [
        json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")
    ]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {s["request"]["url"] for s in sent if s["documentURL"] == page.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    broken = "return [...document.images].filter(i => !i.naturalWidth).length"
    assert chromium.execute_script(broken) == 0


def test_a_click_on_the_matrix_shows_its_crops(chromium, study):
    labels, predicted = study.predictions.labels, study.predictions.predicted
    found = "return [...document.querySelectorAll('#selection li')].map(e => ({...e.dataset}))"
    chromium.find_element(
        "css selector", '#matrix td[data-true="1"][data-guess="2"] button'
    ).click()
    crops = chromium.execute_script(found)
    assert len(crops) == ((labels == 1) & (predicted == 2)).sum() == 3
    assert {(crop["true"], crop["guess"]) for crop in crops} == {("1", "2")}
    assert "3 of the crops" in chromium.find_element("id", "count").text
    assert chromium.switch_to.active_element.get_attribute("id") == "found"
    pressed = "#matrix [aria-pressed=true]"
    assert len(chromium.find_elements("css selector", pressed)) == 1

    choose = """const form = document.forms[0]; form[arguments[0]].value = arguments[1];
        form.dispatchEvent(new Event("change"))"""
    chromium.execute_script(choose, "true", "")
    chromium.execute_script(choose, "guess", "")
    chromium.execute_script(choose, "field", "class1/f2.png")
    crops = chromium.execute_script(found)
    assert [crop["field"] for crop in crops] == ["class1/f2.png"] * 4
    sure = [float(crop["sure"]) for crop in crops]
    assert sure == sorted(sure, reverse=True)
    chromium.execute_script(choose, "order", "1")
    assert [float(crop["sure"]) for crop in chromium.execute_script(found)] == sorted(sure)


def test_the_page_is_accessible(chromium):
    axe = ROOT / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.exists():
        pytest.skip(f"{axe} is absent: npm install --no-save axe-core")
    chromium.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    chromium.execute_script(axe.read_text(encoding="utf-8"))
    run = "const done = arguments[0]; axe.run().then(found => done(found.violations))"
    violations = chromium.execute_async_script(run)
    told = [(v["id"], v["impact"], [n["html"][:200] for n in v["nodes"]][:3]) for v in violations]
    assert [v for v in told if v[1] in ("serious", "critical")] == []


def test_the_page_fits_a_telephone(chromium):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390


def test_without_javascript_all_is_there_but_the_browser_of_crops(browser, page):
    driver = browser(javascript=False)
    driver.get(page.as_uri())
    assert not driver.find_element("id", "browser").is_displayed()
    assert not driver.find_elements("css selector", "#matrix button")
    assert len(driver.find_elements("css selector", ".crops li")) == 72
    assert driver.find_element("css selector", ".lights li").is_displayed()
