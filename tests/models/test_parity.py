"""Our networks against torchvision's, layer by layer, on weights made from their names.

What torchvision computes is in parity_reference.npz; tools/make_parity_reference.py made it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcells.models import create_model
from jaxcells.models.layers import MaxPool
from jaxcells.models.weights import load_pretrained, to_torch
from tests.models.seeded_tensors import (
    NUM_CLASSES,
    SIZES,
    STAGES,
    seeded_image,
    seeded_tensor,
    summarize,
)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).with_name("parity_reference.npz")) as arrays:
        return dict(arrays)


def _seeded_variables(model):
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    # A broadcast scalar stands for each tensor: only names and shapes are wanted of it.
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = {name: seeded_tensor(name, leaf.shape) for name, leaf in to_torch(hollow).items()}
    return load_pretrained(tensors, hollow)[0]


def _run(model, variables, image):
    """Returns the logits and the activation after each stage."""
    last_blocks = {
        f"layer{stage}_{blocks - 1}": f"layer{stage}"
        for stage, blocks in enumerate(model.stage_sizes, 1)
    }
    watched = {"bn1": "stem", **last_blocks}
    logits, captured = model.apply(
        variables,
        image,
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in watched and len(module.path) == 1,
    )
    activations = {
        stage: captured["intermediates"][name]["__call__"][0] for name, stage in watched.items()
    }
    activations["stem"] = MaxPool().apply({}, jax.nn.relu(activations["stem"]))
    return logits, activations


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_activations_and_logits_equal_torchvision(name, reference):
    model = create_model(name, num_classes=NUM_CLASSES)
    variables = _seeded_variables(model)
    # At 200, sides are odd in the last stages; 224 halves evenly to the end, whatever the depth.
    for size in SIZES if name == "resnet50" else SIZES[:1]:
        image = seeded_image(size).transpose(0, 2, 3, 1)
        # On a GPU, float32 products are otherwise taken in TF32, which has ten bits.
        with jax.default_matmul_precision("highest"):
            logits, activations = _run(model, variables, image)
        for stage in STAGES:
            np.testing.assert_allclose(
                summarize(stage, np.asarray(activations[stage]).transpose(0, 3, 1, 2)),
                reference[f"{name}/{size}/{stage}"],
                rtol=1e-4,
                atol=1e-4,
                err_msg=f"{name} at {size}x{size}, after {stage}",
            )
        np.testing.assert_allclose(
            logits,
            reference[f"{name}/{size}/logits"],
            rtol=1e-4,
            atol=1e-4,
            err_msg=f"{name} at {size}x{size}, logits",
        )
