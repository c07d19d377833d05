import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxcells.data.crop_set import pixel_sha256, prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.data.images import read_image, write_crop
from jaxcells.data.tfds import export_images, prepare_tfds
from jaxcells.files import Error

LABELS = ("HT-29 (b)", "a.1", "é")
IMAGES = np.random.default_rng(1).integers(0, 256, size=(9, 6, 6, 3), dtype=np.uint8)


def make_crops(folder, *, dtype="uint8", channels=1, seed=0):
    """A crop set of four whole images a class."""
    rng = np.random.default_rng(seed)
    for label in LABELS:
        (folder / "images" / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 200, size=(6, 6, channels)).astype(dtype)
            pixels *= np.array(1 if dtype == "uint8" else 250.5).astype(dtype)
            write_crop(folder / "images" / label / f"f {i}", pixels)
    settings = CropSettings(seed=0, crop_size=6, crops_per_class=8, split=(2, 1, 1))
    return prepare_crop_set(folder / "crops", folder / "images", settings)


def make_tfds(data_dir, splits, *, keys=None, **features):
    """Prepares a data set of given examples, as anyone's TFDS code would."""
    label = tfds.features.ClassLabel(names=["benign", "in/situ", ".odd"])
    fixed = {"image": tfds.features.Image(), "label": label}
    features = tfds.features.FeaturesDict(fixed | features)

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=keys, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Made.name = "made"
    Made(data_dir=data_dir, file_format="array_record").download_and_prepare()


def encoded(image, form="png"):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def example(image=IMAGES[0], label=0, **others):
    data = image if isinstance(image, bytes) else encoded(image)
    return {"image": io.BytesIO(data), "label": label, **others}


def examples(number):
    return [example(IMAGES[i % 9], i % 3) for i in range(number)]


def export(tmp_path, name="made", out="out", data_dir="."):
    """Exports a data set, and returns the files."""
    root = tmp_path / out
    export_images(name, root, data_dir=tmp_path / data_dir)
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return files - {".tfds.json"}


def refuse(tmp_path, message, *arguments, **where):
    with pytest.raises(Error, match=message) as caught:
        export(tmp_path, *arguments, **where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("uint16", 1), ("float32", 2)]
)
def test_crop_set_reads_back_as_it_was(tmp_path, capfd, dtype, channels):
    crop_set = make_crops(tmp_path, dtype=dtype, channels=channels)
    builder = prepare_tfds(crop_set.directory, tmp_path / "tfds")
    assert isinstance(builder.info.features["image"], tfds.features.Image) == (dtype == "uint8")
    found = []
    for split in ("train", "val", "test"):
        for read in builder.as_data_source(split):
            record = next(r for r in crop_set.split(split) if r.crop == read["crop"].decode())
            assert pixel_sha256(read["image"]) == record.sha256
            assert LABELS[read["label"]] == record.label
            for key in ("channel", "source", "group"):
                assert read[key].decode() == getattr(record, key)
            found.append(record)
    assert sorted(map(str, found)) == sorted(map(str, crop_set.records))
    assert os.listdir(tmp_path / "tfds") == ["jaxcells_crops"]
    assert capfd.readouterr() == ("", "")
    # And as a source of images: into the same splits and classes, without loss.
    exported = {
        (*path.split("/")[:2], pixel_sha256(read_image(tmp_path / "out" / path)))
        for path in export(tmp_path, "jaxcells_crops", data_dir="tfds")
    }
    assert exported == {(r.split, r.label, r.sha256) for r in crop_set.records}


def test_neither_jax_nor_tensorflow_is_imported(tmp_path):
    make_crops(tmp_path)
    program = (
        "import sys; from pathlib import Path; import jaxcells.data.tfds as t\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "t.prepare_tfds(Path('crops'), Path('tfds'))\n"
        "t.export_images('jaxcells_crops', Path('out'), data_dir='tfds')\n"
        "print(sorted({'jax', 'jaxlib', 'flax', 'tensorflow'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_prepared_set_is_reused_but_only_for_its_own_crops(tmp_path):
    record = make_crops(tmp_path).records[5]
    prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")}
    again = prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")} == before
    assert len(again.as_data_source("test")) == 3
    others = make_crops(tmp_path / "others", seed=1).directory
    with pytest.raises(Error, match=r"tfds/jaxcells_crops/1\.0\.0: holds other crops; delete it"):
        prepare_tfds(others, tmp_path / "tfds")
    path = tmp_path / "crops" / record.crop
    write_crop(path.with_suffix(""), read_image(path) ^ 1)
    with pytest.raises(Error, match="pixels"):
        prepare_tfds(tmp_path / "crops", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_export_of_one_split_by_class(tmp_path):
    make_tfds(tmp_path, {"train": examples(7)})
    names = ["benign", "in%2Fsitu", "%2Eodd"]
    paths = [f"{names[i % 3]}/{i:06d}.png" for i in range(7)]
    assert export(tmp_path) == set(paths)
    for path, image in zip(paths, IMAGES, strict=False):
        np.testing.assert_array_equal(read_image(tmp_path / "out" / path), image)


def test_export_of_three_splits(tmp_path, caplog):
    numbers = {"train": 9, "validation": 3, "test": 2, "extra": 1}
    make_tfds(tmp_path, {split: examples(number) for split, number in numbers.items()})
    splits = [path.split("/")[0] for path in export(tmp_path, "made:2.1.0")]
    assert {split: splits.count(split) for split in splits} == {"train": 9, "val": 3, "test": 2}
    assert "tfds:made:2.1.0: leaving out the splits extra" in caplog.messages


def test_a_tenth_drawn_at_random_is_held_out_where_there_is_no_validation(tmp_path, caplog):
    in_turn = [example(label=i % 10 % 3) for i in range(200)]
    make_tfds(tmp_path, {"train": in_turn, "test": examples(3)})
    paths = export(tmp_path)
    assert "a tenth of train is held out" in caplog.text
    assert export(tmp_path, out="again") == paths
    splits = [path.split("/")[0] for path in paths]
    assert [splits.count(split) for split in ("train", "val", "test")] == [180, 20, 3]
    assert len({path[-10:] for path in paths if not path.startswith("test")}) == 200
    assert len(os.listdir(tmp_path / "out" / "val")) == 3  # not one class, as every tenth would be


def test_files_stay_as_they_are_stored_but_grey_becomes_colour(tmp_path):
    jpeg, grey = encoded(IMAGES[0], "jpeg"), IMAGES[1, ..., :1]
    make_tfds(tmp_path, {"whole": [example(jpeg), example(grey)]})
    assert export(tmp_path) == {"benign/000000.jpg", "benign/000001.png"}
    folder = tmp_path / "out" / "benign"
    assert (folder / "000000.jpg").read_bytes() == jpeg
    np.testing.assert_array_equal(read_image(folder / "000001.png"), np.repeat(grey, 3, axis=2))


def test_sixteen_bits_under_another_name(tmp_path):
    pixels = np.array([[[65535], [258]], [[0], [1]]], np.uint16)
    scan = tfds.features.Image(shape=pixels.shape, dtype=pixels.dtype)
    whole = {"whole": [example(scan=io.BytesIO(encoded(pixels)))]}
    make_tfds(tmp_path, whole, keys=("scan", "label"), scan=scan)
    assert export(tmp_path) == {"benign/000000.png"}
    found = read_image(tmp_path / "out" / "benign" / "000000.png")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels)


def test_complete_export_is_reused_another_is_refused(tmp_path):
    make_tfds(tmp_path, {"train": examples(3)})
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    paths = export(tmp_path)
    assert not (tmp_path / "out" / "old").exists()
    shutil.rmtree(tmp_path / "made")
    assert export(tmp_path) == paths
    refuse(tmp_path, "out: is not all of tfds:malaria; delete it, or choose", "malaria")
    (tmp_path / "out" / min(paths)).unlink()
    refuse(tmp_path, "out: is not all of tfds:made")
    (tmp_path / "mine").mkdir()
    refuse(tmp_path, "mine: is not all of tfds:made", out="mine")


PALETTE = encoded(Image.fromarray(IMAGES[0]).quantize(4))
NO_CLASS = "are not an image and its class"


@pytest.mark.parametrize(
    ("image", "label", "splits", "keys", "message"),
    [
        (IMAGES[0], -1, ["a"], None, "split a, example 0: has no label"),
        (encoded(IMAGES[0])[:-40], 0, ["a"], None, r"benign/000000\.png: .*damaged"),
        (encoded(IMAGES[0], "gif"), 0, ["a"], None, "is no PNG, JPEG, TIFF, BMP, CZI"),
        (PALETTE, 0, ["a"], None, "has indexed colours"),
        (IMAGES[0], 0, ["train", "val"], None, "made: has the splits train, val; needed are train"),
        (IMAGES[0], 0, ["a"], ("text", "label"), f"'text' and 'label' {NO_CLASS}: .*text.*: Text"),
        (IMAGES[0], 0, ["a"], ("image", "text"), f"'image' and 'text' {NO_CLASS}.*dtype=int64"),
        (IMAGES[0], 0, ["a"], ("number", "label"), f"'number' and 'label' {NO_CLASS}"),
    ],
)
def test_data_sets_that_cannot_be_used(tmp_path, image, label, splits, keys, message):
    number = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.int64)
    others = {"text": "words", "number": np.zeros((2, 2, 1), np.int64)}
    data = {split: [example(image, label, **others)] for split in splits}
    make_tfds(tmp_path, data, keys=keys, text=tfds.features.Text(), number=number)
    refuse(tmp_path, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["malaria", "made:3.0.0", "", "../made", "made/2/x=,"])
def test_what_is_not_there_says_what_is_and_how_to_prepare_it(tmp_path, name):
    make_tfds(tmp_path, {"train": examples(1)})
    there = r"prepared there: made/2\.1\.0; set data\.source=tfds:NAME.*--file_format=array_record"
    refuse(tmp_path, there, name)
    refuse(tmp_path, "prepared there: none", name, data_dir="nowhere")


@pytest.mark.parametrize("damage", ["format", "info", "cut", "flipped"])
def test_damaged_data_set_or_one_that_needs_tensorflow(tmp_path, damage):
    make_tfds(tmp_path, {"train": examples(5)})
    info = tmp_path / "made" / "2.1.0" / "dataset_info.json"
    shard = next(info.parent.glob("*array_record*"))
    content, message = bytearray(shard.read_bytes()), "tfds:made"
    content[content.index(b"PNG") + 20] ^= 1
    if damage == "format":
        info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
        message = "TFRECORD.*or prepare it with TensorFlow by"
    elif damage == "info":
        info.write_text("{")
    else:
        shard.write_bytes(content[:100] if damage == "cut" else content)
    refuse(tmp_path, message)
