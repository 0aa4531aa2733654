"""Rows and columns of a product (wgmma, sm_90), spread over the threads of a warp.

Warp w of a warpgroup holds the rows 16 w to 16 w + 15 of the 64 rows. Its lane t has
row t / 4 of them and the row 8 below, and of each GROUP of columns the pair t % 4.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

ROWS = 64  # of a product: what one warpgroup computes
WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = plgpu.Layout.WGMMA.reduce(1)
WGMMA_COLUMN = plgpu.Layout.WGMMA.reduce(0)
ALIGNMENT = 8  # rows: copies that lay them out for a product start at multiples of it
GROUP = 8  # columns that lie in one register of each thread, two to a thread


def smem_transforms(*, in_boxes: bool = False) -> tuple[Any, ...]:
    """Returns how 16-bit rows lie in shared memory: as a product reads them.

    Args:
      in_boxes: They are [rows, ALIGNMENT, channels], boxes of rows of the product.
    """
    tiling = (1, ALIGNMENT, 64) if in_boxes else (ALIGNMENT, 64)
    return (
        plgpu.TilingTransform(tiling),  # type: ignore[abstract]
        plgpu.SwizzleTransform(128),  # type: ignore[abstract]
    )


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
    return row_array(sums)


@plgpu.inline_mgpu(
    arg_types=(WGMMA,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def thread_maxima(_, logits):
    """Finds the largest of each row among the columns that the same thread holds."""
    pairs = logits.registers.reshape(-1, 2)
    return row_array([_largest_of_pair(_tree(column)) for column in pairs.T])


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def sum_of_four_lanes(_, sums):
    """Adds up what the four threads of each row hold."""
    return _over_four_lanes(sums, arith.addf)


@plgpu.inline_mgpu(
    arg_types=(WGMMA_ROW,),
    return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), WGMMA_ROW),
)
def maximum_of_four_lanes(_, maxima):
    """Finds the largest of what the four threads of each row hold."""
    return _over_four_lanes(maxima, arith.maximumf)


def in_columns(values, per_value: int):
    """Repeats each number for so many columns, a multiple of GROUP."""
    size = len(values) * per_value
    result = plgpu.ShapeDtypeStruct((size,), jnp.dtype(jnp.float32), WGMMA_COLUMN)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT,) * len(values), return_type=result
    )
    def spread(_, *values):
        layout = WGMMA_COLUMN.to_mgpu()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        pairs = [vector.broadcast(pair, value.registers[()]) for value in values]
        registers = np.repeat(np.array(pairs, dtype=object), per_value // GROUP)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape((size,))),
            _layout=layout,
            _is_signed=None,
        )

    return spread(*values)


def _tree(values):
    """Returns the largest of some values, pair by pair."""
    values = list(values)
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [arith.maximumf(a, b) for a, b in pairs]
    return values[0]


def _largest_of_pair(pair):
    low, high = (vector.extract(pair, [], [i]) for i in range(2))
    largest = arith.maximumf(low, high)
    return vector.broadcast(ir.VectorType.get((1,), largest.type), largest)


def _over_four_lanes(values, operation):
    results = []
    for value in values.registers.flat:
        for distance in (1, 2):
            value = operation(value, mgpu.utils.shfl_bfly(value, distance))
        results.append(value)
    return row_array(results)


def row_array(registers):
    """Makes an array of rows of a thread's two, the upper one first."""
    layout = WGMMA_ROW.to_mgpu()
    shape = layout.registers_shape((ROWS,))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=None,
    )
