"""Makes tests/models/parity_reference.npz: what torchvision's ResNets do with known tensors.

    pip install -e '.[bench]'
    python -m tools.make_parity_reference

No weights are stored: every tensor gets values from a generator seeded by its name
(`tests/models/seeded_tensors.py`). For each depth and image size the file holds the logits and,
after each stage, mean, standard deviation and 256 values of the activation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.seeded_tensors import (
    NUM_CLASSES,
    SIZES,
    STAGES,
    seeded_image,
    seeded_tensor,
    summarize,
)
from tools.torchvision_import import import_torchvision

_PATH = Path(__file__).parents[1] / "tests" / "models" / "parity_reference.npz"


def _keep(outputs: dict[str, Any], stage: str, _module: Any, _inputs: Any, output: Any) -> None:
    outputs[stage] = output


def main() -> None:
    """Runs all depths at all sizes, in float32 on the CPU, and writes the file."""
    import torch

    models = import_torchvision().models
    arrays = {}
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        model = getattr(models, name)(num_classes=NUM_CLASSES).eval()
        model.load_state_dict(
            {
                key: torch.from_numpy(seeded_tensor(key, tuple(tensor.shape)))
                for key, tensor in model.state_dict().items()
                if not key.endswith("num_batches_tracked")
            }
        )
        outputs: dict[str, Any] = {}
        for stage in STAGES:
            module = model.maxpool if stage == "stem" else getattr(model, stage)
            module.register_forward_hook(partial(_keep, outputs, stage))
        for size in SIZES:
            with torch.inference_mode():
                logits = model(torch.from_numpy(seeded_image(size)))
            arrays[f"{name}/{size}/logits"] = logits.numpy()
            for stage in STAGES:
                summary = summarize(stage, outputs[stage].numpy())
                arrays[f"{name}/{size}/{stage}"] = summary
                print(f"{name} {size} {stage}: mean {summary[0]:.2f}, deviation {summary[1]:.2f}")
            print(f"{name} {size} logits: deviation {logits.std():.2f}")
    np.savez_compressed(_PATH, **arrays)
    print(f"wrote {_PATH.name}: {_PATH.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
