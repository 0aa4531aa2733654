"""Rounding to FP8 in a thread's registers (sm_90).

`emulated.py` has the same function in plain JAX, for interpret mode.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

# The second number becomes the lower half.
_FOUR_TO_FLOAT8 = """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}"""


def to_float8(x, layout):
    """Rounds a row to e4m3, to nearest; returns the bits, as int8.

    Mosaic GPU has no conversion from float32 to FP8. Four numbers at a time.
    """
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.int8), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def convert(_, x):
        bits = np.empty_like(x.registers)
        for index, register in np.ndenumerate(x.registers):
            bits[index] = _round(register)
        return mgpu.FragmentedArray(_registers=bits, _layout=x.layout, _is_signed=True)

    return convert(x)


def _round(register):
    """Rounds a vector of float32 numbers, a multiple of four."""
    i32, i8 = (ir.IntegerType.get_signless(bits) for bits in (32, 8))
    (size,) = register.type.shape
    words = [
        llvm.inline_asm(
            i32,
            [vector.extract(register, [], [first + i]) for i in range(4)],
            _FOUR_TO_FLOAT8,
            "=r,f,f,f,f",
            has_side_effects=False,
        )
        for first in range(0, size, 4)
    ]
    packed = vector.from_elements(ir.VectorType.get((size // 4,), i32), words)
    return vector.bitcast(ir.VectorType.get((size,), i8), packed)
