"""What a network makes of crops of known class: all that figures and reports are made from."""

import dataclasses
import functools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from jaxcells.data.crop_set import CropRecord
from jaxcells.evaluation.bootstrap import Array, Ints, Split
from jaxcells.files import Error, write_csv

_ARRAYS = ("logits", "temperature", "unknown")
_OPTIONAL = ("features", "folds")
_BASELINE = "baseline_"  # before the name of a baseline, in the file


@dataclasses.dataclass(frozen=True)
class Predictions:
    """N crops of K classes, as one network sees them; or as the networks of several folds do.

    Attributes:
      records: their lines of the manifest.
      class_names: the position is the label.
      logits: float32 [N, K].
      temperature: float64 [N], what the logits are divided by to calibrate the probabilities.
      unknown: float64 [N], how far the unknown score is above its threshold: a crop with more than
        0 is called unknown.
      features: float32 [N, D], what the last layer sees; None if networks of several folds do.
      baselines: {name: int [N]}, what classifiers that see far less predict, see `baseline`.
      folds: int [N], the fold that tested a crop, from 1; None of a single network.
    """

    records: tuple[CropRecord, ...]
    class_names: tuple[str, ...]
    logits: npt.NDArray[np.float32]
    temperature: Array
    unknown: Array
    features: npt.NDArray[np.float32] | None
    baselines: Mapping[str, Ints] = dataclasses.field(default_factory=dict)
    folds: Ints | None = None

    @functools.cached_property
    def labels(self) -> Ints:
        """The true classes, int [N]."""
        return np.array([self.class_names.index(r.label) for r in self.records], np.int64)

    @functools.cached_property
    def predicted(self) -> Ints:
        """The most probable classes, int [N]; calibration does not change them."""
        return self.logits.argmax(axis=1)

    @functools.cached_property
    def probabilities(self) -> Array:
        """Those of the network as it was trained, [N, K]."""
        return softmax(self.logits.astype(np.float64), axis=1)

    @functools.cached_property
    def calibrated(self) -> Array:
        """Probabilities at the temperature, [N, K]."""
        return softmax(self.logits / self.temperature[:, None], axis=1)

    @property
    def groups(self) -> npt.NDArray[np.str_]:
        """The independent unit of every crop, [N]."""
        return np.array([record.group for record in self.records])

    @property
    def sources(self) -> npt.NDArray[np.str_]:
        """The image of every crop, [N]."""
        return np.array([record.source for record in self.records])

    def field_means(self, values: Array) -> tuple[Ints, Ints, Array]:
        """The first crop of every field [F], its number of crops [F], means [F, K] of [N, K]."""
        _, first, field = np.unique(self.sources, return_index=True, return_inverse=True)
        sums, counts = np.zeros((len(first), values.shape[1])), np.bincount(field)
        np.add.at(sums, field, values)
        return first, counts, sums / counts[:, None]

    def split(self, seed: int) -> Split:
        """What figures and their intervals are computed from; `seed` is of the bootstrap."""
        return Split(self.labels, self.groups, self.class_names, seed=seed)

    def rows(self) -> tuple[list[str], list[list[object]]]:
        """Header and rows of predictions_<split>.csv, one for each crop."""
        header = ["path", "label", "prediction", "source", "group", "unknown"]
        for kind in ("probability", "calibrated"):
            header += [f"{kind} {name}" for name in self.class_names]
        rows: list[list[object]] = []
        for number, record in enumerate(self.records):
            name, unknown = self.class_names[self.predicted[number]], self.unknown[number] > 0
            figures = [*self.probabilities[number], *self.calibrated[number]]
            origin = [record.crop, record.label, name, record.source, record.group]
            rows.append([*origin, "yes" if unknown else "no", *(f"{p:.6g}" for p in figures)])
        if self.folds is not None:
            header.append("fold")
            rows = [[*row, fold] for row, fold in zip(rows, self.folds.tolist(), strict=True)]
        return header, rows


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes `path`, a CSV with a row per crop for people, and beside it .npz with all arrays."""
    write_csv(path, *predictions.rows())
    arrays = {name: getattr(predictions, name) for name in (*_ARRAYS, *_OPTIONAL)}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    arrays |= {_BASELINE + name: classes for name, classes in predictions.baselines.items()}
    with open(path.with_suffix(".npz"), "wb") as file:
        np.savez(file, **arrays)


def read_predictions(
    path: Path, records: Sequence[CropRecord], class_names: Sequence[str]
) -> Predictions:
    """Reads what `write_predictions` wrote.

    Args:
      path: the CSV.
      records: the crops that were predicted, in the order of the manifest.
      class_names: the position is the label.

    Raises:
      Error: missing, damaged, or of another number of crops.
    """
    path = path.with_suffix(".npz")
    try:
        with open(path, "rb") as file:
            arrays: dict[str, Any] = dict(np.load(file))
        if len(arrays["logits"]) != len(records):
            raise ValueError(f"{len(arrays['logits'])} crops for {len(records)} of the manifest")
        own: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Error(
            f"{path}: missing or damaged ({error}); restore it, or delete results.json there and "
            "run the same command again"
        ) from error
    own |= {name: arrays.get(name) for name in _OPTIONAL}
    names = [name for name in arrays if name.startswith(_BASELINE)]
    baselines = {name.removeprefix(_BASELINE): arrays[name] for name in names}
    return Predictions(tuple(records), tuple(class_names), baselines=baselines, **own)
