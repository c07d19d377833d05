import functools

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcells import Error
from jaxcells.data.crop_set import prepare_crop_set
from jaxcells.data.crops import CropSettings
from jaxcells.files import Workdir, file_sha256
from jaxcells.models import create_model
from jaxcells.models.fetch import WeightsUnavailableError
from jaxcells.models.weights import to_torch
from jaxcells.training import checkpoints, initialization
from jaxcells.training.initialization import (
    Initialization,
    check_no_leak,
    find_initialization,
    images_by_split,
    initialize,
)
from jaxcells.training.state import inference_state
from jaxcells.workflows.export import export_weights
from tests.data.folders import textured, write_image
from tests.models.networks import random_variables
from tests.training.test_checkpoints import make_meta
from tests.training.test_steps import assert_trees_equal


@functools.cache
def make_state(num_classes, seed=0, *, name="resnet18", channels=3):
    model = create_model(name, num_classes=num_classes, width=2)
    sample = np.zeros((1, 32, 32, channels), np.float32)
    return inference_state(model, random_variables(model, sample, seed))


find = functools.partial(find_initialization, random_if_missing=False)


def save_run(workdir, state, class_names, **changed):
    """A finished run, as far as starting from it goes."""
    model = {"name": "resnet18", "num_classes": len(class_names), "width": 2}
    meta = make_meta(class_names=tuple(class_names), model=model, **changed)
    checkpoints.save(workdir / "checkpoints", state, meta, {"balanced_accuracy": 0.9, "loss": 0.3})


def start_from(path, state, class_names, **settings):
    found = find(str(path), "resnet18", **settings)
    return initialize(state, found, class_names=class_names)


def assert_head_is_of(started, state):
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(started.params["fc"][leaf], state.params["fc"][leaf])


def test_without_imagenet_weights_the_sample_alone_goes_on_and_loudly(monkeypatch):
    def fetch(name):
        raise WeightsUnavailableError(f"cannot download {name}")

    monkeypatch.setattr(initialization, "fetch_imagenet", fetch)
    with pytest.raises(WeightsUnavailableError):  # on anyone's own images
        find("imagenet", "resnet34")
    found = find_initialization("imagenet", "resnet34", random_if_missing=True)
    assert found.kind == "random"
    assert "RANDOM parameters instead of ImageNet's: cannot download resnet34" in found.warning
    state = make_state(3)
    started, record = initialize(state, found)
    assert started is state
    assert (record["kind"], record["warning"]) == ("random", found.warning)


def test_a_wrong_start_is_noticed_before_anything_else(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Error, match="pickled weights are not read"):
        find(str(path), "resnet18")
    with pytest.raises(Error, match="no validated checkpoint to start from"):
        find(str(tmp_path), "resnet18")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run of three classes, as workdir and as exported file, and its state."""
    workdir = tmp_path_factory.mktemp("runs") / "earlier"
    state = make_state(3, seed=1)
    save_run(workdir, state, ["A", "B", "C"])
    export_weights(Workdir(workdir))
    return workdir, state


@pytest.mark.parametrize("form", ["", "weights.safetensors"])
@pytest.mark.parametrize(
    ("class_names", "why"),
    [
        (["A", "B", "C"], None),
        (["A", "B"], "3 classes there and 2 here"),
        (["A", "C", "B"], "the classes stand in another order there"),
        (["A", "B", "D"], "other classes there, such as C"),
    ],
)
def test_the_head_is_taken_over_for_the_same_classes_only(earlier, form, class_names, why):
    workdir, source = earlier
    state = make_state(len(class_names))
    started, record = start_from(workdir / form, state, class_names)
    assert record["kind"] == ("file" if form else "run")
    assert record["source"] == str(workdir / form)
    assert record["sha256"] == (file_sha256(workdir / form) if form else None)
    assert int(started.step) == 0
    trunks = ({k: v for k, v in s.params.items() if k != "fc"} for s in (started, source))
    assert_trees_equal(*trunks)
    assert_trees_equal(started.batch_stats, source.batch_stats)
    assert_head_is_of(started, source if why is None else state)
    if why is None:
        assert record["tensors"] == "102 tensors loaded"
    else:
        assert record["tensors"].startswith("100 tensors loaded; fc")
        assert record["tensors"].endswith(f"skipped: new head, {why}")


@pytest.mark.parametrize("metadata", [None, {"class_names": "not JSON"}, {"class_names": "3"}])
def test_a_head_whose_classes_are_not_known_is_taken_over_loudly(earlier, tmp_path, metadata):
    _, source = earlier
    path = tmp_path / "weights.safetensors"
    save_file(to_torch(source.variables), path, metadata=metadata)
    started, record = start_from(path, make_state(3), ["X", "Y", "Z"])
    assert_head_is_of(started, source)
    assert record["tensors"].endswith("the head too, which says nothing of its classes")


@pytest.mark.parametrize("form", ["", "weights.safetensors"])
def test_the_first_convolution_fits_other_channels_or_stays_fresh(earlier, form, monkeypatch):
    workdir, source = earlier
    path, state = workdir / form, make_state(3, channels=5)
    started, record = start_from(path, state, ["A", "B", "C"])
    sums = (s.params["conv1"]["kernel"].sum(axis=2) for s in (started, source))
    np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-5)
    assert "adapted to the number of input channels" in record["tensors"]
    started, record = start_from(path, state, ["A", "B", "C"], conv1="fresh")
    kernels = (s.params["conv1"]["kernel"] for s in (started, state))
    np.testing.assert_array_equal(*kernels)
    assert record["tensors"].startswith("101 tensors loaded; conv1")
    assert record["tensors"].endswith(" fresh, as asked for")
    monkeypatch.setattr(initialization, "fetch_imagenet", lambda name: path)
    found = find("imagenet", "resnet18", conv1="fresh")
    assert found == Initialization("imagenet", path, conv1="fresh")


def test_layers_that_do_not_fit_are_one_line(earlier):
    workdir, _ = earlier
    with pytest.raises(Error, match=r"earlier: tensors do not fit .*165 missing .* more") as caught:
        start_from(workdir, make_state(3, name="resnet50"), ["A", "B", "C"])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Makes crop sets of nine images a class, by seed and, of other images, folder."""
    folder = tmp_path_factory.mktemp("crops")

    @functools.cache
    def prepare(seed, name="images", split_by="field", fields=9):
        root = folder / name
        for number in range(2 * fields):
            image = textured(64, 64, number + 1000 * len(name))  # other images in every folder
            write_image(root / f"{'AB'[number % 2]} {name}" / f"field{number}.png", image)
        settings = CropSettings(seed, 32, 9, (5, 2, 2), split_by)
        return prepare_crop_set(folder / f"{name} {seed}", root, settings)

    return prepare


def trained(workdir, crop_set, init=None):
    """A network trained on these crops, as a workdir and as the exported file."""
    save_run(
        *(workdir, make_state(2), crop_set.class_names),
        manifest_sha256=crop_set.manifest_sha256,
        images_by_split=images_by_split(crop_set, init or Initialization("random")),
    )
    file = export_weights(Workdir(workdir))
    return [Initialization("run", workdir), Initialization("file", file)]


def test_a_network_that_saw_what_is_held_out_is_refused(tmp_path, crops):
    def images(crop_set, *splits):
        return {record.source for record in crop_set.records if record.split in splits}

    before, now = crops(0), crops(2)
    trained_on = images(before, "train") & images(now, "val", "test")
    chosen_by = images(before, "val") & images(now, "test")
    assert trained_on
    assert chosen_by
    number = len(trained_on | chosen_by)
    message = rf"by {number} images that are held out here, such as [AB] images/field"
    for init in trained(tmp_path / "run", before):
        check_no_leak(init, before)
        with pytest.raises(Error, match=message):
            check_no_leak(init, now)
        check_no_leak(init, crops(1, "other"))


def test_so_is_one_whose_ancestor_saw_it(tmp_path, crops):
    for number, first in enumerate(trained(tmp_path / "first", crops(0))):
        for second in trained(tmp_path / f"second{number}", crops(0, "other"), first):
            check_no_leak(second, crops(0))  # as the ancestor held them out
            with pytest.raises(Error, match="or a run that it began from"):
                check_no_leak(second, crops(1))


def test_the_very_same_crops_are_no_leak_even_if_images_are_in_two_splits(tmp_path, crops):
    crop_set = crops(0, "few", "crop", fields=3)
    for init in trained(tmp_path / "run", crop_set):
        check_no_leak(init, crop_set)
        with pytest.raises(Error, match="held out here"):
            check_no_leak(init, crops(1, "few", "crop", fields=3))


def test_of_files_from_elsewhere_nothing_is_known(tmp_path, crops):
    save_file({"a": np.zeros(1)}, tmp_path / "w.safetensors")
    check_no_leak(Initialization("file", tmp_path / "w.safetensors"), crops(0))
    check_no_leak(Initialization("random"), crops(0))
