r"""Images per second of our training and evaluation step beside torchvision's, in one run.

    pip install -e '.[bench]'
    python -m benchmarks.throughput --model resnet34 --batch_size 32 --image_size 200

The contestants are our steps, compiled as a run compiles them, and the same network of torchvision
(channels_last), eager and with `torch.compile`. All get the same uint8 batch from the memory of the
host, normalise it on the device and compute at the same precision: float32 (TF32 on GPUs that have
it, JAX's default, set for torch too) or bfloat16 with float32 parameters. They take turns, so that
what else the machine does meets them all. The medians, and the medians of the ratios within a
round, are appended to benchmarks/RESULTS.md. Without torch ours are measured alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcells.data.normalization import fit_normalization
from jaxcells.models import MODEL_NAMES, create_model
from jaxcells.training import mesh, optim, state, steps
from tools.torchvision_import import import_torchvision

_RESULTS = Path(__file__).with_name("RESULTS.md")
_INTRODUCTION = """\
# Throughput

Images per second beside torchvision, taking turns in one run; higher is better. Each section was
appended by the command that it shows (`benchmarks/throughput.py` says what is measured). "Ours /
theirs" is the median of the ratios within a round, with the smallest and the largest.
"""
_NUM_CLASSES = 4
_LEARNING_RATE, _MOMENTUM = 0.001, 0.9


@dataclass(frozen=True)
class Contestant:
    """One implementation: each function makes so many steps and waits for the last."""

    name: str
    train: Callable[[int], None]
    evaluate: Callable[[int], None]


def ours(args: argparse.Namespace, batch: dict[str, np.ndarray]) -> Contestant:
    """The steps of a run on one device, compiled as `training.loop` compiles them."""
    devices = mesh.make_mesh(jax.devices()[:1])
    normalize = fit_normalization(batch["image"], "imagenet")
    schedule = optim.make_schedule("constant", _LEARNING_RATE, 1)
    train_state = mesh.replicate(
        state.create_train_state(
            create_model(args.model, num_classes=_NUM_CLASSES, dtype=args.dtype),
            optim.make_optimizer(schedule, momentum=_MOMENTUM),
            sample_shape=batch["image"].shape,
            key=jax.random.key(0),
        ),
        devices,
    )
    train_step = mesh.jit_train_step(steps.make_train_step(normalize), devices)
    eval_step = mesh.jit_step(steps.make_eval_step(normalize), devices)
    key = jax.random.key(0)

    def train(num_steps: int) -> None:
        nonlocal train_state
        for _ in range(num_steps):
            train_state, _ = train_step(train_state, mesh.shard_batch(batch, devices), key)
        jax.block_until_ready(train_state)

    def evaluate(num_steps: int) -> None:
        for _ in range(num_steps):
            sums = eval_step(train_state, mesh.shard_batch(batch, devices))
        jax.block_until_ready(sums)

    return Contestant("jaxcells", train, evaluate)


def theirs(args: argparse.Namespace, batch: dict[str, np.ndarray], compiled: bool) -> Contestant:
    """The same work with torchvision's network, written as PyTorch's guides recommend."""
    import torch
    from torch.nn import functional

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = getattr(import_torchvision().models, args.model)(num_classes=_NUM_CLASSES)
    model = model.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def logits_and_labels() -> tuple[Any, Any]:
        labels = torch.from_numpy(batch["label"]).to(device).long()
        # [B, H, W, C] in memory is what torch calls channels_last of [B, C, H, W].
        images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
        images = (images.float() / 255 - mean) / deviation
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return network(images).float(), labels

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train(num_steps: int) -> None:
        model.train()
        for _ in range(num_steps):
            optimizer.zero_grad()
            functional.cross_entropy(*logits_and_labels()).backward()
            optimizer.step()
        wait()

    def evaluate(num_steps: int) -> None:
        model.eval()
        with torch.inference_mode():
            for _ in range(num_steps):
                logits, labels = logits_and_labels()
                functional.cross_entropy(logits, labels, reduction="sum")
                (logits.argmax(-1) == labels).sum()
        wait()

    return Contestant(f"torchvision, {'compiled' if compiled else 'eager'}", train, evaluate)


def contestants(args: argparse.Namespace, batch: dict[str, np.ndarray]) -> Iterator[Contestant]:
    """Ours, and those of theirs that work here, each warmed up; says which are left out and why."""
    makers: list[tuple[str, Callable[[], Contestant]]] = [("jaxcells", lambda: ours(args, batch))]
    if args.model.startswith("plain"):
        print("torchvision has no plain networks: measuring ours alone")
    elif not args.no_torch:
        makers += [
            ("torchvision, eager", lambda: theirs(args, batch, compiled=False)),
            ("torchvision, compiled", lambda: theirs(args, batch, compiled=True)),
        ]
    for name, make in makers:
        start = time.perf_counter()
        try:
            contestant = make()
            contestant.train(2)
            contestant.evaluate(2)
        except Exception as error:  # whatever torch or its compiler lacks here
            if name == "jaxcells":
                raise
            reason = str(error).strip().partition("\n")[0]
            print(f"{name}: left out ({type(error).__name__}: {reason})")
            continue
        print(f"{name}: ready after {time.perf_counter() - start:.0f} s")
        yield contestant


def measure(
    rivals: list[Contestant], batch_size: int, num_rounds: int, num_steps: int
) -> dict[str, dict[str, np.ndarray]]:
    """Lets all take turns.

    Returns:
        Images per second `[rounds]` by contestant, for `"train"` and `"eval"`.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {rival.name: [] for rival in rivals} for kind in ("train", "eval")
    }
    for index in range(num_rounds):
        for kind, times in seconds.items():
            for rival in rivals:
                run = rival.train if kind == "train" else rival.evaluate
                start = time.perf_counter()
                run(num_steps)
                times[rival.name].append(time.perf_counter() - start)
        print(f"round {index + 1} of {num_rounds}")
    return {
        kind: {name: batch_size * num_steps / np.array(t) for name, t in times.items()}
        for kind, times in seconds.items()
    }


def report(args: argparse.Namespace, rates: dict[str, dict[str, np.ndarray]], load: float) -> str:
    """Writes the section of RESULTS.md for one run; `load` says how busy others kept the CPU."""
    rows = ["| images per second | train | eval |", "|---|---|---|"]
    names = list(rates["train"])
    for name in names:
        medians = (np.median(rates[kind][name]) for kind in ("train", "eval"))
        rows.append(f"| {name} | " + " | ".join(f"{median:.1f}" for median in medians) + " |")
    for name in names[1:]:
        ratios = (rates[kind][names[0]] / rates[kind][name] for kind in ("train", "eval"))
        cells = (f"{np.median(r):.2f} ({r.min():.2f}–{r.max():.2f})" for r in ratios)
        rows.append(f"| ours / {name} | " + " | ".join(cells) + " |")
    size = args.image_size
    return "\n".join(
        [
            "",
            f"## {args.model}, batch {args.batch_size}, {size}x{size}, {args.dtype}",
            "",
            *circumstances("benchmarks.throughput", load),
            "",
            f"Medians of {args.rounds} rounds of {args.steps} steps.",
            "",
            *rows,
            "",
        ]
    )


def circumstances(module: str, load: float) -> list[str]:
    """Returns what a figure is worth nothing without: date, device, load, versions, command."""
    packages = ("jax", "jaxlib", "flax", "torch", "torchvision")
    versions = [f"{package} {v}" for package in packages if (v := _version(package))]
    return [
        f"{datetime.date.today()} · {_describe_device()} · {os.cpu_count()} threads, load "
        f"{load:.1f} before the start",
        "",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        "",
        f"    {shlex.join(['python', '-m', module, *sys.argv[1:]])}",
    ]


def append_to_results(section: str) -> None:
    """Prints a section and adds it to RESULTS.md."""
    print(section)
    if not _RESULTS.exists():
        _RESULTS.write_text(_INTRODUCTION, encoding="utf-8")
    with _RESULTS.open("a", encoding="utf-8") as file:
        file.write(section)


def load_before() -> float:
    """Returns how busy others keep the CPU."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_device() -> str:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    cpu_info = Path("/proc/cpuinfo")
    vectors = ", AVX-512" if cpu_info.exists() and "avx512f" in cpu_info.read_text() else ""
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')}{vectors}"


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet34", choices=MODEL_NAMES)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--no_torch", action="store_true", help="measure ours alone")
    args = parser.parse_args()

    # Left to itself, JAX takes three quarters of a GPU's memory at once, and torch would starve.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, _NUM_CLASSES, args.batch_size, np.int32),
        "mask": np.ones(args.batch_size, np.float32),
    }
    load = load_before()
    rates = measure(list(contestants(args, batch)), args.batch_size, args.rounds, args.steps)
    append_to_results(report(args, rates, load))


if __name__ == "__main__":
    main()
