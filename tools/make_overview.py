"""Draws the picture of the README: crops of the built-in sample beside the demo's confusion matrix.

python launch.py --config configs/demo.py && python tools/make_overview.py
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxcells.data.arrays import open_arrays
from jaxcells.data.crop_set import open_crop_set
from jaxcells.evaluation.figures import plot_confusion, plot_crops_sheet

_HEIGHT = 360
_COLUMNS = 5


def main() -> None:
    """Reads a finished workdir and writes docs/overview.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/overview.png"))
    args = parser.parse_args()

    crop_set = open_crop_set(args.workdir / "crops")
    test = open_arrays(crop_set, args.workdir / "arrays")["test"]
    results = json.loads((args.workdir / "results.json").read_text(encoding="utf-8"))["test"]
    # As far apart in the split as can be: other fields, other channels.
    sheet = {
        name: [
            test.images[i] for i in np.linspace(*_ends(test.labels, label), _COLUMNS).astype(int)
        ]
        for label, name in enumerate(crop_set.class_names)
    }
    low, high = results["interval_95"]["accuracy"]
    title = f"accuracy {results['accuracy']:.3f} ({low:.3f} to {high:.3f})"
    parts = [args.out.with_suffix(".crops.png"), args.out.with_suffix(".confusion.png")]
    plot_crops_sheet(sheet, parts[0], title="crops of the test split")
    plot_confusion(results["confusion_matrix"], crop_set.class_names, parts[1], title=title)
    pictures = [Image.open(part).convert("RGB") for part in parts]
    scaled = [p.resize((round(p.width * _HEIGHT / p.height), _HEIGHT)) for p in pictures]
    overview = Image.new("RGB", (sum(p.width for p in scaled), _HEIGHT), "white")
    overview.paste(scaled[0], (0, 0))
    overview.paste(scaled[1], (scaled[0].width, 0))
    overview.quantize(128).save(args.out, optimize=True)
    for part in parts:
        part.unlink()


def _ends(labels: np.ndarray, label: int) -> tuple[int, int]:
    numbers = np.flatnonzero(labels == label)
    return int(numbers[0]), int(numbers[-1])


if __name__ == "__main__":
    main()
