import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxcells import Error
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.manifest import CropRecord, pixel_sha256, write_manifest
from jaxcells.data.tfds_builder import export_tfds, prepare_tfds, read_data_source

LABELS = ("HT-29 (b)", "a.1", "é")
SPLITS = {"train": 4, "val": 2, "test": 2}


def make_crops(directory, *, dtype="uint8", channels=1, seed=0):
    """Writes a crop set and returns its records and its pixels by crop."""
    rng = np.random.default_rng(seed)
    records, pixels = [], {}
    for side, number in SPLITS.items():
        for label in LABELS:
            (directory / side / label).mkdir(parents=True)
            for i in range(number):
                crop = rng.integers(0, 200, size=(6, 7, channels)).astype(dtype)
                if dtype != "uint8":
                    crop = crop * np.array(250.5).astype(dtype)
                path = write_crop(directory / side / label / f"c_{i}", crop)
                name = path.relative_to(directory).as_posix()
                pixels[name] = crop
                records.append(
                    CropRecord(
                        crop=name,
                        label=label,
                        channel=f"k{i % 2}",
                        source=f"{label}/k{i % 2}/f {i}.png",
                        group=f"{label}/{i}",
                        y=i,
                        x=2 * i,
                        split=side,
                        sha256=pixel_sha256(crop),
                    )
                )
    write_manifest(directory / "manifest.csv", records)
    return records, pixels


def make_tfds(data_dir, features, splits, *, name="made"):
    """Prepares a data set of given examples, as anyone's TFDS code would."""

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Made.name = name
    Made(data_dir=data_dir, file_format="array_record").download_and_prepare()


def encoded(image, form="png", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


IMAGES = np.random.default_rng(1).integers(0, 256, size=(20, 5, 6, 3), dtype=np.uint8)
IMAGE_FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=["benign", "in/situ", ".odd"]),
}


def examples(number, *, start=0):
    return [
        {"image": io.BytesIO(encoded(IMAGES[i])), "label": i % 3}
        for i in range(start, start + number)
    ]


def files(root):
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {".tfds.json"}


@pytest.mark.parametrize(
    ("dtype", "channels", "feature"),
    [
        ("uint8", 1, tfds.features.Image),
        ("uint8", 3, tfds.features.Image),
        ("uint8", 5, tfds.features.Tensor),
        ("uint16", 1, tfds.features.Tensor),
        ("float32", 2, tfds.features.Tensor),
    ],
)
def test_crop_set_reads_back_as_it_was(tmp_path, capfd, dtype, channels, feature):
    records, pixels = make_crops(tmp_path / "crops", dtype=dtype, channels=channels)
    builder = prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert type(builder.info.features["image"]) is feature
    assert {s: info.num_examples for s, info in builder.info.splits.items()} == {
        side: 3 * number for side, number in SPLITS.items()
    }
    of_crop = {record.crop: record for record in records}
    seen = set()
    for side in SPLITS:
        for example in read_data_source("jaxcells_crops", split=side, data_dir=tmp_path / "tfds"):
            crop = example["crop"].decode()
            record = of_crop[crop]
            assert record.split == side
            assert example["image"].dtype == dtype
            np.testing.assert_array_equal(example["image"], pixels[crop])
            assert LABELS[example["label"]] == record.label
            for key in ("channel", "source", "group"):
                assert example[key].decode() == getattr(record, key)
            seen.add(crop)
    assert seen == set(pixels)
    assert os.listdir(tmp_path / "tfds") == ["jaxcells_crops"]
    assert capfd.readouterr() == ("", "")


def test_neither_jax_nor_tensorflow_is_imported(tmp_path):
    make_crops(tmp_path / "crops")
    program = """
        import sys
        import jaxcells.data.tfds_builder as tb
        assert "tensorflow_datasets" not in sys.modules
        tb.prepare_tfds("crops", "tfds")
        source = tb.read_data_source("jaxcells_crops", split="train", data_dir="tfds")
        assert source[0]["image"].shape == (6, 7, 1)
        tb.export_tfds("jaxcells_crops", "out", data_dir="tfds")
        print(sorted({"jax", "jaxlib", "flax", "tensorflow"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_prepared_set_is_reused_but_only_for_its_own_crops(tmp_path):
    make_crops(tmp_path / "crops")
    prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")}
    again = prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")} == before
    assert len(again.as_data_source("test")) == 6
    make_crops(tmp_path / "others", seed=1)
    with pytest.raises(Error, match=r"tfds/jaxcells_crops/1\.0\.0: holds another crop set than "):
        prepare_tfds(tmp_path / "others", tmp_path / "tfds")
    other = prepare_tfds(tmp_path / "others", tmp_path / "tfds", name="others")
    assert other.info.full_name == "others/1.0.0"


def test_changed_crop_is_refused_and_nothing_is_left(tmp_path):
    records, pixels = make_crops(tmp_path / "crops")
    changed = records[5].crop
    write_crop((tmp_path / "crops" / changed).with_suffix(""), pixels[changed] ^ 1)
    with pytest.raises(Error, match=r"the pixels are not those of manifest\.csv") as caught:
        prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert changed in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tfds" / "jaxcells_crops" / "1.0.0").exists()


def test_crops_of_two_kinds_are_refused(tmp_path):
    records, pixels = make_crops(tmp_path / "crops")
    grey = pixels[records[5].crop]
    colour = np.repeat(grey, 3, axis=2)
    write_crop((tmp_path / "crops" / records[5].crop).with_suffix(""), colour)
    records[5] = dataclasses.replace(records[5], sha256=pixel_sha256(colour))
    write_manifest(tmp_path / "crops" / "manifest.csv", records)
    with pytest.raises(Error, match=r"3 channels of uint8, others have 1 of uint8"):
        prepare_tfds(tmp_path / "crops", tmp_path / "tfds")


def test_export_of_own_crops_is_lossless(tmp_path):
    records, _ = make_crops(tmp_path / "crops", dtype="uint16")
    prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    export_tfds("jaxcells_crops", tmp_path / "out", data_dir=tmp_path / "tfds")
    exported = {
        (*path.split("/")[:2], pixel_sha256(read_image(tmp_path / "out" / path)))
        for path in files(tmp_path / "out")
    }
    assert exported == {(r.split, r.label, r.sha256) for r in records}
    assert sorted(os.listdir(tmp_path)) == ["crops", "out", "tfds"]


def test_export_of_one_split_by_class(tmp_path):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(7)})
    export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    names = ["benign", "in%2Fsitu", "%2Eodd"]
    assert files(tmp_path / "out") == {f"{names[i % 3]}/{i:06d}.png" for i in range(7)}
    for i in range(7):
        path = tmp_path / "out" / names[i % 3] / f"{i:06d}.png"
        np.testing.assert_array_equal(read_image(path), IMAGES[i])


def test_export_of_three_splits(tmp_path, caplog):
    splits = {
        "train": examples(9),
        "validation": examples(3),
        "test": examples(3),
        "extra": examples(1),
    }
    make_tfds(tmp_path, IMAGE_FEATURES, splits)
    with caplog.at_level("WARNING", "jaxcells"):
        export_tfds("made:2.1.0", tmp_path / "out", data_dir=tmp_path)
    sides = [path.split("/")[0] for path in files(tmp_path / "out")]
    assert {side: sides.count(side) for side in sides} == {"train": 9, "val": 3, "test": 3}
    assert caplog.messages == ["tfds:made:2.1.0: leaving out the splits extra"]


def test_export_holds_out_validation_where_there_is_none(tmp_path, caplog):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(20), "test": examples(3)})
    with caplog.at_level("WARNING", "jaxcells"):
        export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    assert "a tenth of train is held out" in caplog.text

    def numbers(root, side):
        return {int(path[-10:-4]) for path in files(root) if path.startswith(f"{side}/")}

    train, val = numbers(tmp_path / "out", "train"), numbers(tmp_path / "out", "val")
    assert len(val) == 2
    assert train | val == set(range(20))
    assert len(train) == 18
    assert numbers(tmp_path / "out", "test") == {0, 1, 2}
    export_tfds("made", tmp_path / "again", data_dir=tmp_path)
    assert numbers(tmp_path / "again", "val") == val


def test_held_out_examples_do_not_follow_the_order(tmp_path):
    png = encoded(IMAGES[0])
    in_turn = [{"image": io.BytesIO(png), "label": i % 10 % 3} for i in range(200)]
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": in_turn, "test": examples(1)})
    export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    assert len(os.listdir(tmp_path / "out" / "val")) == 3


def test_export_reads_every_stored_form(tmp_path):
    depth = np.array([[[65535], [258]], [[0], [1]]], np.uint16)
    stored = {
        "jpeg": (tfds.features.Image(), encoded(IMAGES[0], "jpeg", quality=95)),
        "grey_as_colour": (tfds.features.Image(), encoded(IMAGES[0, ..., :1])),
        "sixteen_bit": (tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), encoded(depth)),
    }
    expected = {
        "jpeg": np.asarray(Image.open(io.BytesIO(stored["jpeg"][1]))),
        "grey_as_colour": np.repeat(IMAGES[0, ..., :1], 3, axis=2),
        "sixteen_bit": depth,
    }
    for name, (feature, data) in stored.items():
        features = IMAGE_FEATURES | {"image": feature}
        make_tfds(
            tmp_path, features, {"whole": [{"image": io.BytesIO(data), "label": 0}]}, name=name
        )
        export_tfds(name, tmp_path / f"out_{name}", data_dir=tmp_path)
        pixels = read_image(tmp_path / f"out_{name}" / "benign" / "000000.png")
        assert pixels.dtype == expected[name].dtype
        np.testing.assert_array_equal(pixels, expected[name], err_msg=name)
        assert files(tmp_path / f"out_{name}") == {"benign/000000.png"}


def test_complete_export_is_reused_another_is_refused(tmp_path):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(3)})
    out = tmp_path / "out"
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    export_tfds("made", out, data_dir=tmp_path)
    assert not (out / "old").exists()
    shutil.rmtree(tmp_path / "made")
    before = (out / "benign" / "000000.png").stat().st_mtime_ns
    export_tfds("made", out, data_dir=tmp_path)
    assert (out / "benign" / "000000.png").stat().st_mtime_ns == before
    with pytest.raises(Error, match="holds images of tfds:made, not the images of tfds:malaria"):
        export_tfds("malaria", out, data_dir=tmp_path)
    (out / "benign" / "000000.png").unlink()
    with pytest.raises(Error, match="has 2 of the 3 images of tfds:made"):
        export_tfds("made", out, data_dir=tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(Error, match="mine: holds something else"):
        export_tfds("made", tmp_path / "mine", data_dir=tmp_path)


def test_failed_export_leaves_nothing_that_passes_for_one(tmp_path):
    broken = examples(3)
    broken[1]["image"] = io.BytesIO(encoded(IMAGES[1])[:-40])
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": broken})
    with pytest.raises(Error, match="tfds:made, split train, example 1: ") as caught:
        export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_examples_without_label_and_strange_images(tmp_path):
    unlabelled = examples(2)
    unlabelled[1]["label"] = -1
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": unlabelled}, name="unlabelled")
    with pytest.raises(Error, match="tfds:unlabelled, split train, example 1: has no label"):
        export_tfds("unlabelled", tmp_path / "out", data_dir=tmp_path)
    palette = Image.fromarray(IMAGES[0]).quantize(4)
    for name, image, reason in (
        ("gif", encoded(IMAGES[0], "gif"), "is no PNG, JPEG, TIFF or BMP image"),
        ("palette", encoded(palette), "has indexed colours"),
    ):
        make_tfds(
            tmp_path, IMAGE_FEATURES, {"a": [{"image": io.BytesIO(image), "label": 0}]}, name=name
        )
        with pytest.raises(Error, match=f"^tfds:{name}, split a, example 0: {reason}"):
            export_tfds(name, tmp_path / "out", data_dir=tmp_path)


def test_splits_that_cannot_be_used(tmp_path):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(1), "validation": examples(1)})
    with pytest.raises(Error, match="has the splits train, validation; needed are"):
        export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(Error, match="tfds:made has no split 'test'; it has train, validation"):
        read_data_source("made", split="test", data_dir=tmp_path)


def test_no_image_or_no_label(tmp_path):
    text, label = tfds.features.Text(), IMAGE_FEATURES["label"]
    make_tfds(
        tmp_path, {"text": text, "label": label}, {"a": [{"text": "x", "label": 0}]}, name="words"
    )
    with pytest.raises(Error, match=r"no features that could be the image.*text: Text\("):
        export_tfds("words", tmp_path / "out", data_dir=tmp_path)
    numbers = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.int64)
    example = {"image": np.zeros((2, 2, 1), np.int64), "label": 0}
    make_tfds(tmp_path, {"image": numbers, "label": label}, {"a": [example]}, name="numbers")
    with pytest.raises(Error, match=r"image: Tensor\(shape=\(2, 2, 1\), dtype=int64\)"):
        export_tfds("numbers", tmp_path / "out", data_dir=tmp_path)
    two = {"first": IMAGE_FEATURES["image"], "cells": text}
    example = {"first": io.BytesIO(encoded(IMAGES[0])), "cells": "x"}
    make_tfds(tmp_path, two, {"a": [example]}, name="unclassified")
    with pytest.raises(Error, match="no features that could be the class label"):
        export_tfds("unclassified", tmp_path / "out", data_dir=tmp_path)


def test_other_names_of_the_only_image_and_label(tmp_path):
    features = {"scan": IMAGE_FEATURES["image"], "kind": IMAGE_FEATURES["label"]}
    example = {"scan": io.BytesIO(encoded(IMAGES[0])), "kind": 0}
    make_tfds(tmp_path, features, {"a": [example]})
    export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    assert files(tmp_path / "out") == {"benign/000000.png"}


def test_not_prepared_says_how(tmp_path):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(1)})
    with pytest.raises(Error) as caught:
        export_tfds("malaria", tmp_path / "out", data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "(there: made/2.1.0)" in message
    assert f"tfds build malaria --file_format=array_record --data_dir={tmp_path}" in message
    for unknown in ("malria", "made:3.0.0", "made/config"):
        with pytest.raises(Error, match=r"there: made/2\.1\.0.*--config\.data\.source=tfds:NAME"):
            export_tfds(unknown, tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(Error, match=r"there: none"):
        read_data_source("malaria", split="train", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "no name", "../made", "made/2.1.0/x=1,"])
def test_name_that_is_none(tmp_path, name):
    with pytest.raises(Error, match=r"--config\.data\.source=tfds:NAME") as caught:
        read_data_source(name, split="train", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_format_that_needs_tensorflow(tmp_path):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(1)})
    info = tmp_path / "made" / "2.1.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(Error) as caught:
        export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    message = str(caught.value)
    assert "prepared as tfrecord" in message
    assert f"tfds build made --file_format=array_record --data_dir={tmp_path}`" in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["info", "shard missing", "shard cut", "shard flipped"])
def test_damaged_data_set(tmp_path, damage):
    make_tfds(tmp_path, IMAGE_FEATURES, {"train": examples(5)})
    folder = tmp_path / "made" / "2.1.0"
    shard = next(folder.glob("*array_record*"))
    if damage == "info":
        (folder / "dataset_info.json").write_text("{")
    elif damage == "shard missing":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        content = bytearray(shard.read_bytes())
        content[content.index(b"PNG") + 20] ^= 1
        shard.write_bytes(content)
    with pytest.raises(Error, match="tfds:made") as caught:
        export_tfds("made", tmp_path / "out", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_without_the_packages(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Error, match="pip install tensorflow-datasets"):
        read_data_source("malaria", split="train", data_dir=tmp_path)
