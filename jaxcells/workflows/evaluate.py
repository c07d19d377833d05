"""The verb `evaluate`: figures of a trained workdir on one split."""

import contextlib
import dataclasses

from jaxcells.data.arrays import open_arrays
from jaxcells.data.crop_set import open_crop_set, verify_pixels
from jaxcells.data.fields import SPLITS
from jaxcells.evaluation import predict
from jaxcells.evaluation.metrics import SplitMetrics, split_metrics, summary_table
from jaxcells.evaluation.predictions import write_predictions
from jaxcells.files import Error, Workdir, lock_workdir, logger, write_json
from jaxcells.training.checkpoints import Which
from jaxcells.training.loop import check_crops


def evaluate(workdir: Workdir, *, split: str, which: Which) -> SplitMetrics:
    """Evaluates a checkpoint of a workdir on one split; opening "test" is written to its history.

    Writes evaluation_<split>_step<N>.json and predictions_<split>_step<N>.csv.

    Args:
      workdir: of a run.
      split: "train", "val" or "test".
      which: a step, "latest" or "best".

    Returns:
      The split's figures, as in results.json.

    Raises:
      Error: not a workdir, no such checkpoint or split, or crops that changed.
    """
    if split not in SPLITS:
        raise Error(f"split={split}: there is no such split; use one of {', '.join(SPLITS)}")
    network = predict.load_network(workdir, which)
    meta = network.meta
    crop_set = open_crop_set(workdir.crops)
    check_crops(meta, crop_set, workdir)
    verify_pixels(crop_set)
    # Reading is safe beside a training, writing is not.
    with contextlib.nullcontext() if workdir.arrays.is_dir() else lock_workdir(workdir.path):
        arrays = open_arrays(crop_set, workdir.arrays)
    opened = predict.write_history(workdir, "evaluate", split, meta.step)
    if split == "test":
        logger.info("the test split of this run has now been opened %d times", opened)
    name = f"{split}_step{meta.step}"
    validation, _, _ = predict.predict_split(network, arrays["val"])
    calibration = predict.calibrate(network, validation, workdir)
    predictions, _, evaluate_s = predict.predict_split(network, arrays[split])
    predictions = calibration.apply(predictions)
    write_predictions(workdir.predictions(name), predictions)
    metrics = split_metrics(predictions, seed=meta.seed)
    more = {"checkpoint": meta.step, "evaluate_s": evaluate_s}
    write_json(workdir.evaluation(name), dataclasses.asdict(metrics) | more)
    print(summary_table(metrics, f"{split} split, checkpoint of step {meta.step}"))
    logger.info("written to %s", workdir.evaluation(name))
    return metrics
