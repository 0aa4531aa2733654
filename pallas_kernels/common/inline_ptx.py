"""Inline PTX in Pallas kernels, on arrays that lie one element to a register.

Element i * 128 + t of such an array is in register i of thread t of the warpgroup.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

THREADS = 128  # of a warpgroup
WORD = 32  # bits, and threads of a warp


def strided(size: int):
    """Returns the layout of arrays that lie one element to a register."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=1)


def shaped(size: int, dtype) -> plgpu.ShapeDtypeStruct:
    """Returns the type of an array that inline code returns."""
    return plgpu.ShapeDtypeStruct((size,), jnp.dtype(dtype), layout=strided(size))


def array_of(values, is_signed: bool | None = False):
    """Makes an array of the elements of a thread, one to a register.

    Args:
      values: The elements.
      is_signed: Whether integers are; None for floating-point numbers.
    """
    registers = np.empty(values.shape, dtype=object)
    for i, value in enumerate(values):
        register = ir.VectorType.get((1,), value.type)
        registers[i] = mgpu.utils.vector.broadcast(register, value)
    layout = mgpu.WGStridedFragLayout((values.size * THREADS,), vec_size=1)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=layout, _is_signed=is_signed
    )


def scalars(*arrays):
    """Yields the elements of a thread, array by array: registers are vectors of one."""
    for registers in zip(*(array.registers.flat for array in arrays), strict=True):
        yield tuple(
            mgpu.utils.vector.extract(x, [], [0])
            if isinstance(x.type, ir.VectorType)
            else x
            for x in registers
        )


def asm(code: str, constraints: str, *arguments, result=None, is_pure=False):
    """Emits PTX; what is not pure stays in order with other memory accesses."""
    return llvm.inline_asm(
        ir.Type.parse("!llvm.void") if result is None else result,
        arguments,
        code,
        constraints if is_pure else constraints + ",~{memory}",
        has_side_effects=not is_pure,
    )


def const(value: int, type_=None):
    """Returns an integer constant, of 32 bits if no type is given."""
    return mgpu.utils.c(value, i32() if type_ is None else type_)


def i32():
    """Returns the type of integers of 32 bits."""
    return ir.IntegerType.get_signless(32)


def i64():
    """Returns the type of integers of 64 bits."""
    return ir.IntegerType.get_signless(64)
