"""Checks a config before anything runs, and compares it with the one of an earlier run."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcells.data.images import parse_plane
from jaxcells.data.splits import compile_group_pattern
from jaxcells.files import Error

KEYS = (
    *("seed", "init", "init_conv1"),
    *("model.name", "model.dtype", "model.width", "model.zero_init_residual"),
    *("data.source", "data.root", "data.seed", "data.crop_size", "data.crops_per_class"),
    *(
        "data.split",
        "data.split_by",
        "data.border",
        "data.min_foreground",
        "data.plane",
        "data.normalize",
    ),
    *("data.augment.dihedral", "data.augment.intensity"),
    *("optim.learning_rate", "optim.momentum", "optim.weight_decay", "optim.schedule"),
    *("optim.label_smoothing", "optim.freeze", "optim.freeze_epochs", "optim.multipliers"),
    *("optim.class_weights",),
    *("train.batch_size", "train.num_epochs", "checkpoint.every_steps"),
)
_SOURCE = re.compile(r"|folder|sample|tfds:.+")


def validate(config: ConfigDict) -> None:
    """Checks every key, and every value that can be checked without touching images or devices.

    Raises:
      Error: lists all mistakes at once, a line each.
    """
    present = dict(_flatten(config.to_dict()))
    mistakes = [f"{key} is not a key; see configs/default.py" for key in present if key not in KEYS]
    mistakes += [f"{key} is missing; see configs/default.py" for key in KEYS if key not in present]
    mistakes += [
        f"{key}={value!r} is not a finite number"
        for key, value in present.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    mistakes = mistakes or list(_mistakes(config))
    if mistakes:
        number = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        raise Error(f"the config has {number}:\n  " + "\n  ".join(mistakes))


def data_source(config: ConfigDict) -> str:
    """Returns "folder", "sample" or "tfds:NAME"."""
    return config.data.source or ("folder" if config.data.root else "sample")


def data_seed(config: ConfigDict) -> int:
    """Returns the seed of the crops and the split."""
    return config.seed if config.data.seed == -1 else config.data.seed


def parse_multipliers(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Turns every "REGEX=FACTOR" into a pair; the last = stands before the factor.

    Raises:
      Error: one is not of that form, or its factor is negative or not finite.
    """
    pairs = []
    for text in texts:
        pattern, _, factor = str(text).rpartition("=")
        try:
            re.compile(pattern)
            value = float(factor)
        except (re.error, ValueError):
            value = math.nan
        if not pattern or not 0 <= value < math.inf:
            raise Error(
                f"optim.multipliers: {text!r} must be a regular expression, =, and a factor of 0 "
                "or more; for instance --config.optim.multipliers='fc=10'"
            )
        pairs.append((pattern, value))
    return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training of a comparison.

    Attributes:
      name: of its config file, without the ending.
      seed: of its initialisation, order and augmentation.
      config: all its keys.
    """

    name: str
    seed: int
    config: ConfigDict

    @property
    def label(self) -> str:
        """Name of its folder."""
        return f"{self.name}_seed{self.seed}"


def expand_comparison(config: ConfigDict, folder: Path) -> tuple[ConfigDict, list[Experiment]]:
    """Turns the config of a comparison into that of its crops and those of its experiments.

    An experiment is the comparison's config with what the experiment's own file changes of
    `default.py`, and every seed.

    Args:
      config: a config with the keys `experiments` and `seeds`.
      folder: where the config files of the experiments are, and default.py.

    Returns:
      The config without these two keys, and the experiments, all validated.

    Raises:
      Error: lists what is wrong with which experiment.
    """
    base = config.copy_and_resolve_references().unlock()
    if "experiments" not in base or "seeds" not in base:
        raise Error(
            "a comparison needs the keys experiments and seeds; see configs/compare.py, and give "
            "one like it as --config"
        )
    # On the command line, "a,b" arrives as one text.
    listed = (base.experiments,) if isinstance(base.experiments, str) else base.experiments
    names = [name.strip() for text in listed for name in str(text).split(",") if name.strip()]
    seeds = tuple(base.seeds) if isinstance(base.seeds, tuple | list) else (base.seeds,)
    del base.experiments, base.seeds
    validate(base)
    if not names or len(set(names)) < len(names):
        raise Error(f"experiments={','.join(names)!r} must name one or more configs, each once")
    odd = [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]
    if odd:
        raise Error(
            f"experiments: {odd[0]!r} must be the name of a config file in {folder}, without .py"
        )
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise Error(f"seeds={seeds} must be one or more whole numbers, each once")
    paths = {name: folder / f"{name}.py" for name in names}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise Error(f"experiments: there is no file {', '.join(missing)}")

    default = dict(_flatten(_get_config(folder / "default.py").to_dict()))
    experiments, mistakes = [], []
    for name, path in paths.items():
        own = dict(_flatten(_get_config(path).to_dict()))
        changes = {key: value for key, value in own.items() if value != default.get(key)}
        changes["model.name"] = own["model.name"]  # whatever the comparison's own is
        shared = dict(_flatten(base.to_dict()))
        mistakes += [
            f"{name}: {key}={value!r} would need other crops than the comparison's "
            f"{shared.get(key)!r}; set it in the config of the comparison"
            for key, value in changes.items()
            if key.startswith("data.")
            and not key.startswith(("data.augment.", "data.normalize"))
            and value != shared.get(key)
        ]
        for seed in seeds:
            changed = base.copy_and_resolve_references()
            changed.update_from_flattened_dict(
                {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
            )
            changed.seed, changed.data.seed = seed, data_seed(base)
            try:
                validate(changed)
            except Error as error:
                mistakes.append(f"{name}: {error}")
            experiments.append(Experiment(name, seed, changed))
    if mistakes:
        raise Error("the comparison has mistakes:\n  " + "\n  ".join(dict.fromkeys(mistakes)))
    return base, experiments


def _get_config(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Error(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise Error(f"{path}: the file defines no get_config(); see configs/default.py")
    config: ConfigDict = module.get_config()
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns the keys in which two configs differ, with both values.

    `data.root` is left out: a folder may move, and its images are compared with the crop set.
    """
    before, after = dict(_flatten(old.to_dict())), dict(_flatten(new.to_dict()))
    before["data.root"] = after["data.root"] = ""
    return [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:  # JSON knows no tuples
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _mistakes(config: ConfigDict) -> Iterator[str]:
    data, optim = config.data, config.optim

    def at_least(key: str, value: float, least: float) -> Iterator[str]:
        if not value >= least:
            yield f"{key}={value!r} must be {least} or more"

    def one_of(key: str, value: str, choices: tuple[str, ...]) -> Iterator[str]:
        if value not in choices:
            yield f"{key}={value!r} must be one of {', '.join(choices)}"

    if not 0 <= config.seed < 2**32:
        yield f"seed={config.seed!r} must be from 0 to {2**32 - 1}"
    if not -1 <= data.seed < 2**32:
        yield f"data.seed={data.seed!r} must be from 0 to {2**32 - 1}, or -1 for that of the run"
    yield from one_of("init_conv1", config.init_conv1, ("adapt", "fresh"))
    init = Path(config.init).expanduser()
    if config.init not in ("imagenet", "random") and not (config.init and init.exists()):
        yield (
            f"init={config.init!r} is neither imagenet nor random, and there is no such file or "
            "workdir"
        )

    name = re.fullmatch(
        r"(resnet|plain|preact)(18|34|50|101|152)|(preact)(164|200|1001)", config.model.name
    )
    if not name:
        yield (
            f"model.name={config.model.name!r} must be resnet, plain or preact, then 18, 34, 50, "
            "101 or 152; or preact, then 164, 200 or 1001"
        )
    elif name[1] != "resnet" and config.init == "imagenet":
        yield f"model.name={config.model.name!r} has no ImageNet weights; use --config.init=random"
    elif name[1] == "plain" and config.model.zero_init_residual:
        yield "model.zero_init_residual=True would keep a network without shortcuts at zero"
    elif name[1] != "resnet" and config.model.zero_init_residual:
        yield "model.zero_init_residual=True needs a norm at the end of a branch; preact has none"
    yield from one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    if not 1 <= config.model.width <= 1024:
        yield f"model.width={config.model.width!r} must be from 1 to 1024"
    if config.init == "imagenet" and config.model.width != 64:
        yield f"model.width={config.model.width} does not fit init=imagenet, whose width is 64"

    if not _SOURCE.fullmatch(data.source):
        yield f"data.source={data.source!r} must be folder, sample, tfds:NAME or empty"
    elif data.source == "folder" and not data.root:
        yield "data.source='folder' needs a folder; set --config.data.root=FOLDER"
    elif data.source == "sample" and data.root:
        yield f"data.source='sample' does not read data.root={data.root!r}; leave one of them out"
    crop_size = data.crop_size or 0
    if crop_size and crop_size < 32:
        yield f"data.crop_size={crop_size} must be 32 or more, or 0 to use images whole"
    split = tuple(data.split)
    if len(split) != 3 or not all(isinstance(n, int) and n >= 1 for n in split):
        yield f"data.split={split} must be three whole numbers of 1 or more: train, val, test"
    elif crop_size and sum(split) != data.crops_per_class:
        held_out = max(1, round(data.crops_per_class * 100 / 954))
        suggestion = (data.crops_per_class - 2 * held_out, held_out, held_out)
        yield (
            f"data.split={split} sums to {sum(split)}, and data.crops_per_class is "
            f"{data.crops_per_class}; for instance "
            f"--config.data.split={','.join(map(str, suggestion))}"
        )
    if data.split_by not in ("field", "channel", "crop"):
        try:
            compile_group_pattern(data.split_by)
        except Error as error:
            yield str(error)
    if len(data.border) != 4 or not all(isinstance(n, int) and n >= 0 for n in data.border):
        yield (
            f"data.border={tuple(data.border)} must be four whole numbers: top, right, bottom, left"
        )
    if not 0 <= data.min_foreground <= 1:
        yield f"data.min_foreground={data.min_foreground!r} must be from 0 to 1"
    try:
        parse_plane(data.plane)
    except Error as error:
        yield str(error)
    yield from one_of("data.normalize", data.normalize, ("auto", "imagenet", "percentile"))
    if not 0 <= data.augment.intensity < 1:
        yield f"data.augment.intensity={data.augment.intensity!r} must be from 0 to below 1"

    if not optim.learning_rate > 0:
        yield f"optim.learning_rate={optim.learning_rate!r} must be above 0"
    if not 0 <= optim.momentum < 1:
        yield f"optim.momentum={optim.momentum!r} must be from 0 to below 1"
    yield from at_least("optim.weight_decay", optim.weight_decay, 0)
    yield from one_of("optim.schedule", optim.schedule, ("constant", "cosine"))
    if not 0 <= optim.label_smoothing < 1:
        yield f"optim.label_smoothing={optim.label_smoothing!r} must be from 0 to below 1"
    for pattern in optim.freeze:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            yield f"optim.freeze: {pattern!r} is not a regular expression ({error})"
        else:
            if (
                config.init_conv1 == "fresh"
                and config.init != "random"
                and not optim.freeze_epochs
                and re.match(pattern, "conv1/kernel")
            ):
                yield (
                    f"optim.freeze: {pattern!r} would keep the random kernels of init_conv1=fresh; "
                    "leave conv1 out, for instance --config.optim.freeze='(?!conv1|bn1|fc)'"
                )
    yield from at_least("optim.freeze_epochs", optim.freeze_epochs, 0)
    if optim.freeze_epochs and not optim.freeze:
        yield "optim.freeze_epochs is set and optim.freeze is empty; say what to freeze"
    elif optim.freeze and optim.freeze_epochs >= config.train.num_epochs:
        yield (
            f"optim.freeze_epochs={optim.freeze_epochs} leaves no epoch of "
            f"{config.train.num_epochs} for the rest; use 0 to freeze for the whole run"
        )
    try:
        parse_multipliers(optim.multipliers)
    except Error as error:
        yield str(error)
    yield from one_of("optim.class_weights", optim.class_weights, ("none", "balanced"))
    yield from at_least("train.batch_size", config.train.batch_size, 2)
    yield from at_least("train.num_epochs", config.train.num_epochs, 1)
    yield from at_least("checkpoint.every_steps", config.checkpoint.every_steps, 0)
