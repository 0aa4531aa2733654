"""Values of rows that are spread over the threads of a warp, in the WGMMA layout."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels.attention.sm90.plan import ROWS

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT),
)
def lanes_of_warp(_, rows):
    """Returns a bit mask of the lanes of the warp that hold a true row."""
    own = functools.reduce(arith.ori, rows.registers.flat)
    own = vector.extract(own, [], [0]) if isinstance(own.type, ir.VectorType) else own
    everyone = mgpu.c(-1, ir.IntegerType.get_signless(32))
    result = nvvm.vote_sync(everyone, own, "ballot")
    return mgpu.FragmentedArray.splat(result, (), is_signed=True)


@plgpu.inline_mgpu(
    arg_types=(WGMMA,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def thread_sums(_, weights):
    """Sums each row over the columns that the same thread holds."""
    pairs = weights.registers.reshape(-1, 2)  # column tiles, rows 8 apart
    sums = []
    for column in pairs.T:
        chains = [functools.reduce(arith.addf, column[i::2]) for i in range(2)]
        pair = arith.addf(*chains)
        low, high = (vector.extract(pair, [], [i]) for i in range(2))
        total = arith.addf(low, high)
        sums.append(vector.broadcast(ir.VectorType.get((1,), total.type), total))
    return _row_array(sums)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def sum_of_four_lanes(_, sums):
    """Adds up what the four threads of each row hold."""
    results = []
    for value in sums.registers.flat:
        for distance in (1, 2):
            value = arith.addf(value, mgpu.utils.shfl_bfly(value, distance))
        results.append(value)
    return _row_array(results)


def _row_array(registers):
    layout = WGMMA_ROW.to_mgpu()
    shape = layout.registers_shape((ROWS,))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=None,
    )
