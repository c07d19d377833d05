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


# Several devices and processes

NUM_STEPS = 4


def skewed_batch(step):
    """A batch whose halves differ much in brightness, and in how many rows count."""
    batch = make_batch(8, seed=step)
    batch["image"][:4] //= 8
    batch["mask"][5:] = 0
    return batch


def run(devices, checkpoint=None):
    """Trains some steps with augmentation, by way of a checkpoint in a folder if one is given."""
    placed = mesh.make_mesh(devices)
    step = mesh.jit_train_step(
        make_train_step(normalize, augmentation={"dihedral": True, "intensity": 0.1}), placed
    )
    original = tiny_state()
    state, rows = mesh.replicate(original, placed), mesh.local_rows(8, placed)
    for index in range(NUM_STEPS):
        batch = {name: values[rows] for name, values in skewed_batch(index).items()}
        before = state
        state, _ = step(state, mesh.shard_batch(batch, placed), jax.random.key(1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))  # donated
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
        "totals": jax.device_get(mesh.jit_step(eval_step, placed)(state, sharded)),
        "outputs": jax.device_get(mesh.jit_step(predict_step, placed)(state, sharded)),
    }


def main(folder):
    """What each of the processes below runs."""
    mesh.initialize_distributed()
    name = f"{jax.process_count()}-{jax.process_index()}"
    outcome = run(jax.devices(), checkpoint=pathlib.Path(folder, str(jax.process_count())))
    np.savez(f"{folder}/{name}.npz", *jax.tree.leaves(outcome))


def test_two_processes_equal_two_devices_bit_for_bit_and_one_device(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = f"from tests.training import test_mesh; test_mesh.main({str(tmp_path)!r})"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAXCELLS_COORDINATOR": address,
        "JAXCELLS_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=pathlib.Path(__file__).parents[2],
            env={**environment, "JAXCELLS_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        two, one = run(jax.devices()), run(jax.devices()[:1])
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    for index in range(2):
        with np.load(tmp_path / f"2-{index}.npz") as found:
            assert_trees_equal(list(found.values()), jax.tree.leaves(two))
    assert not np.array_equal(one["state"].params["fc"]["bias"], np.zeros(3))
    assert_trees_close(two, one)


# Start-up


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_of_several_processes_is_left_to_jax(monkeypatch, variable):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    # A shell inside an allocation for four tasks is one task.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    for number in ("1", "2"):
        assert calls == []
        monkeypatch.setenv(variable, number)
        mesh.initialize_distributed()
    assert calls == [()]


def test_half_of_the_variables_is_refused(monkeypatch):
    monkeypatch.setenv("JAXCELLS_COORDINATOR", "localhost:1234")
    with pytest.raises(Error, match=r"COORDINATOR.*NUM_PROCESSES.*PROCESS_ID.*: set all three"):
        mesh.initialize_distributed()
    monkeypatch.setenv("JAXCELLS_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAXCELLS_PROCESS_ID", "2")
    with pytest.raises(Error, match=r"JAXCELLS_NUM_PROCESSES=2.*JAXCELLS_PROCESS_ID=2"):
        mesh.initialize_distributed()


@pytest.mark.parametrize(
    ("gpu", "platforms", "says"),
    [
        (False, "", "there is no accelerator"),
        (True, "", r"NVIDIA GPU, because JAX cannot use it: pip install 'jaxcells\[gpu\]'"),
        (True, "cpu", "as JAX_PLATFORMS=cpu asks"),
    ],
)
def test_a_run_on_the_cpu_says_so_and_why(monkeypatch, caplog, gpu, platforms, says):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: gpu)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    mesh.warn_of_cpu()
    assert re.search(says, caplog.text)
    caplog.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh.warn_of_cpu()
    assert not caplog.text
