"""report.html: a run, a comparison or a cross-validation on one page that needs no network.

What is said stands in `templates/`, most of it under conditions on what was done: of what cannot be
known nothing is said. Numbers come from the files of the run alone.
"""

import base64
import dataclasses
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import CropSet
from jaxcells.data.images import read_image
from jaxcells.evaluation.checks import Check
from jaxcells.evaluation.comparison_table import Table
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.figures import displayed, draw_curves
from jaxcells.evaluation.metrics import Interval, Score, SplitMetrics
from jaxcells.evaluation.predictions import Predictions
from jaxcells.evaluation.report_figures import (
    as_svg,
    draw_feature_map,
    draw_intervals,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
)
from jaxcells.evaluation.results import RunResults
from jaxcells.files import Error, write_whole
from jaxcells.text import counted, duration

_CROP_SIDE, _FIELD_SIDE = 112, 360  # pixels of thumbnails, at most
_MOST_CROPS, _MOST_FIELDS = 1000, 24
_CROP_BYTES = 3_000_000  # of all crops as text; the page is to stay below 6 MB
_PER_SECTION, _PER_CLASS = 12, 4
_CLASS_FIGURES = ("recall", "precision", "f1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a report is made from.

    Attributes:
      kind: "run", "comparison" or "cross_validation".
      title: of the page.
      test: figures of the tested crops.
      evidence: what stands beside them.
      checks: the lights.
      predictions: of the tested crops.
      images: the pixels of these crops, each [H, W, C].
      crop_set: the crops of the run; of one of the folds.
      audit: of that crop set.
      curves: the records of metrics.jsonl; empty where several networks were trained.
      config: all keys, nested.
      changes: keys that differ from the default, by their full name.
      command: what trains the network again.
      environment: versions and devices.
      results: of the run; of the chosen one, or of one of the folds.
      parts: sentences and tables of a comparison or cross-validation.
      pictures: figures of its own, by what they show.
    """

    kind: str
    title: str
    test: SplitMetrics
    evidence: Evidence
    checks: Sequence[Check]
    predictions: Predictions
    images: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]
    crop_set: CropSet
    audit: Audit
    curves: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    changes: Mapping[str, Any]
    command: str
    environment: Mapping[str, Any]
    results: RunResults
    parts: Sequence[str | Table] = ()
    pictures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(path: Path, study: Study) -> None:
    """Writes the page: a file that is whole or not there, below 6 MB, with all it needs in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"figure": _figure, "percent": _percent, "shell": shlex.join}
    environment.filters |= {"counted": counted, "duration": duration}
    chosen, crops, scaled = _crops(study)
    page = environment.get_template("report.html.j2").render(
        vars(study),
        figures=_figures(study),
        as_svg=as_svg,
        chosen=chosen,
        crops=crops,
        scaled=scaled,
        thumbnails=dict(_thumbnails(study)),
        shape=study.images[0].shape,
        placed=any(record.y or record.x for record in study.crop_set.records),
    )
    with write_whole(path) as file:
        file.write(page)


def _figures(study: Study) -> dict[str, Figure]:
    """Every picture that the study has what it takes for, by name."""
    predictions, evidence, test = study.predictions, study.evidence, study.test
    figures = {
        "roc": draw_roc(predictions),
        "precision_recall": draw_precision_recall(predictions),
        "reliability": draw_reliability(evidence.reliability),
    }
    classes = {
        name: [Score(getattr(row, key), row.interval_95[key]) for key in _CLASS_FIGURES]
        for name, row in test.per_class.items()
    }
    figures["classes"] = draw_intervals(classes, _CLASS_FIGURES, "share")
    for kind, subsets in evidence.subsets.items():
        rows = {f"{part.name} ({part.num_crops})": [part.accuracy] for part in subsets}
        figures[kind] = draw_intervals(rows, ["accuracy"], "accuracy")
    if predictions.features is not None:
        figures["by_class"] = draw_feature_map(predictions, fields=False)
        figures["by_field"] = draw_feature_map(predictions, fields=True)
    if study.curves:
        levels = {"chance": 1 / len(predictions.class_names)}
        levels["brightness"] = evidence.baselines["brightness"].accuracy
        step = study.results.best_step
        figures["curves"] = draw_curves(study.curves, best_step=step, stacked=True, **levels)
    return figures


def choose_crops(predictions: Predictions) -> dict[str, list[int]]:
    """Chooses what crops to show, by what is told with them; the same crop may serve twice.

    Returns:
      Numbers of crops. "errors": wrong with the highest probability; "borderline": the two most
      probable classes are nearest to each other; "typical": of every class, right with a
      probability next to the median; "more": all, the cells of the confusion matrix in turn.
    """
    labels, predicted = predictions.labels, predictions.predicted
    ordered = np.sort(predictions.calibrated, axis=1)
    sure, margin, right = ordered[:, -1], ordered[:, -1] - ordered[:, -2], labels == predicted
    typical: list[int] = []
    for label in np.unique(labels[right]):
        of_class = np.flatnonzero(right & (labels == label))
        from_median = np.abs(sure[of_class] - np.median(sure[of_class]))
        typical += of_class[np.argsort(from_median, kind="stable")[:_PER_CLASS]].tolist()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_cell = shuffled[np.lexsort((predicted[shuffled], labels[shuffled]))]
    cells = np.stack([labels, predicted])[:, by_cell]
    _, starts, counts = np.unique(cells, axis=1, return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(starts, counts)
    errors = np.argsort(-sure, kind="stable")
    return {
        "errors": errors[~right[errors]][:_PER_SECTION].tolist(),
        "borderline": np.argsort(margin, kind="stable")[:_PER_SECTION].tolist(),
        "typical": typical,
        "more": by_cell[np.argsort(turn, kind="stable")].tolist(),
    }


def _crops(study: Study) -> tuple[dict[str, list[int]], dict[int, dict[str, Any]], str]:
    """Chosen crops by what they tell, thumbnails with what is known of them, and their scaling."""
    predictions, sections = study.predictions, choose_crops(study.predictions)
    numbers = list(dict.fromkeys(n for chosen in sections.values() for n in chosen))[:_MOST_CROPS]
    pixels, scaled = displayed(np.stack([_shrunk(study.images[n], _CROP_SIDE) for n in numbers]))
    crops: dict[int, dict[str, Any]] = {}
    room = _CROP_BYTES
    for number, thumbnail in zip(numbers, pixels, strict=True):
        source = _data_url(thumbnail)
        room -= len(source)
        if room < 0:
            break
        label, guess = predictions.labels[number], predictions.predicted[number]
        crops[number] = {
            "source": source,
            "true": int(label),
            "guess": int(guess),
            "sure": float(predictions.calibrated[number, guess]),
            "of_label": float(predictions.calibrated[number, label]),
            "unknown": bool(predictions.unknown[number] > 0),
            "record": predictions.records[number],
        }
    told: set[int] = set()
    for name, chosen in sections.items():  # each crop stands once on the page
        sections[name] = [n for n in chosen if n in crops and n not in told]
        told |= set(sections[name])
    return sections, crops, scaled


def _thumbnails(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields that are still where they were: suspects, and two of each class, with their crops."""
    predictions, sources = study.predictions, study.predictions.sources
    wrong = predictions.labels != predictions.predicted
    names = [suspect.field for suspect in study.evidence.suspects[: _MOST_FIELDS // 3]]
    for label in range(len(predictions.class_names)):
        names += sorted(set(sources[predictions.labels == label].tolist()))[:2]
    for name in list(dict.fromkeys(names))[:_MOST_FIELDS]:
        path, rows = Path(study.crop_set.root, name), np.flatnonzero(sources == name)
        try:
            image = read_image(path, plane=study.crop_set.settings.plane)
        except (Error, OSError):
            continue  # the page says how many could be read
        pixels, _ = displayed(_shrunk(image, _FIELD_SIDE)[None])
        yield (
            name,
            {
                "source": _data_url(pixels[0]),
                "label": predictions.class_names[predictions.labels[rows[0]]],
                "shape": image.shape,
                "crops": [(predictions.records[n], bool(wrong[n])) for n in rows],
            },
        )


def _shrunk(image: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """An image [H, W, C] with no side longer than that: means of squares, in its own dtype."""
    step = -(-max(image.shape[:2]) // side)
    height, width = (length // step for length in image.shape[:2])
    squares = image[: height * step, : width * step].reshape(height, step, width, step, -1)
    return squares.mean(axis=(1, 3)).astype(image.dtype)


def _data_url(pixels: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(value: float | None, interval: Interval = (None, None)) -> str:
    """0.945 (0.884–0.989), 0.945, or a dash for 0/0."""
    if value is None:
        return "–"
    low, high = interval
    text = f"{value:z.3f}" if low is None else f"{value:z.3f} ({low:z.3f}–{high:z.3f})"
    return text.replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
