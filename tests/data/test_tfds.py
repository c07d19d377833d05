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
    features = {"image": tfds.features.Image(), "label": label, **features}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=keys,
                disable_shuffling=True,
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


@pytest.mark.parametrize(
    ("dtype", "channels", "feature"),
    [
        ("uint8", 1, "Image"),
        ("uint8", 3, "Image"),
        ("uint16", 1, "Tensor"),
        ("float32", 2, "Tensor"),
    ],
)
def test_crop_set_reads_back_as_it_was(tmp_path, capfd, dtype, channels, feature):
    crop_set = make_crops(tmp_path, dtype=dtype, channels=channels)
    builder = prepare_tfds(crop_set.directory, tmp_path / "tfds")
    assert type(builder.info.features["image"]).__name__ == feature
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
    make_crops(tmp_path)
    prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")}
    again = prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*")} == before
    assert len(again.as_data_source("test")) == 3
    make_crops(tmp_path / "others", seed=1)
    with pytest.raises(Error, match=r"tfds/jaxcells_crops/1\.0\.0: holds other crops; delete it"):
        prepare_tfds(tmp_path / "others" / "crops", tmp_path / "tfds")
    other = prepare_tfds(tmp_path / "others" / "crops", tmp_path / "tfds", name="others")
    assert other.info.full_name == "others/1.0.0"


def test_changed_crops_are_refused_and_nothing_is_left(tmp_path):
    path = tmp_path / "crops" / make_crops(tmp_path).records[5].crop
    write_crop(path.with_suffix(""), read_image(path) ^ 1)
    with pytest.raises(Error, match="pixels"):
        prepare_tfds(tmp_path / "crops", tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


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
    numbers = {"train": [], "val": [], "test": []}
    for path in paths:
        numbers[path.split("/")[0]].append(int(path[-10:-4]))
    assert [len(of_split) for of_split in numbers.values()] == [180, 20, 3]
    assert sorted(numbers["train"] + numbers["val"]) == list(range(200))
    assert len(os.listdir(tmp_path / "out" / "val")) == 3  # not one class, as every tenth would be


@pytest.mark.parametrize("form", ["jpeg", "grey as colour", "16 bit"])
def test_export_reads_every_stored_form(tmp_path, form):
    deep, grey = np.array([[[65535], [258]], [[0], [1]]], np.uint16), IMAGES[0, ..., :1]
    jpeg = encoded(IMAGES[0], "jpeg")
    feature = tfds.features.Image(shape=deep.shape, dtype=deep.dtype)
    feature, stored, pixels = {
        "jpeg": (tfds.features.Image(), jpeg, np.asarray(Image.open(io.BytesIO(jpeg)))),
        "grey as colour": (tfds.features.Image(), encoded(grey), np.repeat(grey, 3, axis=2)),
        "16 bit": (feature, encoded(deep), deep),
    }[form]
    # Under other names than "image", which the data set tells itself.
    whole = {"whole": [example(scan=io.BytesIO(stored))]}
    make_tfds(tmp_path, whole, keys=("scan", "label"), scan=feature)
    (name,) = export(tmp_path)
    assert name == f"benign/000000.{'jpg' if form == 'jpeg' else 'png'}"
    found = read_image(tmp_path / "out" / name)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


def test_complete_export_is_reused_another_is_refused(tmp_path):
    make_tfds(tmp_path, {"train": examples(3)})
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    paths = export(tmp_path)
    assert not (tmp_path / "out" / "old").exists()
    shutil.rmtree(tmp_path / "made")
    assert export(tmp_path) == paths
    with pytest.raises(Error, match="out: is not all of tfds:malaria; delete it, or choose"):
        export(tmp_path, "malaria")
    (tmp_path / "out" / min(paths)).unlink()
    with pytest.raises(Error, match="out: is not all of tfds:made"):
        export(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(Error, match="mine: is not all of tfds:made"):
        export(tmp_path, out="mine")


PALETTE = encoded(Image.fromarray(IMAGES[0]).quantize(4))
NO_CLASS = "are not an image and its class"


@pytest.mark.parametrize(
    ("image", "label", "splits", "keys", "message"),
    [
        (IMAGES[0], -1, ["a"], None, "split a, example 0: has no label"),
        (encoded(IMAGES[0])[:-40], 0, ["a"], None, r"benign/000000\.png: .*damaged"),
        (encoded(IMAGES[0], "gif"), 0, ["a"], None, "is no PNG, JPEG, TIFF or BMP image"),
        (PALETTE, 0, ["a"], None, "has indexed colours"),
        (IMAGES[0], 0, ["train", "val"], None, "made: has the splits train, val; needed are train"),
        (IMAGES[0], 0, ["a"], ("text", "label"), f"'text' and 'label' {NO_CLASS}: .*text.*: Text"),
        (IMAGES[0], 0, ["a"], ("image", "text"), f"'image' and 'text' {NO_CLASS}"),
        (IMAGES[0], 0, ["a"], ("number", "label"), f"'number' and 'label' {NO_CLASS}.*dtype=int64"),
    ],
)
def test_data_sets_that_cannot_be_used(tmp_path, image, label, splits, keys, message):
    number = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.int64)
    others = {"text": "words", "number": np.zeros((2, 2, 1), np.int64)}
    data = {split: [example(image, label, **others)] for split in splits}
    make_tfds(tmp_path, data, keys=keys, text=tfds.features.Text(), number=number)
    with pytest.raises(Error, match=message) as caught:
        export(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["malaria", "made:3.0.0", "made/config", "", "../made", "made/2/x=,"]
)
def test_what_is_not_there_says_what_is_and_how_to_prepare_it(tmp_path, name):
    make_tfds(tmp_path, {"train": examples(1)})
    there = r"prepared there: made/2\.1\.0; set data\.source=tfds:NAME.*--file_format=array_record"
    with pytest.raises(Error, match=there) as caught:
        export(tmp_path, name)
    assert "\n" not in str(caught.value)
    with pytest.raises(Error, match="prepared there: none"):
        export(tmp_path, name, data_dir="nowhere")


@pytest.mark.parametrize("damage", ["format", "info", "missing", "cut", "flipped"])
def test_damaged_data_set_or_one_that_needs_tensorflow(tmp_path, damage):
    make_tfds(tmp_path, {"train": examples(5)})
    info = tmp_path / "made" / "2.1.0" / "dataset_info.json"
    shard = next(info.parent.glob("*array_record*"))
    content, reason = bytearray(shard.read_bytes()), ""
    shard.unlink()
    if damage == "format":
        info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
        reason = "TFRECORD.*delete that folder, and prepare it again"
    elif damage == "info":
        info.write_text("{")
    elif damage != "missing":
        content[content.index(b"PNG") + 20] ^= 1
        shard.write_bytes(content[:100] if damage == "cut" else content)
    with pytest.raises(Error, match=f"tfds:made.*{reason}") as caught:
        export(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_without_the_packages(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Error, match="pip install tensorflow-datasets"):
        export(tmp_path)
