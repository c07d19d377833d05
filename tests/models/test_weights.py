import pickle
import shlex
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from jaxcells import Error
from jaxcells.models import create_model
from jaxcells.models.resnet import unstack
from jaxcells.models.weights import (
    PortError,
    load_metadata,
    load_pretrained,
    load_safetensors,
    to_torch,
)
from tests.models.networks import random_variables

# Ours, torch's, number of axes; torch's as timm's resnet34.tv_in1k has them.
NAMES = [
    ("params/conv1/kernel", "conv1.weight", 4),
    ("params/bn1/scale", "bn1.weight", 1),
    ("params/bn1/bias", "bn1.bias", 1),
    ("batch_stats/bn1/mean", "bn1.running_mean", 1),
    ("batch_stats/bn1/var", "bn1.running_var", 1),
    ("params/layer1_0/conv2/kernel", "layer1.0.conv2.weight", 4),
    ("params/layer3_22/conv3/kernel", "layer3.22.conv3.weight", 4),
    ("batch_stats/layer3_22/bn3/var", "layer3.22.bn3.running_var", 1),
    ("params/layer2_0/downsample_conv/kernel", "layer2.0.downsample.0.weight", 4),
    ("params/layer2_0/downsample_bn/scale", "layer2.0.downsample.1.weight", 1),
    ("params/layer2_0/downsample_bn/bias", "layer2.0.downsample.1.bias", 1),
    ("batch_stats/layer2_0/downsample_bn/mean", "layer2.0.downsample.1.running_mean", 1),
    ("params/fc/kernel", "fc.weight", 2),
    ("params/fc/bias", "fc.bias", 1),
]


def make_variables(*, seed=0, classes=5, channels=3, shortcut=True):
    """A network of one stem, one projecting block and a head, each number of its own."""
    rng = np.random.default_rng(seed)

    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {
        "conv1": {"kernel": some(7, 7, channels, 4)},
        "bn1": {"scale": some(4), "bias": some(4)},
        "layer2_0": {"conv1": {"kernel": some(3, 2, 4, 6)}},
        "fc": {"kernel": some(6, classes), "bias": some(classes)},
    }
    stats = {"bn1": {"mean": some(4), "var": some(4)}}
    if shortcut:
        params["layer2_0"]["downsample_conv"] = {"kernel": some(1, 1, 4, 6)}
        params["layer2_0"]["downsample_bn"] = {"scale": some(6), "bias": some(6)}
        stats["layer2_0"] = {"downsample_bn": {"mean": some(6), "var": some(6)}}
    return {"params": params, "batch_stats": stats}


def assert_equal(tree, other):
    assert isinstance(tree, dict) == isinstance(other, dict)
    if isinstance(tree, dict):
        assert tree.keys() == other.keys()
        for key in tree:
            assert_equal(tree[key], other[key])
    else:
        np.testing.assert_array_equal(tree, other)


def transfer(source, variables, **how):
    """Takes variables over as a run does that starts from another."""
    return load_pretrained(to_torch(source), variables, **how)


def test_names():
    for ours, theirs, ndim in NAMES:
        path = tuple(ours.split("/"))
        assert list(to_torch(unflatten_dict({path: np.zeros([1] * ndim)}))) == [theirs]


def test_layouts_by_value():
    variables = make_variables()
    tensors = to_torch(variables)
    kernel, weight = variables["params"]["layer2_0"]["conv1"]["kernel"], "layer2.0.conv1.weight"
    assert tensors[weight].shape == (6, 4, 3, 2)
    for h, w, i, o in [(0, 1, 2, 3), (2, 0, 3, 5)]:
        assert tensors[weight][o, i, h, w] == kernel[h, w, i, o]
    assert tensors["fc.weight"].shape == (5, 6)
    assert tensors["fc.weight"][4, 1] == variables["params"]["fc"]["kernel"][1, 4]


def test_everything_loaded_when_classes_agree(tmp_path):
    source, fresh = make_variables(seed=1), make_variables(seed=2)
    tensors = to_torch(source) | {"bn1.num_batches_tracked": np.array(7)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    merged, report = load_pretrained(load_safetensors(path), fresh, called=str(path))
    assert_equal(merged, source)
    assert set(report.loaded) == set(to_torch(source))
    assert report.source == str(path)
    assert report.summary() == "13 tensors loaded; 1 batch counters ignored"
    assert_equal(fresh, make_variables(seed=2))


def test_head_kept_when_classes_differ():
    source, fresh = make_variables(seed=1, classes=1000), make_variables(seed=2, classes=3)
    merged, report = load_pretrained(to_torch(source), fresh)
    assert report.skipped == ("fc.weight", "fc.bias")
    assert report.summary().endswith(
        "; fc.weight, fc.bias skipped: new head, 1000 classes there and 3 here"
    )
    assert not {"fc.weight", "fc.bias"} & set(report.loaded)
    assert_equal(merged, {**source, "params": source["params"] | {"fc": fresh["params"]["fc"]}})


def test_head_of_as_many_other_classes_is_kept():
    source, fresh = make_variables(seed=1), make_variables(seed=2)
    merged, report = transfer(source, fresh, other_classes="of other things")
    assert report.skipped == ("fc.weight", "fc.bias")
    assert report.summary().endswith("; fc.weight, fc.bias skipped: new head, of other things")
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])


def test_head_of_another_width_is_an_error():
    source, fresh = make_variables(classes=1000), make_variables(classes=3)
    source["params"]["fc"]["kernel"] = np.zeros((7, 1000), np.float32)
    with pytest.raises(PortError, match=r"1 unfit \(fc.weight: \[7, 1000\] for \[6, 3\]\)"):
        load_pretrained(to_torch(source), fresh)


@pytest.mark.parametrize(("there", "here"), [(3, 1), (3, 2), (3, 5), (1, 3), (5, 1)])
def test_first_convolution_adapts_to_input_channels(there, here):
    source, fresh = make_variables(seed=1, channels=there), make_variables(seed=2, channels=here)
    merged, report = load_pretrained(to_torch(source), fresh)
    loaded = "12 tensors loaded; conv1.weight adapted to the number of input channels"
    assert report.summary() == loaded
    kernel = source["params"]["conv1"]["kernel"]
    # An image of equal channels is answered as before.
    expected = np.repeat(kernel.sum(axis=2, keepdims=True) / here, here, axis=2)
    np.testing.assert_allclose(merged["params"]["conv1"]["kernel"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_first_convolution_stays_fresh_when_asked(channels):
    source, fresh = make_variables(seed=1), make_variables(seed=2, channels=channels)
    merged, report = load_pretrained(to_torch(source), fresh, conv1="fresh")
    assert report.summary() == "12 tensors loaded; conv1.weight fresh, as asked for"
    assert_equal(merged["params"]["conv1"], fresh["params"]["conv1"])
    assert_equal(merged["params"]["bn1"], source["params"]["bn1"])


def test_all_mistakes_in_one_message():
    tensors = to_torch(make_variables())
    del tensors["bn1.bias"], tensors["fc.bias"]
    tensors["head.weight"] = np.zeros((2, 2), np.float32)
    tensors["layer2.0.conv1.weight"] = np.zeros((6, 4, 3, 3), np.float32)
    tensors["bn1.weight"] = np.zeros(4, np.int8)
    tensors["bn1.running_var"] = np.full(4, np.nan, np.float32)
    with pytest.raises(PortError) as caught:
        load_pretrained(tensors, make_variables())
    unfit = {line.split(":")[0] for line in caught.value.report.unfit}
    assert unfit == {"layer2.0.conv1.weight", "bn1.weight", "bn1.running_var"}
    text = str(caught.value)
    assert "\n" not in text
    assert "1 unexpected (head.weight), 2 missing (bn1.bias, fc.bias), 3 unfit (" in text
    for part in ("[3, 3, 4, 6] for [3, 2, 4, 6]", "type int8", "not finite", "model.name"):
        assert part in text


def test_long_lists_are_cut_in_the_message_and_whole_in_the_report():
    names = [f"{letter}.bias" for letter in "abcdefghijklmn"]
    tensors = to_torch(make_variables()) | {name: np.zeros(1) for name in names}
    with pytest.raises(
        PortError, match=r"14 unexpected \(a.bias, .*, l.bias, … 2 more\); "
    ) as caught:
        load_pretrained(tensors, make_variables())
    report = caught.value.report
    assert report.unexpected == tuple(names)


def test_plain_network_refuses_a_residual_file_and_the_other_way_round():
    residual, plain = make_variables(), make_variables(shortcut=False)
    with pytest.raises(PortError, match=r"5 unexpected \(.*one network is plain.*init=random"):
        load_pretrained(to_torch(residual), plain)
    with pytest.raises(PortError, match=r"runs/a: .*5 missing \(.*one network is plain"):
        transfer(plain, residual, called="runs/a")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_the_network_s(tmp_path, dtype):
    source = make_variables(seed=1)
    tensors = {name: tensor.astype(dtype) for name, tensor in to_torch(source).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    merged, _ = load_pretrained(load_safetensors(tmp_path / "w.safetensors"), make_variables())
    kernel = merged["params"]["fc"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
        kernel, source["params"]["fc"]["kernel"].astype(dtype).astype(np.float32)
    )


def test_transfer_from_another_run():
    source, fresh = make_variables(seed=1, classes=4), make_variables(seed=2, classes=3)
    merged, report = transfer(source, fresh, called="runs/a")
    assert {"layer2.0.conv1.weight", "bn1.running_mean"} < set(report.loaded)
    assert report.summary().startswith("11 tensors loaded; fc.weight, fc.bias skipped")
    assert report.source == "runs/a"
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])
    assert_equal(merged["params"]["layer2_0"], source["params"]["layer2_0"])
    assert_equal(merged["batch_stats"], source["batch_stats"])


def stacked_units(variables):
    """`make_variables`, with two units that a scan runs after the first of stage 2."""
    rng = np.random.default_rng(0)
    rest = {
        "params": {"conv1": {"kernel": rng.normal(size=(2, 3, 2, 6, 6)).astype(np.float32)}},
        "batch_stats": {"bn1": {"mean": rng.normal(size=(2, 6)).astype(np.float32)}},
    }
    return {
        collection: variables[collection] | {"layer2_rest": rest[collection]} for collection in rest
    }


def test_stacked_units_are_single_in_a_file_and_stacked_again(tmp_path):
    source = stacked_units(make_variables(seed=1))
    rest = source["params"]["layer2_rest"]["conv1"]["kernel"]
    tensors = to_torch(source)
    for number in (1, 2):
        np.testing.assert_array_equal(
            tensors[f"layer2.{number}.conv1.weight"], rest[number - 1].transpose(3, 2, 0, 1)
        )
        np.testing.assert_array_equal(
            tensors[f"layer2.{number}.bn1.running_mean"],
            source["batch_stats"]["layer2_rest"]["bn1"]["mean"][number - 1],
        )
    assert not [name for name in tensors if "rest" in name]
    save_file(tensors, tmp_path / "w.safetensors")
    fresh = stacked_units(make_variables(seed=2, classes=3))
    fresh["params"]["layer2_rest"] = jax.tree.map(np.zeros_like, fresh["params"]["layer2_rest"])
    for merged, report in (
        load_pretrained(load_safetensors(tmp_path / "w.safetensors"), fresh),
        transfer(source, fresh),
        transfer(unstack(source), fresh),  # from the same network without a scan
    ):
        assert len(report.loaded) == 11 + 4
        assert_equal(merged["batch_stats"], source["batch_stats"])
        np.testing.assert_array_equal(merged["params"]["layer2_rest"]["conv1"]["kernel"], rest)
    single, _ = transfer(source, unstack(fresh))
    assert_equal(single["batch_stats"], unstack(source)["batch_stats"])
    assert_equal(single["params"]["layer2_2"], unstack(source)["params"]["layer2_2"])
    del tensors["layer2.2.conv1.weight"]
    with pytest.raises(PortError, match=r"1 missing \(layer2.2.conv1.weight\)"):
        load_pretrained(tensors, fresh)


@pytest.mark.parametrize("channels", [1, 5])
def test_adapted_stem_answers_grey_images_as_the_one_of_three_channels(channels):
    model = create_model("resnet18", num_classes=3, width=8)
    source = random_variables(model, jnp.zeros((1, 32, 32, 3)), seed=1)
    fresh = random_variables(model, jnp.zeros((1, 32, 32, channels)), seed=2)
    merged, _ = load_pretrained(to_torch(source), fresh)
    grey = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    three, adapted = (
        model.apply(variables, jnp.repeat(grey, number, axis=-1), train=False, last=1)
        for variables, number in ((source, 3), (merged, channels))
    )
    assert np.ptp(three) > 1
    np.testing.assert_allclose(adapted, three, rtol=1e-4, atol=1e-4)


def _pickle_bytes(protocol):
    return pickle.dumps({"conv1.weight": [1.0]}, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle_content_refused(tmp_path, protocol):
    path = tmp_path / "w.safetensors"
    path.write_bytes(_pickle_bytes(protocol))
    with pytest.raises(Error, match="a pickle can run any code"):
        load_safetensors(path)


def test_zipped_pickle_refused_with_the_command_that_converts_it(tmp_path):
    path = tmp_path / "my weights.weights"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle_bytes(2))
    with pytest.raises(Error) as caught:
        load_safetensors(path)
    message = str(caught.value)
    assert "\n" not in message
    python, option, code, old, new = shlex.split(message.split("is installed: ")[1])
    assert (python, option) == ("python", "-c")
    assert (old, new) == (str(path), str(tmp_path / "my weights.safetensors"))
    compile(code, "command", "exec")
    assert "weights_only=True" in code


def test_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    # The file begins with the length of its header, and 0x280 is how a pickle begins.
    path = tmp_path / "w.safetensors"
    for padding in range(0x280):
        save_file({"a": np.arange(3.0)}, path, metadata={"note": "x" * padding})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    np.testing.assert_array_equal(load_safetensors(path)["a"], np.arange(3.0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: b"<!DOCTYPE html><html>not found</html>",
        lambda whole: whole[:20] + b"\xff" + whole[21:],
        lambda whole: whole + b"more",
    ],
)
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "w.safetensors"
    save_file(to_torch(make_variables()), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        Error, match=r"w\.safetensors: not a whole safetensors file \(.+\)"
    ) as caught:
        load_safetensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(Error, match=r"w\.safetensors: not a whole safetensors file \(.+\)"):
        load_metadata(path)


def test_metadata_are_read_where_there_are_any(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(1)}, path)
    assert load_metadata(path) == {}
    save_file({"a": np.zeros(1)}, path, metadata={"format": "pt", "step": "4"})
    assert load_metadata(path) == {"format": "pt", "step": "4"}


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(Error, match=r"none\.safetensors: cannot read the weights \(No such file"):
        load_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(Error, match=r"cannot read the weights"):
        load_safetensors(tmp_path)
