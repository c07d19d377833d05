"""report.html: a run, a comparison or a cross-validation on one page that needs no network.

What is said stands in `templates/`, under conditions on what was done; of what is not known nothing
is said. All figures come from the files of the workdir.
"""

import base64
import contextlib
import dataclasses
import io
import itertools
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
from jaxcells.evaluation import report_figures
from jaxcells.evaluation.bootstrap import Interval
from jaxcells.evaluation.checks import Check
from jaxcells.evaluation.comparison_table import Table
from jaxcells.evaluation.evidence import Evidence
from jaxcells.evaluation.figures import displayed, draw_curves
from jaxcells.evaluation.metrics import Score, SplitMetrics
from jaxcells.evaluation.predictions import Predictions
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
      test: figures of the tested crops.
      evidence: what stands beside them.
      checks: the lights.
      predictions: of the tested crops.
      images: the pixels of these crops, each [H, W, C].
      crop_set: the crops of the run, or of one of the folds.
      audit: of that crop set.
      curves: the records of metrics.jsonl; empty where several networks tested.
      config: all keys, nested.
      changes: keys that differ from the default, by their full name.
      results: of the run; of the chosen one, or of one of the folds.
      opened: how often its test split has been opened by now.
      tested_before_choice: see `Choice`.
      parts: sentences and tables of a comparison or cross-validation.
      pictures: its own figures, by what they show.
    """

    kind: str
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
    results: RunResults
    opened: int = 1
    tested_before_choice: Sequence[str] = ()
    parts: Sequence[str | Table] = ()
    pictures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(path: Path, study: Study) -> None:
    """Writes the page: a file that is whole or not there, below 6 MB, with all it needs in it."""
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    templates = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {"counted": counted, "duration": duration, "figure": figure}
    templates.filters |= {"quote": shlex.quote, "shell": shlex.join}
    templates.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    sections = choose_crops(study.predictions)
    crops, scaled = _draw_crops(study, list(dict.fromkeys(itertools.chain(*sections.values()))))
    page = templates.get_template("report.html.j2").render(
        vars(study),
        as_svg=report_figures.as_svg,
        figures=_figures(study),
        sections=sections,
        crops=crops,
        scaled=scaled,
        thumbnails=dict(_draw_fields(study)),
    )
    with write_whole(path) as file:
        file.write(page)


def choose_crops(predictions: Predictions) -> dict[str, list[int]]:
    """Chooses what crops to show, by what is told with them; the same crop may serve twice.

    Returns:
      Numbers of crops. "errors": wrong with the highest probability; "borderline": the two most
      probable classes are nearest to each other; "typical": of every class, right with a
      probability next to the median; "more": all, the cells of the confusion matrix in turn.
    """
    labels, predicted = predictions.labels, predictions.predicted
    *_, second, sure = np.sort(predictions.calibrated, axis=1).T
    wrong, cells = labels != predicted, labels * len(predictions.class_names) + predicted
    typical: list[int] = []
    for label in np.unique(labels[~wrong]):
        right = np.flatnonzero(~wrong & (labels == label))
        typical += right[np.argsort(np.abs(sure[right] - np.median(sure[right])))][
            :_PER_CLASS
        ].tolist()
    rng = np.random.default_rng(0)
    by_cell = [rng.permutation(np.flatnonzero(cells == cell)).tolist() for cell in np.unique(cells)]
    in_turn = itertools.chain(*itertools.zip_longest(*by_cell))
    return {
        "errors": [n for n in np.argsort(-sure).tolist() if wrong[n]][:_PER_SECTION],
        "borderline": np.argsort(sure - second)[:_PER_SECTION].tolist(),
        "typical": typical,
        "more": [n for n in in_turn if n is not None],
    }


def figure(value: float | None, interval: Interval = (None, None)) -> str:
    """0.945 (0.884–0.989), or 0.945 without an interval; a dash for 0/0."""
    shown = ["" if x is None else f"{x:z.3f}".replace("-", "−") for x in (value, *interval)]
    return (f"{shown[0]} ({shown[1]}–{shown[2]})" if shown[1] else shown[0]) or "–"


def _figures(study: Study) -> dict[str, Figure]:
    """Every picture that there is what it takes for, by name."""
    predictions, evidence = study.predictions, study.evidence
    classes = {
        name: [Score(getattr(row, key), row.interval_95[key]) for key in _CLASS_FIGURES]
        for name, row in study.test.per_class.items()
    }
    drawn = {
        "classes": report_figures.draw_intervals(classes, ["recall", "precision", "F1"]),
        "roc": report_figures.draw_against_rest(predictions, "roc"),
        "precision_recall": report_figures.draw_against_rest(predictions, "precision_recall"),
        "reliability": report_figures.draw_reliability(evidence.reliability),
    }
    for kind, subsets in evidence.subsets.items():
        rows = {f"{subset.name} ({subset.num_crops})": [subset.accuracy] for subset in subsets}
        drawn[kind] = report_figures.draw_intervals(rows, ["accuracy"])
    if predictions.features is not None:
        drawn["features"] = report_figures.draw_feature_map(predictions)
    if study.curves:
        reached = evidence.baselines["brightness"].accuracy
        levels = {"chance": 1 / len(predictions.class_names), "brightness": reached}
        step = study.results.best_step
        drawn["curves"] = draw_curves(study.curves, levels, best_step=step, stacked=True)
    return drawn


def _draw_crops(study: Study, numbers: Sequence[int]) -> tuple[dict[int, str], str]:
    """Thumbnails of crops, as many as there is room for, by their number; and how scaled."""
    small = [_shrunk(study.images[number], _CROP_SIDE) for number in numbers[:_MOST_CROPS]]
    pixels, scaled = displayed(np.stack(small))
    urls = [_data_url(thumbnail) for thumbnail in pixels]
    room = np.cumsum([len(url) for url in urls]) <= _CROP_BYTES
    return dict(itertools.compress(zip(numbers, urls, strict=False), room)), scaled


def _draw_fields(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """Suspects and two tested fields of each class: thumbnail, shape, numbers of their crops.

    Those that are no longer where they were, or cannot be read, are left out.
    """
    sources, labels = study.predictions.sources, study.predictions.labels
    names = [suspect.field for suspect in study.evidence.suspects[: _MOST_FIELDS // 3]]
    for label in np.unique(labels):
        names += np.unique(sources[labels == label])[:2].tolist()
    for name in list(dict.fromkeys(names))[:_MOST_FIELDS]:
        with contextlib.suppress(Error, OSError):
            path = Path(study.crop_set.root, name)
            image = read_image(path, plane=study.crop_set.settings.plane)
            pixels, _ = displayed(_shrunk(image, _FIELD_SIDE)[None])
            rows = np.flatnonzero(sources == name).tolist()
            yield name, {"url": _data_url(pixels[0]), "shape": image.shape, "crops": rows}


def _shrunk(image: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """An image [H, W, C] with no side longer than that: means of squares, in its own dtype."""
    step = -(-max(image.shape[:2]) // side)
    rows, columns = (min(step, length) for length in image.shape[:2])  # a thin one has few
    height, width = image.shape[0] // rows, image.shape[1] // columns
    squares = image[: height * rows, : width * columns].reshape(height, rows, width, columns, -1)
    return squares.mean(axis=(1, 3)).astype(image.dtype)


def _data_url(pixels: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
