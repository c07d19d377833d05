"""Scores by which crops of a class that was never trained on are told, each class left out in turn.

    python -m benchmarks.unknown_cells
    python -m benchmarks.unknown_cells --root FOLDER --name "blood-smear fields"

For every class, a network is trained on the others with the recipe of configs/demo.py. Then each
score ranks the test crops of the known classes and those of the left-out class; the area under the
ROC curve is how often a crop of the left-out class scores higher than one of a known class. Fields
of test crops were not trained on. The validation crops, of known classes alone, are what distances
are measured to. The last line is what a run does: at its threshold, the shares of the test crops of
known classes and of the left-out class that are called unknown. The table is appended to
benchmarks/RESULTS.md. With --workdir FOLDER, trainings are kept there and not repeated.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from benchmarks.throughput import append_to_results, circumstances, load_before
from jaxcells.config import find_config, load_config
from jaxcells.data.arrays import SplitArrays
from jaxcells.data.sample import write_sample
from jaxcells.evaluation.calibration import Calibration
from jaxcells.evaluation.predict import load_network, predict_split
from jaxcells.evaluation.predictions import Predictions
from jaxcells.files import Workdir, from_record, read_json
from jaxcells.text import markdown_table
from jaxcells.workflows.prepare import prepare_data
from jaxcells.workflows.train import train_and_evaluate


def scores(
    calibration: Calibration, validation: Predictions, crops: Predictions
) -> dict[str, np.ndarray]:
    """How little each crop looks like a known class [N], by the name of the score.

    Largest softmax: Hendrycks and Gimpel 2017; largest logit: Hendrycks et al. 2022; energy: Liu et
    al. 2020; Mahalanobis distance: Lee et al. 2018, with one covariance, shrunk (Ledoit and Wolf
    2004); nearest neighbours, of features scaled to length 1: Sun et al. 2022.
    """
    logits = crops.logits.astype(np.float64)
    calibrated = logits / calibration.temperature
    known, features = validation.features, crops.features
    assert known is not None
    assert features is not None
    labels = validation.labels
    means = np.stack([known[labels == k].mean(axis=0) for k in np.unique(labels)])
    precision = LedoitWolf(assume_centered=True).fit(known - means[labels]).precision_
    away = features[:, None] - means
    cosines = np.sort(normalize(features) @ normalize(known).T, axis=1)
    return {
        "largest softmax": -crops.probabilities.max(axis=1),
        "largest softmax, calibrated": logsumexp(calibrated, axis=1) - calibrated.max(axis=1),
        "largest logit": -logits.max(axis=1),
        "energy": -logsumexp(logits, axis=1),
        "energy, calibrated": -calibration.temperature * logsumexp(calibrated, axis=1),
        "distance to class means": np.linalg.norm(away, axis=2).min(axis=1),
        "the same, directions": -(normalize(features) @ normalize(means).T).max(axis=1),
        "Mahalanobis distance": np.einsum("nkd,de,nke->nk", away, precision, away).min(axis=1),
        "nearest neighbour": -cosines[:, -1],
        "5th nearest neighbour": -cosines[:, -5],
        "nearest of 50 crops a class (in use)": calibration.apply(crops).unknown,
    }


def leave_out(
    name: str, classes: list[Path], everything: SplitArrays, config: ConfigDict, folder: Path
) -> tuple[float, dict[str, float], list[float]]:
    """Trains without one class.

    Args:
      name: of the class.
      classes: folders of all classes.
      everything: test crops of all classes.
      config: the recipe.
      folder: where the run lies.

    Returns:
      Test balanced accuracy of the known classes; by name of the score the area under the ROC
      curve; and the shares of known and of left-out test crops that are called unknown.
    """
    images, workdir = folder / f"without {name}", Workdir(folder / f"run without {name}")
    images.mkdir(exist_ok=True)
    for path in classes:
        if path.name != name and not (images / path.name).exists():
            (images / path.name).symlink_to(path.resolve(), target_is_directory=True)
    config = config.copy_and_resolve_references()
    config.data.root = str(images)
    results = train_and_evaluate(config, workdir)
    calibration = from_record(Calibration, read_json(workdir.calibration), workdir.calibration)
    data, network = prepare_data(config, workdir), load_network(workdir)
    chosen = np.flatnonzero([record.label == name for record in everything.records])
    records = tuple(everything.records[n] for n in chosen)
    left_out = SplitArrays(everything.images[chosen], np.zeros(len(chosen), np.int32), records)
    splits = data.arrays["val"], data.arrays["test"], left_out
    validation, known, unknown = (predict_split(network, split)[0] for split in splits)
    low, high = (scores(calibration, validation, crops) for crops in (known, unknown))
    truth = np.repeat([0, 1], [len(known.records), len(unknown.records)])
    areas = {key: float(roc_auc_score(truth, np.append(low[key], high[key]))) for key in low}
    shares = [float((calibration.apply(crops).unknown > 0).mean()) for crops in (known, unknown)]
    return results.test.balanced_accuracy, areas, shares


def report(
    args: argparse.Namespace,
    found: dict[str, tuple[float, dict[str, float], list[float]]],
    load: float,
) -> str:
    """Writes the section of RESULTS.md."""
    accuracies, areas, shares = zip(*found.values(), strict=True)
    rows = []
    for score in areas[0]:
        values = [table[score] for table in areas]
        rows.append([score, *(f"{x:.3f}" for x in [*values, np.mean(values)])])
    pairs = [*shares, np.mean(shares, axis=0)]
    rows.append(["called unknown: known, left out", *(f"{a:.0%}, {b:.0%}" for a, b in pairs)])
    known = ", ".join(f"{name} {x:.3f}" for name, x in zip(found, accuracies, strict=True))
    options = f" --root FOLDER --name {args.name!r}" if args.root else ""
    return "\n".join(
        [
            "",
            f"## Unknown cells: {args.name}",
            "",
            *circumstances("benchmarks.unknown_cells", load)[:-1],
            f"    python -m benchmarks.unknown_cells{options}",
            "",
            "Area under the ROC curve by the class that was left out, one training each. Test "
            f"balanced accuracy of the other classes: {known}.",
            "",
            markdown_table(["score", *found, "mean"], rows),
            "",
        ]
    )


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unknown_cells", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--root", default="", help="folder of images; the built-in sample if absent"
    )
    parser.add_argument("--name", default="the built-in sample", help="of the data set")
    parser.add_argument(
        "--workdir", default="", help="keeps trainings; a temporary folder if absent"
    )
    args = parser.parse_args()

    load, folder = load_before(), Path(args.workdir or tempfile.mkdtemp())
    config = load_config(find_config("demo"))
    root = Path(args.root) if args.root else folder / "sample"
    if not args.root:
        write_sample(root)
    config.data.root = str(root)
    everything = prepare_data(config, Workdir(folder / "all")).arrays["test"]
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    found = {
        path.name: leave_out(path.name, classes, everything, config, folder) for path in classes
    }
    append_to_results(report(args, found, load))


if __name__ == "__main__":
    main()
