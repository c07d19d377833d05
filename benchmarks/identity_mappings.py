r"""1001 layers in one training step: compile time, step time and memory, beside the plain forms.

    python -m benchmarks.identity_mappings

The contestants train the same 1001-layer network of the same parameters: our scan over units, whose
convolutions state their gradients in the order that XLA's CPU convolution knows, and the same scan
with convolutions as JAX differentiates them. They take turns. Memory is the compiler's account of a
step; networks with the units one after another are too deep to compile whole, so theirs is taken of
fewer units and, linear in their number as it is, drawn out to 1001 layers. Results are appended to
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.throughput import append_to_results, circumstances, load_before
from jaxcells.data.normalization import fit_normalization
from jaxcells.models import create_model, layers
from jaxcells.models.scan_conv import convolve
from jaxcells.training import mesh, optim, state, steps

_NUM_CLASSES = 10
_FULL = 111  # units in each of three stages: 1001 layers


@contextlib.contextmanager
def plain_gradients() -> Iterator[None]:
    """While open, convolutions in a scan are those that JAX differentiates by itself."""
    with mock.patch.object(layers, "scan_convolve", convolve):
        yield


def compile_step(
    args: argparse.Namespace, batch: dict[str, np.ndarray], *, num_units: int, scan: bool
) -> tuple[Any, Any, float]:
    """Returns a compiled step, the state to start from, and the seconds of compiling."""
    devices = mesh.make_mesh(jax.devices()[:1])
    model = create_model("preact1001", num_classes=_NUM_CLASSES, dtype=args.dtype, scan=scan).clone(
        stage_sizes=(num_units,) * 3
    )
    schedule = optim.make_schedule("constant", 0.001, 1)
    current = mesh.replicate(
        state.create_train_state(
            model,
            optim.make_optimizer(schedule, momentum=0.9),
            sample_shape=batch["image"].shape,
            key=jax.random.key(0),
        ),
        devices,
    )
    normalize = fit_normalization(batch["image"], "imagenet")
    step = mesh.jit_train_step(steps.make_train_step(normalize), devices)
    start = time.perf_counter()
    compiled = step.lower(current, batch, jax.random.key(0)).compile()
    return compiled, current, time.perf_counter() - start


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.identity_mappings", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--unrolled", type=int, nargs="*", default=[2, 6, 18], help="units a stage")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, _NUM_CLASSES, args.batch_size, np.int32),
        "mask": np.ones(args.batch_size, np.float32),
    }
    load = load_before()
    key = jax.random.key(0)
    contestants = {}
    contestants["our scan"] = compile_step(args, batch, num_units=_FULL, scan=True)
    with plain_gradients():
        contestants["plain scan"] = compile_step(args, batch, num_units=_FULL, scan=True)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    states = {name: current for name, (_, current, _) in contestants.items()}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, (step, _, _) in contestants.items():
            start = time.perf_counter()
            states[name], sums = step(states[name], batch, key)
            losses[name].append(float(sums["loss"]))
            seconds[name].append(time.perf_counter() - start)

    rows = ["| 1001 layers | compile | step | memory of a step |", "|---|---|---|---|"]
    for name, (step, _, compiling) in contestants.items():
        size = mesh.bytes_of(step) / 1e6
        median = np.median(seconds[name])
        rows.append(f"| {name} | {compiling:.1f} s | {median:.2f} s | {size:.0f} MB |")
    ratio = np.array(seconds["plain scan"]) / np.array(seconds["our scan"])
    rows.append(
        f"| plain / ours | | {np.median(ratio):.1f} ({ratio.min():.1f}–{ratio.max():.1f}) | |"
    )

    rows += ["", "| units one after another | compile | memory of a step |", "|---|---|---|"]
    sizes = []
    for num_units in args.unrolled:
        step, _, compiling = compile_step(args, batch, num_units=num_units, scan=False)
        sizes.append(mesh.bytes_of(step) / 1e6)
        rows.append(f"| {9 * num_units + 2} layers | {compiling:.1f} s | {sizes[-1]:.0f} MB |")
    if len(sizes) > 1:
        slope, base = np.polyfit(args.unrolled, sizes, 1)
        rows.append(f"| 1001 layers, drawn out | – | {base + slope * _FULL:.0f} MB |")
    size = args.image_size
    title = f"1001 layers, batch {args.batch_size}, {size}x{size}, {args.dtype}"
    shown = ", ".join(
        f"{name} {' '.join(f'{loss / args.batch_size:.5f}' for loss in values)}"
        for name, values in losses.items()
    )
    note = f"Medians of {args.rounds} rounds of one step. Loss by step: {shown}."
    lines = ["", f"## {title}", "", *circumstances("benchmarks.identity_mappings", load)]
    append_to_results("\n".join([*lines, "", note, "", *rows, ""]))


if __name__ == "__main__":
    main()
