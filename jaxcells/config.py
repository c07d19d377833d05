"""Configs: found by name or path, checked before anything runs, compared with an earlier run's.

`configs/default.py` has every key with its default, whose type it keeps. A key that is not there is
not known; what else a value must be stands in the tables below.
"""

import dataclasses
import itertools
import math
import re
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcells.files import Error

# They travel with the package; in a clone they stand beside it.
_INSTALLED = Path(__file__).parent / "configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def _one_of(*choices: str) -> tuple[Callable[[Any], object], str]:
    return choices.__contains__, f"one of {', '.join(choices)}"


def _is_expression(text: object) -> bool:
    try:
        return bool(re.compile(str(text)))
    except re.error:
        return False


def _whole(number: int, least: int) -> Callable[[Any], bool]:
    return lambda x: len(x) == number and all(isinstance(n, int) and n >= least for n in x)


_SOURCE = re.compile(r"|folder|sample|tfds:.+")
_SHEET = re.compile(r"|.+\.[ct]sv", re.IGNORECASE)
_MUST_BE: dict[str, tuple[Callable[[Any], object], str]] = {
    "init": (
        lambda x: x in ("imagenet", "random") or (x and Path(x).expanduser().exists()),
        "imagenet, random, or a file or workdir that is there",
    ),
    "init_conv1": _one_of("adapt", "fresh"),
    "model.dtype": _one_of("float32", "bfloat16"),
    "data.normalize": _one_of("auto", "imagenet", "percentile"),
    "optim.schedule": _one_of("constant", "cosine"),
    "optim.class_weights": _one_of("none", "balanced"),
    "seed": (lambda x: 0 <= x < 2**32, f"from 0 to {2**32 - 1}"),
    "data.seed": (lambda x: -1 <= x < 2**32, f"from 0 to {2**32 - 1}, or -1 for that of the run"),
    "model.width": (lambda x: 1 <= x <= 1024, "from 1 to 1024"),
    "data.source": (_SOURCE.fullmatch, "folder, sample, tfds:NAME or empty"),
    "data.sheet": (_SHEET.fullmatch, "a .csv or .tsv file (save a spreadsheet as CSV in UTF-8)"),
    "data.crops_per_class": (lambda x: x == "all" or str(x).isdecimal(), "a whole number or all"),
    "data.crop_size": (lambda x: x == 0 or x >= 32, "32 or more, or 0 to use images whole"),
    "data.split": (_whole(3, 1), "three whole numbers of 1 or more: train, val, test"),
    "data.border": (_whole(4, 0), "four whole numbers: top, right, bottom, left"),
    "data.fraction": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "data.split_by": (
        lambda x: x in ("field", "channel", "crop") or (_is_expression(x) and re.compile(x).groups),
        "field, channel, crop or a regular expression whose group 1 is the group",
    ),
    "data.batch_by": (
        lambda x: not x or (_is_expression(x) and re.compile(x).groups),
        "a regular expression whose group 1 is the batch, or empty",
    ),
    "data.exclude": (_is_expression, "a regular expression, or empty"),
    "data.min_foreground": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "data.augment.intensity": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optim.learning_rate": (lambda x: 0 < x < math.inf, "a finite number above 0"),
    "optim.momentum": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optim.weight_decay": (lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    "optim.label_smoothing": (lambda x: 0 <= x < 1, "from 0 to below 1"),
    "optim.freeze": (lambda x: all(map(_is_expression, x)), "regular expressions"),
    "optim.freeze_epochs": (lambda x: x >= 0, "0 or more"),
    "train.batch_size": (lambda x: x >= 2, "2 or more"),
    "train.num_epochs": (lambda x: x >= 1, "1 or more"),
    "checkpoint.every_steps": (lambda x: x >= 0, "0 or more"),
}


def find_config(name: str, folder: Path = SHIPPED) -> Path:
    """Returns the file of a config: a path, or a name, such as "resnet34".

    Args:
      name: what is looked for.
      folder: where files of that name are looked for, before ours.

    Raises:
      Error: there is no such file.
    """
    for path in (folder / f"{name}.py", Path(name), SHIPPED / f"{name}.py"):
        if path.is_file():
            return path
    ours = ", ".join(sorted(path.stem for path in SHIPPED.glob("[!_]*.py")))
    raise Error(f"there is no file {name}, nor a config of ours of that name; ours are {ours}")


def load_config(path: Path) -> ConfigDict:
    """Returns what `get_config()` of a file gives.

    There, `from configs import NAME` finds files of its own folder, and after them ours.

    Raises:
      Error: the file has no such function.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    package = types.ModuleType("configs")
    package.__path__ = [str(path.parent.resolve()), str(SHIPPED)]
    sys.modules["configs"] = package
    defined = runpy.run_path(str(path))
    if "get_config" not in defined:
        raise Error(f"{path}: the file defines no get_config(); see configs/default.py")
    config: ConfigDict = defined["get_config"]()
    return config


def default_config() -> ConfigDict:
    """Returns every key with its default: the recipe of the reference study."""
    return load_config(SHIPPED / "default.py")


def validate(config: ConfigDict) -> None:
    """Checks every key, and every value that can be checked without touching images or devices.

    Raises:
      Error: lists all mistakes at once, a line each.
    """
    present, known = flatten(config), flatten(default_config())
    mistakes = [f"{key} is not a key; see configs/default.py" for key in present.keys() - known]
    mistakes += [f"{key} is missing; see configs/default.py" for key in known.keys() - present]
    if not mistakes:
        wrong = {key: text for key, (fits, text) in _MUST_BE.items() if not fits(present[key])}
        mistakes = [f"{key}={present[key]!r} must be {text}" for key, text in wrong.items()]
        mistakes += _contradictions(config, wrong.keys())
    if mistakes:
        number = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        raise Error(f"the config has {number}:\n  " + "\n  ".join(sorted(mistakes)))


def _contradictions(config: ConfigDict, wrong: Set[str]) -> Iterator[str]:
    """What values may not be together, wrong ones apart, and values that other modules parse."""
    # Help and wrong flags need not wait for NumPy and readers of images.
    from jaxcells.data.planes import parse_plane
    from jaxcells.data.splits import parse_fold

    data, optim, model = config.data, config.optim, config.model
    parsed: dict[Any, Any] = {parse_plane: data.plane, parse_multipliers: optim.multipliers}
    if data.fold:
        parsed[parse_fold] = data.fold
    for parse, value in parsed.items():
        try:
            parse(value)
        except Error as error:
            yield str(error)
    if config.init == "imagenet" and model.width != 64:
        yield f"model.width={model.width} does not fit init=imagenet, whose width is 64"
    if data.sheet and (data.root or data.source):
        yield "data.sheet says where the images are; leave data.root and data.source empty"
    if data.mask and (data.min_foreground or not data.crop_size):
        yield "data.mask centres crops on cells: set data.crop_size, and data.min_foreground=0"
    if data.source == "folder" and not data.root:
        yield "data.source='folder' needs a folder; set data.root=FOLDER"
    unclear = data.crops_per_class == "all" or {"data.split", "data.crops_per_class"} & wrong
    if data.crop_size and not unclear and sum(data.split) != data.crops_per_class:
        held_out = max(1, round(data.crops_per_class * 100 / 954))
        suggestion = f"{data.crops_per_class - 2 * held_out},{held_out},{held_out}"
        yield (
            f"data.split={tuple(data.split)} sums to {sum(data.split)}, and data.crops_per_class "
            f"is {data.crops_per_class}; for instance data.split={suggestion}"
        )
    if "batch" in data.fold and not data.batch_by:
        yield f"data.fold={data.fold!r} needs data.batch_by, which finds the batch of an image"
    if data.fold and data.crop_size and data.split_by == "crop":
        yield "data.fold leaves whole groups out, which data.split_by=crop divides; use field"
    if optim.freeze_epochs and not optim.freeze:
        yield "optim.freeze_epochs is set and optim.freeze is empty; say what to freeze"
    if optim.freeze and optim.freeze_epochs >= config.train.num_epochs:
        yield (
            f"optim.freeze_epochs={optim.freeze_epochs} leaves no epoch of "
            f"{config.train.num_epochs} for the rest; use 0 to freeze for the whole run"
        )


def data_source(config: ConfigDict) -> str:
    """Returns "folder" (with a sheet too), "sample" or "tfds:NAME"."""
    return config.data.source or ("folder" if config.data.root or config.data.sheet else "sample")


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
        pattern, _, number = str(text).rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not pattern or not _is_expression(pattern) or not 0 <= factor < math.inf:
            raise Error(
                f"optim.multipliers: {text!r} must be a regular expression, =, and a factor of 0 "
                "or more; for instance optim.multipliers='fc=10'"
            )
        pairs.append((pattern, factor))
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
    `default.py`, and every seed. With the key `fractions` there is one for each share of the
    training images, see `data.fraction`; all are trained for as many steps, in more epochs of fewer
    crops.

    Args:
      config: a config with the keys `experiments` and `seeds`.
      folder: where the config files of the experiments are; ours are found too.

    Returns:
      The config without these keys, and the experiments, all validated.

    Raises:
      Error: lists what is wrong with which experiment.
    """
    base, (listed, seeds, fractions) = _without(config, "experiments", "seeds", "fractions")
    if listed is None or seeds is None:
        raise Error("a comparison needs the keys experiments and seeds, as configs/compare.py has")
    # On the command line, "a,b" arrives as one text.
    texts = [listed] if isinstance(listed, str) else listed
    names = [name.strip() for text in texts for name in str(text).split(",") if name.strip()]
    seeds = list(seeds) if isinstance(seeds, tuple | list) else [seeds]
    fractions = fractions or ()
    validate(base)
    plain = all(re.fullmatch(r"\w[\w.-]*", name) for name in names)  # a folder is named so
    if not names or len(set(names)) < len(names) or not plain:
        raise Error(f"experiments={','.join(names)!r} must be names of configs, each once")
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise Error(f"seeds={seeds} must be one or more whole numbers, each once")
    if len(set(fractions)) < len(fractions) or not all(0 < share <= 1 for share in fractions):
        raise Error(f"fractions={fractions} must be above 0 and at most 1, each once")
    names_of = {share: f"_fraction{share:g}" for share in fractions} or {base.data.fraction: ""}

    shared = flatten(base)
    experiments, mistakes = [], []
    for name in names:
        own = load_config(find_config(name, folder))
        changes = changed_keys(own)
        changes["model.name"] = own.model.name  # whatever the comparison's own is
        for key, value in list(changes.items()):
            own_keys = re.match(r"data\.(augment|normalize|fraction)", key)
            if key.startswith("data.") and not own_keys and value != shared.get(key):
                mistakes.append(
                    f"{name}: {key}={value!r} would need other crops than the comparison's "
                    f"{shared.get(key)!r}; set it in the config of the comparison"
                )
                del changes[key]  # it may be of another type
        for (share, ending), seed in itertools.product(names_of.items(), seeds):
            config = base.copy_and_resolve_references()
            config.update_from_flattened_dict(changes)
            config.seed, config.data.seed = seed, data_seed(base)
            if fractions:
                config.data.fraction = share
                config.train.num_epochs = round(config.train.num_epochs / share)
                config.optim.freeze_epochs = round(config.optim.freeze_epochs / share)
            experiments.append(Experiment(name + ending, seed, config))
        try:
            validate(config)
        except Error as error:
            mistakes.append(f"{name}: {error}")
    if mistakes:
        raise Error("the comparison has mistakes:\n  " + "\n  ".join(mistakes))
    return base, experiments


def expand_cross_validation(config: ConfigDict, folder: Path) -> tuple[ConfigDict, int, bool]:
    """Turns the config of a cross-validation into that of its runs.

    This is the experiment's, with all in which the cross-validation's differs from `default.py`.

    Args:
      config: a config with the keys `experiment`, `folds` and `keep_test`.
      folder: where the config file of the experiment is; ours are found too.

    Returns:
      The config of a run, whose `data.fold` is to be set, validated; and both other keys.

    Raises:
      Error: lists what is wrong.
    """
    base, (name, folds, keep_test) = _without(config, "experiment", "folds", "keep_test")
    if name is None or type(folds) is not int or folds < 0 or folds == 1 or base.data.fold:
        raise Error(
            "a cross-validation needs the keys experiment, folds (2 or more, or 0 to leave out one "
            "group after another) and keep_test, and no data.fold; see configs/cross_validate.py"
        )
    run = load_config(find_config(name, folder)).unlock()
    run.update_from_flattened_dict(changed_keys(base))
    validate(run)
    return run, folds, keep_test


def _without(config: ConfigDict, *keys: str) -> tuple[ConfigDict, list[Any]]:
    """Returns a copy without some keys, and their values; None for one that is not there."""
    copy = config.copy_and_resolve_references().unlock()
    values = [copy.get(key) for key in keys]
    for key in set(keys) & set(copy):
        del copy[key]
    return copy, values


def changed_keys(config: ConfigDict) -> dict[str, Any]:
    """Returns the values that differ from the default, by full key."""
    default = flatten(default_config())
    return {key: value for key, value in flatten(config).items() if value != default.get(key)}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns the keys in which two configs differ, with both values.

    `data.root` and `data.sheet` are left out: a folder may move, and its images are compared with
    the crop set.
    """
    before, after = flatten(old), flatten(new)
    for values in (before, after):
        values["data.root"] = values["data.sheet"] = ""
    return [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns the values by full key, such as "data.root"; lists, as JSON makes them, as tuples."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, tuple(value) if isinstance(value, list) else value

    return dict(walk(config.to_dict(), ""))
