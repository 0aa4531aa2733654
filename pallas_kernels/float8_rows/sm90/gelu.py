"""Scales, bias, GELU and rounding to FP8 of one row after another, for Hopper.

A CTA of one warpgroup takes every `num_ctas`-th row. GELU's two functions take 216
instructions of the special units for each warp of a row of 13,824 channels, 1,728
cycles in all; its bytes take as long. So rows come to shared memory while others are
computed. Registers hold a row from its load to its store, 108 numbers of a thread: two
CTAs fit on a multiprocessor. Scales of columns and the bias come from the first-level
cache, which both share and which the copies leave alone.

Barrier  arrives  waits
x_full   TMA      all threads: the row of a slot has landed

Hazard: a slot is copied into again once the CTA has the maximum of its row, which all
threads have read by then. `commit_smem` orders their reads before the copy.
"""

import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.device import num_multiprocessors
from pallas_kernels.float8_rows.sm90 import emulated, registers, rows

SLOTS = 2  # rows that are on their way or read
CTAS = 2  # of a multiprocessor, by their registers
LINE = 256  # channels: a copy takes at most as many along an axis
# gelu(x) = x * sigmoid(2u) of u = sqrt(2 / pi) (x + 0.044715 x^3), by powers of two.
_CUBIC, _LINEAR = 0.044715, -2 * math.sqrt(2 / math.pi) * math.log2(math.e)


def gelu_rows(
    product: Float[Array, "R K"],
    scales: Float[Array, " R"],
    columns: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> rows.Rows:
    """Computes rows in FP8; see `pallas_kernels.float8_rows.gelu_rows`.

    Args:
      product: As there.
      scales: Of rows, as there.
      columns: As there.
      bias: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take this product on any device.
    """
    num_rows, channels = product.shape
    vec = rows.checked_vec(product.shape, product.dtype)
    lines = (channels // LINE, LINE)
    num_ctas = min(num_rows, CTAS * num_multiprocessors())
    bits, scale = plgpu.kernel(
        functools.partial(
            _body,
            num_ctas=num_ctas,
            layout=plgpu.Layout.WG_STRIDED(lines, vec_size=vec),
            ops=registers if interpret is None else emulated,
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, *lines), jnp.int8),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ),
        scratch_types={
            "x_smem": plgpu.SMEM((SLOTS, *lines), product.dtype),
            "x_full": plgpu.Barrier(num_barriers=SLOTS),
        },
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gelu_rows_sm90",
        interpret=interpret,
    )(
        product.reshape(num_rows, *lines),
        scales,
        columns.reshape(lines),
        bias.reshape(lines),
    )
    values = lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    return values.reshape(product.shape), scale


def _body(
    product_gmem,
    scales_gmem,
    columns_gmem,
    bias_gmem,
    values_gmem,
    scale_gmem,
    *,
    x_smem,
    x_full,
    num_ctas: int,
    layout: Any,
    ops: types.ModuleType,
):
    cta, num_rows = lax.axis_index("cta"), product_gmem.shape[0]

    def fetch(step) -> None:
        row, slot = cta + step * num_ctas, lax.rem(jnp.int32(step), jnp.int32(SLOTS))

        @pl.when(row < num_rows)
        def _():
            target, landed = x_smem.at[slot], x_full.at[slot]
            plgpu.copy_gmem_to_smem(product_gmem.at[row], target, landed)

    def load(ref):
        # Neighbouring lanes read neighbouring vectors, which is not looked into here.
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def take(step, _):
        row, slot = cta + step * num_ctas, lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(x_full.at[slot])
        x = load(x_smem.at[slot])
        y = _gelu(x * scales_gmem[row] * load(columns_gmem) + load(bias_gmem))
        largest = rows.largest_of(y)
        plgpu.commit_smem()  # see the hazard above
        fetch(step + SLOTS)
        rows.store(y, largest, row, values_gmem, scale_gmem, layout, ops)

    for step in range(SLOTS):
        fetch(step)
    count = lax.div(num_rows - cta + num_ctas - 1, jnp.int32(num_ctas))
    lax.fori_loop(0, count, take, None)


def _gelu(x):
    root = lax.rsqrt(1.0 + jnp.exp2(x * (_LINEAR + _LINEAR * _CUBIC * (x * x))))
    return x * (root * root)
