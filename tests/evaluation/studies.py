"""A study made by hand, of which reports are written."""

import numpy as np

from jaxcells.config import default_config
from jaxcells.data.audit import Audit
from jaxcells.data.crop_set import CropRecord, CropSet
from jaxcells.data.crops import CropSettings
from jaxcells.evaluation.calibration import Calibration
from jaxcells.evaluation.checks import run_checks
from jaxcells.evaluation.evidence import gather_evidence
from jaxcells.evaluation.metrics import split_metrics
from jaxcells.evaluation.predictions import Predictions
from jaxcells.evaluation.report import Study
from jaxcells.evaluation.results import RunResults, Timing
from tests.data.folders import textured, write_image

NASTY = '<b>&"x'  # a folder may be called so
NAMES = (NASTY, "HeLa", "K562")
SIDE = 32

ENVIRONMENT = {
    "jaxcells": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux",
    "dependencies": {"jax": "0.10.1", "scikit-learn": "1.9.1"},
    "git_commit": None,
    "command": ["launch.py", "--config.data.root=my images"],
}


def make_study(root, *, names=NAMES, fields=6, crops=4, side=SIDE, **changed) -> Study:
    """A run whose every eighth crop is taken for the next class, of images that are there."""
    records = []
    for label, name in enumerate(names):
        for field in range(fields):
            source = f"class{label}/f{field}.png"
            path = root / source
            if not path.exists():
                write_image(path, textured(64, 80, 10 * label + field))
            records += [
                CropRecord(
                    f"c{crop}", name, "", source, source, 8 * (crop % 5), crop % 49, 0.5, "test", ""
                )
                for crop in range(crops)
            ]
    labels = np.repeat(np.arange(len(names)), fields * crops)
    guesses = (labels + (np.arange(len(labels)) % 8 == 3)) % len(names)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(labels), len(names))).astype(np.float32)
    logits[np.arange(len(labels)), guesses] += 5
    predictions = Predictions(
        records=tuple(records),
        class_names=tuple(names),
        logits=logits,
        temperature=np.full(len(labels), 1.5),
        unknown=np.where(np.arange(len(labels)) % 20 == 0, 0.1, -0.1),
        features=rng.normal(size=(len(labels), 8)).astype(np.float32) + labels[:, None],
        baselines={
            "majority": np.zeros_like(labels),
            "brightness": rng.integers(len(names), size=len(labels)),
            "background": rng.integers(len(names), size=len(labels)),
        },
    )
    test = split_metrics(predictions, seed=0)
    evidence = gather_evidence(predictions, seed=0)
    counts = {name: {"crops": fields * crops, "fields": fields} for name in names}
    audit = Audit(
        (),
        ("few <fields>",),
        dict.fromkeys(("train", "val", "test"), counts),
        {"val": 0.0, "test": 0.25},
    )
    config = default_config()
    config.update_from_flattened_dict(changed.pop("config", {}))
    settings = {key: config.data[key] for key in ("split_by", "border", "min_foreground")}
    crop_set = CropSet(
        directory=root,
        records=tuple(records),
        class_names=tuple(names),
        manifest_sha256="abc123",
        settings=CropSettings(0, side, 1, (1, 1, 1), **settings),
        root=str(root),
        sources={record.source: {} for record in records},
        came_split=False,
        field_kinds={},
        notes=("images are small",),
        split_by=config.data.split_by,
        num_folds=0,
    )
    curves = [
        {
            "step": epoch,
            "epoch": epoch,
            "split": split,
            "loss": 1 / epoch,
            "accuracy": 0.8,
            "balanced_accuracy": 0.1 * epoch,
        }
        for epoch in (1, 2, 3)
        for split in ("train", "val")
    ]
    results = RunResults(
        validation=test,
        test=test,
        test_opened=1,
        evidence=evidence,
        calibration=Calibration(3, 1.5, "largest softmax", -0.5, ""),
        init={"kind": "random", "source": None, "sha256": None},
        data={
            "source": "folder",
            "image": {"shape": [side, side, 1], "dtype": "uint8"},
            "normalization": {"kind": "imagenet"},
        },
        timing=Timing(*[1.0] * 9),
        memory={},
        best_step=3,
        num_steps=3,
        num_epochs=3,
        model=config.model.to_dict(),
        environment=ENVIRONMENT,
    )
    values = {
        "kind": "run",
        "test": test,
        "evidence": evidence,
        "checks": run_checks(test, evidence, audit, curves, config.data.split_by),
        "predictions": predictions,
        "images": rng.integers(0, 256, (len(labels), side, side, 1), np.uint8),
        "crop_set": crop_set,
        "audit": audit,
        "curves": curves,
        "config": config.to_dict(),
        "changes": {"optim.freeze": ("(?!fc)",)},
        "results": results,
    }
    return Study(**values | changed)
