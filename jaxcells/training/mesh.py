"""Where arrays live: one device, many, or many processes, with the same code.

The mesh has one axis, `data`: the state is replicated over it and batches are cut along it. XLA
then makes every mean over the batch a mean over all devices: the gradients', and the statistics of
batch norm too.
"""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Wrapped

from jaxcells.files import Error, logger
from jaxcells.training.steps import EvalStep, PredictStep, TrainStep

Tree = TypeVar("Tree")


_NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")
_DISTRIBUTED = ("JAXCELLS_COORDINATOR", "JAXCELLS_NUM_PROCESSES", "JAXCELLS_PROCESS_ID")
# SLURM_NTASKS also counts the tasks that an allocation could start: in a shell inside one, waiting
# for them would never end.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def initialize_distributed() -> None:
    """Joins the processes of one run, where there are several. Call before any JAX computation.

    Several processes are meant when `JAXCELLS_COORDINATOR` (`host:port` of process 0),
    `JAXCELLS_NUM_PROCESSES` and `JAXCELLS_PROCESS_ID` are set, or when SLURM's `srun` or Open MPI's
    `mpirun` started more than one. Otherwise nothing happens.

    Raises:
      Error: if only some of the three variables are set, or a number is not one.
    """
    given = [os.environ.get(name, "") for name in _DISTRIBUTED]
    if not any(given):
        if any(os.environ.get(name, "1") not in ("", "0", "1") for name in _LAUNCHED):
            jax.distributed.initialize()
        return
    coordinator, num_processes, process_id = given
    numbers = num_processes.isdigit() and process_id.isdigit()
    if not coordinator or not numbers or int(process_id) >= int(num_processes):
        listed = ", ".join(f"{n}={value}" for n, value in zip(_DISTRIBUTED, given, strict=True))
        raise Error(
            f"{listed}: set all three to run in several processes, the last to a whole number from "
            "0 to one below the second; set none to run in one"
        )
    # Left to find out, JAX would not read these two from any environment variable.
    jax.distributed.initialize(
        coordinator, int(num_processes), int(process_id), cluster_detection_method="deactivate"
    )


def is_primary() -> bool:
    """Whether this process is the one of its run that writes files and to the terminal."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come to the place of this name."""
    multihost_utils.sync_global_devices(name)


def of_primary(value: bool) -> bool:
    """Returns the value that the primary process passes, in every process of the run."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the one-axis mesh `('data',)`, over all devices of all processes by default."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copies every leaf to every device of the mesh.

    The copies share no memory with the originals, which therefore outlive a donation of the
    copies. In several processes each must pass the same values.

    Args:
      tree: pytree of NumPy or JAX arrays.
      mesh: from `make_mesh`.
    """
    # device_put may share memory, on several devices even with may_alias=False, and donating its
    # result then deletes the originals.
    return jax.device_put(jax.tree.map(jnp.copy, tree), NamedSharding(mesh, PartitionSpec()))


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """Says which rows of a global batch this process loads.

    Args:
      batch_size: rows of a batch over all processes.
      mesh: from `make_mesh`, over all devices.

    Raises:
      Error: if the rows cannot be dealt equally to the devices.
    """
    if batch_size % mesh.size:
        smaller = batch_size // mesh.size * mesh.size
        sizes = f"{smaller} or {smaller + mesh.size}" if smaller else mesh.size
        raise Error(
            f"a batch of {batch_size} cannot be dealt equally to {mesh.size} devices: use "
            f"train.batch_size={sizes}"
        )
    rows = batch_size // jax.process_count()
    start = rows * jax.process_index()
    return slice(start, start + rows)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices, cut along its first axis.

    Args:
      batch: arrays whose rows are those that `local_rows` names, of this process only. Not to be
        changed afterwards: on the CPU the result may share their memory.
      mesh: from `make_mesh`.

    Returns:
      Arrays with the rows of all processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def jit_train_step(train_step: TrainStep, mesh: Mesh) -> Wrapped:
    """Compiles a training step for replicated states and sharded batches.

    The state that is passed in is donated: its memory holds the state that comes out.
    """
    replicated, sharded = _shardings(mesh)
    inputs = (replicated, sharded, replicated)
    return jax.jit(train_step, in_shardings=inputs, out_shardings=replicated, donate_argnums=0)


def jit_step(step: EvalStep | PredictStep, mesh: Mesh) -> Wrapped:
    """Compiles a step that changes no state; every process can read all that it returns."""
    replicated, sharded = _shardings(mesh)
    return jax.jit(step, in_shardings=(replicated, sharded), out_shardings=replicated)


def _shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def bytes_of(step: Compiled) -> int:
    """Returns how much memory of each device a compiled step needs, by the compiler's account.

    That is: arguments, results that do not take the place of arguments, and temporary arrays.
    """
    memory: Any = step.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def describe_devices() -> dict[str, Any]:
    """Says what the run computes on: platform, kind, number of devices and of processes."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def warn_of_cpu() -> None:
    """Says in one line that a run is on the CPU, and why; nothing on an accelerator."""
    if jax.default_backend() != "cpu":
        return
    why = (
        "although there is an NVIDIA GPU, because JAX cannot use it: "
        "pip install 'jaxcells[gpu]' (driver 580 or newer)"
    )
    if not (_NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi")):
        why = "for there is no accelerator: this works but is slow"
    elif os.environ.get("JAX_PLATFORMS", "") == "cpu":
        why = "as JAX_PLATFORMS=cpu asks, although there is an NVIDIA GPU"
    logger.warning("running on the CPU, %s", why)
