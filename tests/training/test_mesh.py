import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxcells import Error
from jaxcells.training import checkpoints, mesh
from jaxcells.training.steps import make_train_step
from tests.training.test_checkpoints import make_meta
from tests.training.test_steps import (
    assert_trees_close,
    assert_trees_equal,
    eval_step,
    make_batch,
    normalize,
    predict_step,
    tiny_state,
    train_step,
)


class FourDevices:
    size = 4


# Batches


def test_rows_are_dealt_to_processes_in_order(monkeypatch):
    assert mesh.local_rows(6, mesh.make_mesh()) == slice(0, 6)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert mesh.local_rows(8, FourDevices()) == slice(4, 8)


@pytest.mark.parametrize(("size", "fits"), [(6, "4 or 8"), (3, "4")])
def test_a_batch_that_does_not_fit_the_devices_is_refused(size, fits):
    with pytest.raises(Error, match=rf"batch of {size} .* 4 devices: use train.batch_size={fits}$"):
        mesh.local_rows(size, FourDevices())


# Steps


def test_compiled_steps_are_the_steps():
    devices, batch, key = mesh.make_mesh(), make_batch(), jax.random.key(0)
    state = tiny_state()
    placed, sharded = mesh.replicate(state, devices), mesh.shard_batch(batch, devices)
    sums = mesh.jit_step(eval_step, devices)(placed, sharded)
    assert_trees_close(sums, eval_step(state, batch))
    probabilities = mesh.jit_step(predict_step, devices)(placed, sharded)
    assert_trees_close(probabilities, predict_step(state, batch))
    step = mesh.jit_train_step(make_train_step(normalize), devices)
    assert_trees_close(step(placed, sharded, key), train_step(state, batch, key))


def test_donation_takes_the_copy_and_leaves_the_original():
    devices, state = mesh.make_mesh(), tiny_state()
    placed = mesh.replicate(state, devices)
    step = mesh.jit_train_step(make_train_step(normalize), devices)
    step(placed, mesh.shard_batch(make_batch(), devices), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# Several devices and processes

NUM_STEPS = 4


def skewed_batch(step):
    """A batch whose halves differ much in brightness, and in how many rows count."""
    batch = make_batch(8, seed=step)
    batch["image"][:4] //= 8
    batch["mask"][5:] = 0
    return batch


def run(devices, checkpoint=None):
    """Trains some steps with augmentation, from the checkpoint if it is there, else into it."""
    placed = mesh.make_mesh(devices)
    step = mesh.jit_train_step(make_train_step(normalize, dihedral=True, intensity=0.1), placed)
    original = tiny_state()
    state, rows = mesh.replicate(original, placed), mesh.local_rows(8, placed)
    for index in range(NUM_STEPS):
        batch = {name: values[rows] for name, values in skewed_batch(index).items()}
        state, _ = step(state, mesh.shard_batch(batch, placed), jax.random.key(1))
        if checkpoint and index == 1:
            scores = {"balanced_accuracy": 0.5, "loss": 1}
            checkpoints.save(checkpoint, state, make_meta(2), scores)
            restored, _ = checkpoints.restore(checkpoint, state)
            state = mesh.replicate(restored, placed)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(original))
    whole = {name: values[rows] for name, values in skewed_batch(99).items()}
    sharded = mesh.shard_batch(whole, placed)
    return {
        "state": jax.device_get(state),
        "sums": jax.device_get(mesh.jit_step(eval_step, placed)(state, sharded)),
        "probabilities": np.asarray(mesh.jit_step(predict_step, placed)(state, sharded)),
    }


def main(folder):
    """What each of the processes below runs."""
    mesh.initialize_distributed()
    name = f"{jax.process_count()}-{jax.process_index()}"
    outcome = run(jax.devices(), checkpoint=pathlib.Path(folder, str(jax.process_count())))
    np.savez(f"{folder}/{name}.npz", *jax.tree.leaves(outcome))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The leaves of `run` on 2 devices of 1 process, and on 1 device of each of 2 processes."""
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = f"from tests.training import test_mesh; test_mesh.main({str(folder)!r})"
    environments = [{"JAX_NUM_CPU_DEVICES": "2"}] + [
        {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAXCELLS_COORDINATOR": address,
            "JAXCELLS_NUM_PROCESSES": "2",
            "JAXCELLS_PROCESS_ID": str(index),
        }
        for index in range(2)
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=pathlib.Path(__file__).parents[2],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return {path.stem: list(np.load(path).values()) for path in folder.glob("*.npz")}


def test_two_processes_equal_two_devices_bit_for_bit(outcomes):
    assert outcomes.keys() == {"1-0", "2-0", "2-1"}
    assert_trees_equal(outcomes["2-0"], outcomes["1-0"])
    assert_trees_equal(outcomes["2-1"], outcomes["1-0"])


def test_two_devices_equal_one(outcomes):
    one = run(jax.devices()[:1])
    assert not np.array_equal(one["state"].params["fc"]["bias"], np.zeros(3))
    assert_trees_close(outcomes["1-0"], one)


# Start-up


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: 1 / 0)
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    # A shell inside an allocation for four tasks is one task.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    mesh.initialize_distributed()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_of_several_processes_is_left_to_jax(monkeypatch, variable):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    monkeypatch.setenv(variable, "2")
    mesh.initialize_distributed()
    assert calls == [()]


def test_half_of_the_variables_is_refused(monkeypatch):
    monkeypatch.setenv("JAXCELLS_COORDINATOR", "localhost:1234")
    with pytest.raises(
        Error,
        match="JAXCELLS_COORDINATOR set without JAXCELLS_NUM_PROCESSES, JAXCELLS_PROCESS_ID: set",
    ):
        mesh.initialize_distributed()
    monkeypatch.setenv("JAXCELLS_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAXCELLS_PROCESS_ID", "2")
    with pytest.raises(Error, match="JAXCELLS_NUM_PROCESSES=2 and JAXCELLS_PROCESS_ID=2"):
        mesh.initialize_distributed()


@pytest.mark.parametrize(
    ("gpu", "platforms", "says"),
    [
        (False, "", "no accelerator found"),
        (True, "", r"NVIDIA GPU, because JAX cannot use it: pip install 'jaxcells\[gpu\]'"),
        (True, "cpu", "as JAX_PLATFORMS=cpu asks"),
    ],
)
def test_a_run_on_the_cpu_says_so_and_why(monkeypatch, gpu, platforms, says):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(mesh, "_NVIDIA_DRIVER", pathlib.Path("/" if gpu else "/none"))
    monkeypatch.setattr(mesh.shutil, "which", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert re.search(says, mesh.accelerator_note())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert mesh.accelerator_note() is None
