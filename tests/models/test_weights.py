import pickle
import shlex
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcells import Error
from jaxcells.models import create_model
from jaxcells.models.weights import (
    PortError,
    PortReport,
    flax_to_torch_name,
    from_torch,
    load_metadata,
    load_pretrained,
    load_safetensors,
    to_torch,
    torch_to_flax_name,
    transfer,
)

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


@pytest.mark.parametrize(("ours", "theirs", "ndim"), NAMES)
def test_names_both_ways(ours, theirs, ndim):
    path = tuple(ours.split("/"))
    assert flax_to_torch_name(path) == theirs
    assert torch_to_flax_name(theirs, ndim) == path


def test_batch_counter_has_no_counterpart():
    assert torch_to_flax_name("layer2.0.downsample.1.num_batches_tracked", 0) is None


def test_layouts_by_value():
    variables = make_variables()
    tensors = to_torch(variables)
    kernel, weight = variables["params"]["layer2_0"]["conv1"]["kernel"], "layer2.0.conv1.weight"
    assert tensors[weight].shape == (6, 4, 3, 2)
    for h, w, i, o in [(0, 1, 2, 3), (2, 0, 3, 5)]:
        assert tensors[weight][o, i, h, w] == kernel[h, w, i, o]
    assert tensors["fc.weight"].shape == (5, 6)
    assert tensors["fc.weight"][4, 1] == variables["params"]["fc"]["kernel"][1, 4]
    assert_equal(from_torch(tensors), variables)


def test_round_trip_through_a_file(tmp_path):
    # Fails when to_torch returns transposed views: safetensors stores those scrambled.
    variables = make_variables()
    save_file(to_torch(variables), tmp_path / "w.safetensors")
    assert_equal(from_torch(load_safetensors(tmp_path / "w.safetensors")), variables)


def test_everything_loaded_when_classes_agree(tmp_path):
    source, fresh = make_variables(seed=1), make_variables(seed=2)
    tensors = to_torch(source) | {"bn1.num_batches_tracked": np.array(7)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    merged, report = load_pretrained(path, fresh)
    assert_equal(merged, source)
    assert set(report.loaded) == set(to_torch(source))
    assert report.ignored == ("bn1.num_batches_tracked",)
    assert report.skipped == report.adapted == report.missing == report.unexpected == ()
    assert report.source == str(path)
    assert report.summary() == "13 tensors loaded; 1 batch counters ignored"
    assert report.problems() == ""
    assert_equal(fresh, make_variables(seed=2))


def test_head_kept_when_classes_differ():
    source, fresh = make_variables(seed=1, classes=1000), make_variables(seed=2, classes=3)
    merged, report = load_pretrained(to_torch(source), fresh)
    assert report.skipped == ("fc.weight", "fc.bias")
    assert report.summary().endswith(
        "; fc.weight, fc.bias skipped: new head, 1000 classes there and 3 here"
    )
    assert not {"fc.weight", "fc.bias"} & set(report.loaded)
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])
    assert_equal(merged["batch_stats"], source["batch_stats"])
    np.testing.assert_array_equal(
        merged["params"]["conv1"]["kernel"], source["params"]["conv1"]["kernel"]
    )


def test_head_of_as_many_other_classes_is_kept():
    source, fresh = make_variables(seed=1), make_variables(seed=2)
    merged, report = load_pretrained(to_torch(source), fresh, other_classes="of other things")
    assert report.skipped == ("fc.weight", "fc.bias")
    assert (
        report.summary()
        == "11 tensors loaded; fc.weight, fc.bias skipped: new head, of other things"
    )
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])
    merged, report = transfer(source, fresh, other_classes="of other things")
    assert report.skipped == ("fc/kernel", "fc/bias")
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])


def test_head_of_another_width_is_an_error():
    source, fresh = make_variables(classes=1000), make_variables(classes=3)
    source["params"]["fc"]["kernel"] = np.zeros((7, 1000), np.float32)
    with pytest.raises(PortError, match=r"1 unfit \(fc.weight: \[7, 1000\] for \[6, 3\]\)"):
        load_pretrained(to_torch(source), fresh)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_first_convolution_adapts_to_input_channels(channels):
    source, fresh = make_variables(seed=1), make_variables(seed=2, channels=channels)
    merged, report = load_pretrained(to_torch(source), fresh)
    assert report.adapted == ("conv1.weight",)
    assert "conv1.weight adapted" in report.summary()
    kernel = source["params"]["conv1"]["kernel"]
    expected = np.repeat(kernel.mean(axis=2, keepdims=True), channels, axis=2) * 3 / channels
    np.testing.assert_allclose(merged["params"]["conv1"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    # An image of equal channels is answered as by the network of three.
    np.testing.assert_allclose(
        merged["params"]["conv1"]["kernel"].sum(axis=2), kernel.sum(axis=2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_first_convolution_stays_fresh_when_asked(channels):
    source, fresh = make_variables(seed=1), make_variables(seed=2, channels=channels)
    merged, report = load_pretrained(to_torch(source), fresh, conv1="fresh")
    assert report.fresh == ("conv1.weight",)
    assert report.adapted == ()
    assert report.summary() == "12 tensors loaded; conv1.weight fresh, as asked for"
    assert_equal(merged["params"]["conv1"], fresh["params"]["conv1"])
    assert_equal(merged["params"]["bn1"], source["params"]["bn1"])
    merged, report = transfer(source, fresh, conv1="fresh")
    assert report.fresh == ("conv1/kernel",)
    assert_equal(merged["params"]["conv1"], fresh["params"]["conv1"])


@pytest.mark.parametrize(("there", "here"), [(1, 3), (5, 3), (3, 5), (5, 1)])
def test_a_run_of_other_channels_adapts_likewise(there, here):
    source, fresh = make_variables(channels=there), make_variables(channels=here, classes=2)
    merged, report = transfer(source, fresh)
    assert report.adapted == ("conv1/kernel",)
    kernel = merged["params"]["conv1"]["kernel"]
    assert kernel.shape[2] == here
    assert np.ptp(kernel, axis=2).max() == 0
    expected = source["params"]["conv1"]["kernel"].sum(axis=2)
    np.testing.assert_allclose(kernel.sum(axis=2), expected, rtol=1e-4, atol=1e-5)


def test_all_mistakes_in_one_message():
    tensors = to_torch(make_variables())
    del tensors["bn1.bias"], tensors["fc.bias"]
    tensors["head.weight"] = np.zeros((2, 2), np.float32)
    tensors["layer2.0.conv1.weight"] = np.zeros((6, 4, 3, 3), np.float32)
    tensors["bn1.weight"] = np.zeros(4, np.int8)
    tensors["bn1.running_var"] = np.full(4, np.nan, np.float32)
    with pytest.raises(PortError) as caught:
        load_pretrained(tensors, make_variables())
    report = caught.value.report
    assert set(report.missing) == {"bn1.bias", "fc.bias"}
    assert report.unexpected == ("head.weight",)
    assert {line.split(":")[0] for line in report.unfit} == {
        "layer2.0.conv1.weight",
        "bn1.weight",
        "bn1.running_var",
    }
    text = str(caught.value)
    assert "\n" not in text
    assert "1 unexpected (head), " in text
    assert "2 missing (bn1.bias, fc.bias), " in text
    assert "3 unfit (" in text
    assert "[3, 3, 4, 6] for [3, 2, 4, 6]" in text
    assert "numbers of type int8" in text
    assert "not finite" in text
    assert "--config.model.name" in text


def test_long_lists_are_cut_in_the_message_and_whole_in_the_report():
    names = [f"{chr(97 + i)}.bias" for i in range(14)]
    tensors = to_torch(make_variables()) | {name: np.zeros(1) for name in names}
    with pytest.raises(PortError, match=r"14 unexpected \(a, b, .*, k, l and 2 more\); ") as caught:
        load_pretrained(tensors, make_variables())
    report = caught.value.report
    assert report.problems() == f"14 unexpected ({', '.join('abcdefghijklmn')})"
    assert report.unexpected == tuple(names)


def test_layers_stand_for_their_tensors():
    def tensors(*sizes):
        return [
            f"layer{stage}.{index}.{leaf}"
            for stage, size in enumerate(sizes, start=1)
            for index in range(size)
            for leaf in ("conv1.weight", "bn1.weight", "bn1.bias")
        ]

    def problems(larger, smaller):
        names = tuple(name for name in larger if name not in smaller)
        return PortReport("", loaded=tuple(smaller), missing=names).problems()

    few, more, most = tensors(2, 2, 2, 2), tensors(3, 4, 6, 3), tensors(3, 4, 23, 3)
    assert problems(more, few) == (
        "24 missing (layer1.2, layer2.2, layer2.3, layer3.2 … layer3.5, layer4.2)"
    )
    # As jax sorts names, layer3.10 comes before layer3.6.
    assert problems(sorted(most), more) == "51 missing (layer3.6 … layer3.22)"
    assert problems(few, []) == "24 missing (layer1 … layer4)"
    assert problems(tensors(5), tensors(2)) == "9 missing (layer1.2 … layer1.4)"
    assert problems(tensors(4), tensors(2)) == "6 missing (layer1.2, layer1.3)"
    # A layer of which something fits is not named as a whole.
    assert problems(few, [n for n in few if ".0.bn1." not in n]) == (
        "8 missing (layer1.0.bn1, layer2.0.bn1, layer3.0.bn1, layer4.0.bn1)"
    )
    assert problems(few, few[1:]) == "1 missing (layer1.0.conv1)"
    assert problems(few, [*few[:1], *few[2:]]) == "1 missing (layer1.0.bn1.weight)"
    unfit = PortReport("", unfit=("fc.bias: not finite",), missing=("fc.weight",))
    assert unfit.problems() == "1 missing (fc.weight), 1 unfit (fc.bias: not finite)"


def test_plain_network_refuses_a_residual_file():
    residual, plain = make_variables(), make_variables(shortcut=False)
    with pytest.raises(PortError, match=r"5 unexpected \(.*this one is plain, with none.*random"):
        load_pretrained(to_torch(residual), plain)
    with pytest.raises(PortError, match=r"5 missing \(.*weights are of a plain network"):
        load_pretrained(to_torch(plain), residual)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_the_network_s(tmp_path, dtype):
    source = make_variables(seed=1)
    tensors = {name: tensor.astype(dtype) for name, tensor in to_torch(source).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    merged, _ = load_pretrained(tmp_path / "w.safetensors", make_variables())
    kernel = merged["params"]["fc"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
        kernel, source["params"]["fc"]["kernel"].astype(dtype).astype(np.float32)
    )


def test_transfer_from_another_run():
    source, fresh = make_variables(seed=1, classes=4), make_variables(seed=2, classes=3)
    merged, report = transfer(source, fresh, source="runs/a")
    assert set(report.skipped) == {"fc/kernel", "fc/bias"}
    assert {"layer2_0/conv1/kernel", "bn1/mean"} < set(report.loaded)
    assert report.summary().startswith("11 tensors loaded; fc/kernel, ")
    assert report.source == "runs/a"
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])
    assert_equal(merged["params"]["layer2_0"], source["params"]["layer2_0"])
    assert_equal(merged["batch_stats"], source["batch_stats"])
    with pytest.raises(PortError, match=r"runs/a: .*5 missing \(layer2_0/downsample_bn, "):
        transfer(make_variables(shortcut=False), fresh, source="runs/a")


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
        load_pretrained(tmp_path / "w.safetensors", fresh),
        transfer(source, fresh),
        transfer(from_torch(tensors), fresh),  # from the same network without a scan
    ):
        assert len(report.loaded) == 11 + 4
        assert_equal(merged["batch_stats"], source["batch_stats"])
        np.testing.assert_array_equal(merged["params"]["layer2_rest"]["conv1"]["kernel"], rest)
    single, _ = transfer(source, from_torch(tensors))
    assert_equal(single, from_torch(tensors))
    del tensors["layer2.2.conv1.weight"]
    with pytest.raises(PortError, match=r"1 missing \(layer2.2.conv1\)"):
        load_pretrained(tensors, fresh)


BLOCKS = {"resnet18": (2, (2, 2, 2, 2)), "resnet50": (3, (3, 4, 6, 3))}


def torchvision_names(name):
    """The keys of torchvision's state_dict, without the batch counters."""
    convs, sizes = BLOCKS[name]
    names = ["conv1.weight", "fc.weight", "fc.bias"]
    norms = ["bn1"]
    for stage, size in enumerate(sizes, start=1):
        for block in (f"layer{stage}.{i}" for i in range(size)):
            names += [f"{block}.conv{i}.weight" for i in range(1, convs + 1)]
            norms += [f"{block}.bn{i}" for i in range(1, convs + 1)]
        if stage > 1 or convs == 3:
            names.append(f"layer{stage}.0.downsample.0.weight")
            norms.append(f"layer{stage}.0.downsample.1")
    leaves = ("weight", "bias", "running_mean", "running_var")
    return set(names) | {f"{norm}.{leaf}" for norm in norms for leaf in leaves}


def random_variables(model, *, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.zeros((1, 32, 32, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    return jax.tree.map(lambda s: rng.uniform(0.1, 0.3, s.shape).astype(s.dtype), shapes)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_networks_have_torchvision_s_tensors(name):
    source = random_variables(create_model(name, num_classes=1000, width=8), seed=1)
    fresh = random_variables(create_model(name, num_classes=3, width=8), seed=2)
    tensors = to_torch(source)
    assert set(tensors) == torchvision_names(name)
    assert tensors["layer2.0.conv1.weight"].shape[:2] == (16, 8 if name == "resnet18" else 32)
    counters = {
        n.replace("running_mean", "num_batches_tracked"): np.array(9)
        for n in tensors
        if n.endswith("running_mean")
    }
    merged, report = load_pretrained(tensors | counters, fresh)
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert set(report.loaded) == set(tensors) - {"fc.weight", "fc.bias"}
    assert set(report.ignored) == set(counters)
    assert_equal(merged["batch_stats"], source["batch_stats"])
    assert_equal(merged["params"]["layer4_1"], source["params"]["layer4_1"])
    assert_equal(merged["params"]["fc"], fresh["params"]["fc"])


def test_plain_network_refuses_the_residual_twin():
    source = random_variables(create_model("resnet18", num_classes=3, width=8))
    plain = random_variables(create_model("plain18", num_classes=3, width=8))
    with pytest.raises(PortError, match=r"15 unexpected \(layer2.0.downsample.*this one is plain"):
        load_pretrained(to_torch(source), plain)


def test_one_channel_network_answers_grey_images_as_the_three_channel_one():
    model = create_model("resnet18", num_classes=3, width=8)
    source = random_variables(model, seed=1)
    # Where sums of multiples of 1/64 are exact, the order in which they are summed is all the same;
    # what comes after the first convolution is then the same computation on the same numbers.
    kernel = source["params"]["conv1"]["kernel"]
    source["params"]["conv1"]["kernel"] = np.round(kernel * 64) / 64
    merged, _ = load_pretrained(to_torch(source), random_variables(model, channels=1, seed=2))
    grey = jnp.round(jax.random.normal(jax.random.key(0), (2, 32, 32, 1)) * 64) / 64
    apply = jax.jit(partial(model.apply, train=False))
    expected = apply(source, jnp.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(apply(merged, grey), expected)
    assert np.ptp(expected, axis=0).max() > 0

    # A fifth of the sum is no such number: equal up to rounding.
    merged, _ = load_pretrained(to_torch(source), random_variables(model, channels=5, seed=2))
    five = apply(merged, jnp.repeat(grey, 5, axis=-1))
    np.testing.assert_allclose(five, expected, rtol=1e-4)


def _pickle_bytes(protocol):
    return pickle.dumps({"conv1.weight": [1.0]}, protocol=protocol)


@pytest.mark.parametrize("suffix", [".pth", ".PT", ".bin", ".ckpt"])
def test_pickle_suffix_refused(tmp_path, suffix):
    path = tmp_path / f"my weights{suffix}"
    save_file({"a": np.zeros(1, np.float32)}, path)
    with pytest.raises(Error, match="a pickle can run any code"):
        load_safetensors(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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
    np.testing.assert_array_equal(load_safetensors(path)["a"], load_file(path)["a"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
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
