"""The devices that a command asks for: looked at before anything is loaded."""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from models.diffusion.mesh import DeviceMesh

_COUNT = "import jax; print(jax.device_count())"
# Variables that tell the number of processes, and which one this is: a user's, and
# those of launchers that `jax.distributed` knows.
_LAUNCHERS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


def mesh_from(arguments: argparse.Namespace) -> DeviceMesh | None:
    """Returns the mesh that the options describe; None without.

    Raises:
      ValueError: --shard-weights is given without --mesh.
    """
    shard_weights = getattr(arguments, "shard_weights", False)
    sizes = getattr(arguments, "mesh", None)
    if sizes is not None:
        return DeviceMesh(**sizes, shard_weights=shard_weights)
    if shard_weights:
        raise ValueError(
            "--shard-weights spreads weights over the devices of --mesh: pass --mesh "
            "sequence=2, too"
        )
    return None


@contextlib.contextmanager
def joined_processes(
    mesh: DeviceMesh | None, arguments: argparse.Namespace
) -> Iterator[None]:
    """Joins the processes of one run on several hosts, of which the first one writes.

    They are those that the environment tells of. Others than the first print nothing
    but errors, and write to a folder that is gone at the end.

    Args:
      mesh: The mesh that is asked for; with None nothing is joined.
      arguments: The parsed command line; `output` is replaced in other processes.
    """
    count, rank = (1, 0) if mesh is None else _process()
    if count > 1:
        told = "JAX_COORDINATOR_ADDRESS" in os.environ
        jax.distributed.initialize(
            num_processes=count if told else None, process_id=rank if told else None
        )
    if rank == 0:
        yield
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        arguments.output = Path(folder) / "run"
        yield


def _process() -> tuple[int, int]:
    """Returns the number of processes of the run, and which one this is."""
    for count, rank in _LAUNCHERS:
        if count in os.environ and rank in os.environ:
            return int(os.environ[count]), int(os.environ[rank])
    return 1, 0


def check_devices(mesh: DeviceMesh) -> None:
    """Raises ValueError unless there are devices for a mesh.

    JAX takes most of the memory of a GPU when it starts. So a process of its own counts
    them, if there is one host: text encoders may run beside this one.
    """
    if _process()[0] > 1:
        mesh.check_devices(jax.device_count(), jax.local_device_count())
        return
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False
    )
    if counted.returncode == 0:  # else the start of JAX will say what is wrong
        number = int(counted.stdout.split()[-1])
        mesh.check_devices(number, number)
