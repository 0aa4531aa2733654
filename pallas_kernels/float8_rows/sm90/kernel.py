"""Rows that are made, and rounded to FP8, one after another, for Hopper.

A CTA of one warpgroup takes a row. It stays in registers from its load to its store:
108 numbers of a thread at 13,824 channels, 40 at 5,120. What all rows share (scales of
columns, factors of channels) comes from the first-level cache, which the CTAs of a
multiprocessor share.

How a row is made is a function of `load`, of the row's index and of what the kernel is
given, in the order in which its caller gives it.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.float8_rows.interfaces import LARGEST, LEAST_MAXIMUM
from pallas_kernels.float8_rows.sm90 import emulated, registers

DTYPES = ("float32", "bfloat16", "float16")
THREADS = 128  # of a warpgroup
LOAD_BYTES = 16  # of a thread at once, at most
STORE_CHANNELS = 4  # of a thread at once, at least: a word of FP8
MAX_CHANNELS = 128 * THREADS  # that registers hold
# gelu(x) = x * sigmoid(2u) of u = sqrt(2 / pi) (x + 0.044715 x^3), by powers of two.
_CUBIC, _LINEAR = 0.044715, -2 * math.sqrt(2 / math.pi) * math.log2(math.e)

Rows = tuple[Float8e4m3fn[Array, "R K"], Float[Array, " R"]]


def gelu_rows(
    product: Float[Array, "R K"],
    rows: Float[Array, " R"],
    columns: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Rows:
    """Computes rows in FP8; see `pallas_kernels.float8_rows.gelu_rows`.

    Args:
      product: As there.
      rows: As there.
      columns: As there.
      bias: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take this product on any device.
    """
    given = (product, rows, columns, bias)
    return _round(_gelu, given, "gelu_rows_sm90", interpret)


def norm_rows(
    x: Float[Array, "R K"],
    factor: Float[Array, "B K"],
    shift: Float[Array, "B K"],
    *,
    eps: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Rows:
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
) -> Rows:
    """Computes rows in FP8; see `pallas_kernels.float8_rows.round_rows`.

    Args:
      x: As there.
      interpret: Run on the CPU in GPU interpret mode.

    Raises:
      ValueError: The kernel cannot take these rows on any device.
    """
    return _round(_widen, (x,), "round_rows_sm90", interpret)


def why_unsupported(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernels take such rows on no device, or None.

    Args:
      shape: That of the rows.
      dtype: Of the rows.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        return f"they take {', '.join(DTYPES)}, not {jnp.dtype(dtype).name}"
    channels = shape[-1]
    if _vec(channels, dtype) is None or channels > MAX_CHANNELS:
        return (
            f"they take a multiple of {THREADS * STORE_CHANNELS} channels up to "
            f"{MAX_CHANNELS}, not {channels}"
        )
    return None


def _vec(channels: int, dtype: jax.typing.DTypeLike) -> int | None:
    """Returns how many channels a thread loads together; None where none fits."""
    widest = LOAD_BYTES // jnp.dtype(dtype).itemsize
    choices = (widest, STORE_CHANNELS)  # widest first
    fitting = (vec for vec in choices if channels and channels % (THREADS * vec) == 0)
    return next(fitting, None)


def _round(
    make: Callable[..., Any], given: tuple[Array, ...], name: str, interpret
) -> Rows:
    """Launches a CTA for each row of the first array that is given."""
    num_rows, channels = given[0].shape
    if cause := why_unsupported(given[0].shape, given[0].dtype):
        raise ValueError(f"the kernels for rows in FP8 cannot take them: {cause}")
    vec = _vec(channels, given[0].dtype)
    assert vec is not None, "see why_unsupported"
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
    largest = jnp.maximum(jnp.max(jnp.abs(y)), LEAST_MAXIMUM)
    values_gmem[row] = ops.to_float8(y * (LARGEST / largest), layout)
    scale_gmem[row] = largest * (1 / LARGEST)


# ------------------------------------------------------------------ how a row is made


def _gelu(load, row, product_gmem, rows_gmem, columns_gmem, bias_gmem):
    x = load(product_gmem.at[row])
    x = x * rows_gmem[row] * load(columns_gmem) + load(bias_gmem)
    root = lax.rsqrt(1.0 + jnp.exp2(x * (_LINEAR + _LINEAR * _CUBIC * (x * x))))
    return x * (root * root)


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
