r"""Fine-tuning the end of a network: features kept, computed in every step, and torchvision.

    pip install -e '.[bench]'
    python -m benchmarks.frozen_start --model resnet34 --batch_size 32 --image_size 200

Two tasks: all but the last stage and the head frozen, and all but the head (a linear probe). The
contestants are our training step on kept features, our training step on images with the same
parameters frozen, and torchvision's network with these parameters out of the gradient and their
modules in evaluation mode. They take turns; the medians, and the medians of the ratios within a
round, are appended to benchmarks/RESULTS.md, with what computing the features takes once.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.throughput import append_to_results, circumstances, load_before
from jaxcells.data.loader import train_batches
from jaxcells.data.normalization import IMAGENET_MEAN, IMAGENET_STD, fit_normalization
from jaxcells.models import create_model
from jaxcells.training import mesh, optim, state, steps
from jaxcells.training.features import Inputs, make_inputs
from jaxcells.training.recipe import Recipe
from tools.torchvision_import import import_torchvision

_TASKS = {"last stage and head": "(?!layer4|fc)", "linear probe": "(?!fc)"}
_NUM_CLASSES = 4
_SGD = {"learning_rate": 0.001, "momentum": 0.9}

Train = Callable[[int], None]


def ours(
    args: argparse.Namespace, images: np.ndarray, labels: np.ndarray, pattern: str
) -> tuple[dict[str, Train], float]:
    """Our steps on kept features and on images, and images per second of computing the former.

    Batches come from memory-mapped or plain arrays through the loader, as in a run.
    """
    devices = mesh.make_mesh(jax.devices()[:1])
    normalize = fit_normalization(images, "imagenet")
    model = create_model(args.model, num_classes=_NUM_CLASSES)
    schedule = optim.make_schedule("constant", _SGD["learning_rate"], 1)
    tx = optim.make_optimizer(schedule, momentum=_SGD["momentum"], freeze=(pattern,))
    fresh = state.create_train_state(
        model, tx, sample_shape=(1, *images.shape[1:]), key=jax.random.key(0)
    )
    recipe = Recipe({}, 0, args.batch_size, 1, _SGD["learning_rate"], freeze=(pattern,))
    crops = Inputs(images, images[:0], normalize)
    folder = Path(tempfile.mkdtemp()) / "features"
    features = make_inputs(model, fresh.variables, crops, recipe, recipe.num_epochs, folder)
    assert features is not crops, "the disk has no room"

    def contestant(inputs: Inputs) -> Train:
        apply_fn = functools.partial(model.apply, first=inputs.first_segment)
        current = mesh.replicate(fresh.replace(apply_fn=apply_fn), devices)
        train_step = steps.make_train_step(inputs.normalize, freeze=(pattern,))
        step = mesh.jit_train_step(train_step, devices)
        batches = train_batches(inputs.train, labels, args.batch_size, seed=0)
        key = jax.random.key(0)

        def train(num_steps: int) -> None:
            nonlocal current
            for _ in range(num_steps):
                current, _ = step(current, mesh.shard_batch(next(batches), devices), key)
            jax.block_until_ready(current)

        return train

    return {
        "jaxcells, features kept": contestant(features),
        "jaxcells, computed in every step": contestant(crops),
    }, len(images) / features.features_s


def theirs(args: argparse.Namespace, images: np.ndarray, labels: np.ndarray, pattern: str) -> Train:
    """The same with torchvision's network, written as PyTorch's transfer-learning guide does."""
    import re

    import torch
    from torch.nn import functional

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    model = getattr(import_torchvision().models, args.model)(num_classes=_NUM_CLASSES)
    model = model.to(device, memory_format=torch.channels_last)
    frozen = [re.match(pattern, name) is not None for name, _ in model.named_parameters()]
    for flag, parameter in zip(frozen, model.parameters(), strict=True):
        parameter.requires_grad = not flag
    model.train()
    for name, module in model.named_children():
        module.train(re.match(pattern, name) is None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=_SGD["learning_rate"], momentum=_SGD["momentum"])
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    deviation = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    batches = train_batches(images, labels, args.batch_size, seed=0)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            batch = next(batches)
            inputs = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
            inputs = (inputs.float() / 255 - mean) / deviation
            optimizer.zero_grad()
            target = torch.from_numpy(batch["label"]).to(device).long()
            functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def measure(rivals: dict[str, Train], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Lets all take turns and returns images per second `[rounds]` of each."""
    for train in rivals.values():
        train(2)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(args.rounds):
        for name, train in rivals.items():
            start = time.perf_counter()
            train(args.steps)
            seconds[name].append(time.perf_counter() - start)
    return {n: args.batch_size * args.steps / np.array(values) for n, values in seconds.items()}


def report(
    args: argparse.Namespace, found: dict[str, tuple[dict[str, np.ndarray], float]], load: float
) -> str:
    """Writes the section of RESULTS.md."""
    lines = []
    for task, (rates, once) in found.items():
        lines += [
            "",
            f"| {task} | images per second, training | kept is faster by |",
            "|---|---|---|",
        ]
        first = next(iter(rates.values()))
        for name, rate in rates.items():
            ratio = first / rate
            shown = (
                ""
                if rate is first
                else f"{np.median(ratio):.1f} ({ratio.min():.1f}–{ratio.max():.1f})"
            )
            lines.append(f"| {name} | {np.median(rate):.1f} | {shown} |")
        lines.append(f"| computing the features, once | {once:.1f} | |")
    size = args.image_size
    return "\n".join(
        [
            "",
            f"## Frozen start: {args.model}, batch {args.batch_size}, {size}x{size}, float32",
            "",
            *circumstances("benchmarks.frozen_start", load),
            "",
            f"Medians of {args.rounds} rounds of {args.steps} steps on {args.num_images} images.",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen_start", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=200)
    parser.add_argument("--num_images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--no_torch", action="store_true", help="measure ours alone")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.num_images, args.image_size, args.image_size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, _NUM_CLASSES, args.num_images, np.int32)
    load = load_before()
    found = {}
    for task, pattern in _TASKS.items():
        rivals, once = ours(args, images, labels, pattern)
        if not args.no_torch:
            rivals["torchvision, eager"] = theirs(args, images, labels, pattern)
        found[task] = measure(rivals, args), once
    append_to_results(report(args, found, load))


if __name__ == "__main__":
    main()
