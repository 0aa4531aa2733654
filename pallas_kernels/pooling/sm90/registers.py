"""Operations on the channels in a thread's registers, for the fused kernel (sm_90).

`emulated.py` has the same functions in plain JAX, for interpret mode: a function added
here needs one there.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import math, vector

from pallas_kernels.common.inline_ptx import asm, i32
from pallas_kernels.pooling.sm90.plan import LOAD_BYTES, NormRopePoolPlan

_PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def store(ref, x, plan: NormRopePoolPlan):
    """Stores the result of a tile.

    A lane has 32 neighbouring bytes and stores 16 at a time. jax 0.12 refuses that
    unless it is told, 0.11 cannot be told; it happens once for each tile.
    """
    del plan
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def split(x, plan: NormRopePoolPlan):
    """Returns the even and the odd channels; no data moves between threads."""
    shape = (plan.heads_at_once, plan.head_dim // 2)
    half = plgpu.ShapeDtypeStruct(shape, x.dtype, layout=plan.half_layout)

    @plgpu.inline_mgpu(arg_types=(plan.layout(plan.vec),), return_type=(half, half))
    def split_registers(_, x):
        def part(parity):
            own = list(range(parity, plan.vec, 2))
            registers = [vector.shuffle(r, r, own) for r in x.registers.flat]
            return _array(registers, shape, plan.half_layout)

        return part(0), part(1)

    return split_registers(x)


def join(halves, plan: NormRopePoolPlan):
    """Inverts `split`; the registers of the result have at most 16 bytes."""
    even, odd = halves
    shape = (plan.heads_at_once, plan.head_dim)
    vec = min(plan.vec, LOAD_BYTES[0] // even.dtype.itemsize)
    joined = plgpu.ShapeDtypeStruct(shape, even.dtype, layout=plan.layout(vec))

    @plgpu.inline_mgpu(arg_types=(plan.half_layout,) * 2, return_type=joined)
    def join_registers(_, even, odd):
        half = plan.vec // 2
        order = [i // 2 + half * (i % 2) for i in range(plan.vec)]
        registers = [
            vector.shuffle(a, b, order[start : start + vec])
            for a, b in zip(even.registers.flat, odd.registers.flat, strict=True)
            for start in range(0, plan.vec, vec)
        ]
        return _array(registers, shape, plan.layout(vec))

    return join_registers(even, odd)


def multiply_add(a, b, c, plan: NormRopePoolPlan):
    """Returns a * b + c of even or odd channels, rounded once.

    The compiler contracts a product and a sum, and of two products takes either: heads
    that two groups have would differ in the last bit from one group to the other.
    """
    layout = plan.half_layout
    result = plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=result)
    def multiply_add_registers(_, *arrays):
        registers = (array.registers.flat for array in arrays)
        fused = [math.fma(*own) for own in zip(*registers, strict=True)]
        return _array(fused, a.shape, layout)

    return multiply_add_registers(a, b, c)


def round_halves(halves, dtype, plan: NormRopePoolPlan):
    """Rounds float32 halves and joins them, as they would be loaded.

    Two numbers in 16 bits are rounded into one register at once. JAX rounds one after
    the other, which takes twice the instructions and, until it packs them, registers.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize == 4:
        return join(halves, plan)
    code = f"cvt.rn.{_PTX_NAMES[dtype.name]}x2.f32 $0, $2, $1;"
    shape = (plan.heads_at_once, plan.head_dim)
    joined = plgpu.ShapeDtypeStruct(shape, dtype, layout=plan.layout(plan.vec))

    @plgpu.inline_mgpu(arg_types=(plan.half_layout,) * 2, return_type=joined)
    def round_registers(_, even, odd):
        words = ir.VectorType.get((plan.vec // 2,), i32())
        numbers = ir.VectorType.get((plan.vec,), mgpu.utils.dtype_to_ir_type(dtype))
        registers = []
        for pair in zip(even.registers.flat, odd.registers.flat, strict=True):
            packed = []
            for i in range(plan.vec // 2):
                two = (vector.extract(x, [], [i]) for x in pair)
                packed.append(asm(code, "=r,f,f", *two, result=i32(), is_pure=True))
            packed = vector.from_elements(words, packed)
            registers.append(vector.bitcast(numbers, packed))
        return _array(registers, shape, plan.layout(plan.vec))

    return round_registers(*halves)


def keep_order():
    """Keeps LLVM from holding in registers what was stored to be loaded again."""

    @plgpu.inline_mgpu()
    def emit(_):
        asm("", "")

    emit()


def _array(registers, shape, layout):
    layout = layout.to_mgpu()
    registers = np.array(registers, dtype=object)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )
