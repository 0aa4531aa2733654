"""Normed, summed and plain rows, rounded to FP8, for Hopper.

A CTA of one warpgroup takes a row. It stays in registers from its load to its store, 40
numbers of a thread at 5,120 channels. Factors of channels, which rows share, come from
the first-level cache, which the CTAs of a multiprocessor share.

ptxas, sm_90a, no spills: 136 registers for a norm of 5,120 float32 channels, 154 for
that of a sum, so three CTAs of a multiprocessor; 55 for plain rows of as many in
bfloat16.

How a row is made is a function of `load`, of the row's index and of what the kernel is
given, in the order in which its caller gives it.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.float8_rows.sm90 import emulated, registers, rows


def norm_rows(
    x: Float[Array, "R K"],
    factor: Float[Array, "B K"],
    shift: Float[Array, "B K"],
    *,
    eps: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> rows.Rows:
    """Computes rows in FP8; see `pallas_kernels.float8_rows.norm_rows`.

    Args:
      x: Rows of one batch item after the other, as many of each.
      factor: As there.
      shift: As there.
      eps: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these rows on any device.
    """
    make = functools.partial(_norm, eps=eps)
    return _round(make, (x, factor, shift), "norm_rows_sm90", interpret)


def add_norm_rows(
    x: Float[Array, "R K"],
    product: Float[Array, "R K"],
    scales: Float[Array, " R"],
    columns: Float[Array, "B K"],
    bias: Float[Array, "B K"],
    factor: Float[Array, "B K"],
    shift: Float[Array, "B K"],
    *,
    eps: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "R K"], *rows.Rows]:
    """Computes sums, and their rows; see `pallas_kernels.float8_rows.add_norm_rows`.

    Args:
      x: Rows of one batch item after the other, as many of each.
      product: Rows to scale and to add.
      scales: Of rows of the product.
      columns: Scales of its columns with the gate of an item.
      bias: Of the product, with the gate of an item.
      factor: As there.
      shift: As there.
      eps: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these rows on any device.
    """
    make = functools.partial(_add_norm, eps=eps)
    given = (x, product, scales, columns, bias, factor, shift)
    return _round(make, given, "add_norm_rows_sm90", interpret, (x,))


def round_rows(
    x: Float[Array, "R K"], *, interpret: plgpu.InterpretGPUParams | None = None
) -> rows.Rows:
    """Computes rows in FP8; see `pallas_kernels.float8_rows.round_rows`.

    Args:
      x: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these rows on any device.
    """
    return _round(_widen, (x,), "round_rows_sm90", interpret)


def _round(
    make: Callable[..., Any],
    given: tuple[Array, ...],
    name: str,
    interpret,
    more: tuple[Array, ...] = (),
) -> Any:
    """Launches a CTA for each row of the first array that is given.

    `make` gets those arrays, and then results like the arrays of `more`.
    """
    num_rows, channels = given[0].shape
    vec = rows.checked_vec(given[0].shape, given[0].dtype)
    *made, bits, scale = plgpu.kernel(
        functools.partial(
            _body,
            make=make,
            layout=plgpu.Layout.WG_STRIDED((channels,), vec_size=vec),
            ops=registers if interpret is None else emulated,
        ),
        out_type=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in more),
            jax.ShapeDtypeStruct((num_rows, channels), jnp.int8),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ),
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )(*given)
    return *made, lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scale


def _body(*refs, make: Callable[..., Any], layout: Any, ops: types.ModuleType):
    *given, values_gmem, scale_gmem = refs
    row = lax.axis_index("row")

    def load(ref):
        # Neighbouring lanes read neighbouring vectors, which is not looked into here.
        x = plgpu.load(ref, layout=layout, optimized=False)
        return x.astype(jnp.float32)

    y = make(load, row, *given)
    rows.store(y, rows.largest_of(y), row, values_gmem, scale_gmem, layout, ops)


# ------------------------------------------------------------------ how a row is made


def _norm(load, row, x_gmem, factor_gmem, shift_gmem, *, eps: float):
    item = _item(row, x_gmem, factor_gmem)
    factors = (factor_gmem.at[item], shift_gmem.at[item])
    return _normed(load, load(x_gmem.at[row]), factors, eps)


def _add_norm(load, row, x_gmem, product_gmem, scales_gmem, *refs, eps: float):
    *of_items, sum_gmem = refs
    item = _item(row, x_gmem, of_items[0])
    columns_gmem, bias_gmem, *factors = (ref.at[item] for ref in of_items)
    product = load(product_gmem.at[row]) * scales_gmem[row]
    x = load(x_gmem.at[row]) + (product * load(columns_gmem) + load(bias_gmem))
    x = x.astype(sum_gmem.dtype)
    sum_gmem[row] = x
    return _normed(load, x.astype(jnp.float32), factors, eps)


def _item(row, x_gmem, of_items):
    """Returns the batch item of a row."""
    return lax.div(row, jnp.int32(x_gmem.shape[0] // of_items.shape[0]))


def _normed(load, x, factors, eps: float):
    channels = x.size
    centred = x - jnp.sum(x) * (1 / channels)
    inverse = lax.rsqrt(jnp.sum(centred * centred) * (1 / channels) + eps)
    factor, shift = map(load, factors)
    return centred * inverse * factor + shift


def _widen(load, row, x_gmem):
    return load(x_gmem.at[row])
