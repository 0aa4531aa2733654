"""Barriers between warpgroups, which on the GPU are the hardware's named ones.

An arrival on a named barrier is one instruction of a warp; on a barrier in shared
memory all its threads arrive one by one. Interpret mode has no named barriers.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.common.inline_ptx import THREADS


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedBarriers:
    """Base of what warpgroups wait for, each barrier a named one where there are such.

    Attributes:
      uses_named_barriers: Use the hardware's, in place of those in shared memory.
    """

    uses_named_barriers: bool

    def _wait(self, barrier: Any, name: Any, num_warpgroups: int) -> None:
        """Waits until the others have arrived.

        Args:
          barrier: The barrier in shared memory.
          name: Number of the named barrier in its place.
          num_warpgroups: Those that wait and those that arrive.
        """
        if self.uses_named_barriers:
            _named_barrier("sync", name, num_warpgroups)
        else:
            plgpu.barrier_wait(barrier)

    def _arrive(self, barrier: Any, name: Any, num_warpgroups: int) -> None:
        """Arrives without waiting; see `_wait`."""
        if self.uses_named_barriers:
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
