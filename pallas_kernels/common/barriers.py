"""Barriers between warpgroups, which on the GPU are the hardware's named ones.

An arrival on a named barrier is one instruction of a warp; on a barrier in shared
memory all its threads arrive one by one. Interpret mode has no named barriers.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.common.inline_ptx import THREADS


def wait(barrier, name, num_warpgroups: int, *, is_named: bool) -> None:
    """Waits until the others have arrived.

    Args:
      barrier: The barrier in shared memory.
      name: Number of the named barrier in its place.
      num_warpgroups: Those that wait and those that arrive.
      is_named: Use the named one.
    """
    if is_named:
        _named_barrier("sync", name, num_warpgroups)
    else:
        plgpu.barrier_wait(barrier)


def arrive(barrier, name, num_warpgroups: int, *, is_named: bool) -> None:
    """Arrives without waiting; see `wait`."""
    if is_named:
        _named_barrier("arrive", name, num_warpgroups)
    else:
        plgpu.barrier_arrive(barrier)


def _named_barrier(operation: str, name, num_warpgroups: int):
    """Emits bar.sync or bar.arrive on a hardware barrier."""
    instruction = f"bar.{operation} $0, {num_warpgroups * THREADS};"

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_, name):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [name.registers[()]],
            instruction,
            "r",
            has_side_effects=True,
        )

    emit(jnp.asarray(name, jnp.int32))
