"""Normed and plain rows, rounded to FP8, for Hopper.

A CTA of one warpgroup takes a row. It stays in registers from its load to its store, 40
numbers of a thread at 5,120 channels. Factors of channels, which rows share, come from
the first-level cache, which the CTAs of a multiprocessor share.

ptxas, sm_90a, no spills: 136 registers for a norm of 5,120 float32 channels, so three
CTAs of a multiprocessor; 55 for plain rows of as many in bfloat16.

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
    make: Callable[..., Any], given: tuple[Array, ...], name: str, interpret
) -> rows.Rows:
    """Launches a CTA for each row of the first array that is given."""
    num_rows, channels = given[0].shape
    vec = rows.checked_vec(given[0].shape, given[0].dtype)
    bits, scale = plgpu.kernel(
        functools.partial(
            _body,
            make=make,
            layout=plgpu.Layout.WG_STRIDED((channels,), vec_size=vec),
            ops=registers if interpret is None else emulated,
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, channels), jnp.int8),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ),
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )(*given)
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scale


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
    num_rows, channels = x_gmem.shape
    x = load(x_gmem.at[row])
    centred = x - jnp.sum(x) * (1 / channels)
    inverse = lax.rsqrt(jnp.sum(centred * centred) * (1 / channels) + eps)
    item = lax.div(row, jnp.int32(num_rows // factor_gmem.shape[0]))
    factor, shift = (load(ref.at[item]) for ref in (factor_gmem, shift_gmem))
    return centred * inverse * factor + shift


def _widen(load, row, x_gmem):
    return load(x_gmem.at[row])
