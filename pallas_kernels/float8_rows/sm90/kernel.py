"""Scales, bias, GELU and rounding to FP8 of one row after another, for Hopper.

A CTA of one warpgroup takes a row. It stays in registers from its load to its store:
108 numbers of a thread at 13,824 channels. Scales of columns and the bias come from the
first-level cache, where the CTAs of a multiprocessor share them.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.float8_rows.interfaces import LARGEST, LEAST_MAXIMUM
from pallas_kernels.float8_rows.sm90 import emulated, registers

DTYPES = ("bfloat16", "float16")  # of products
THREADS = 128  # of a warpgroup
VECTORS = (8, 4)  # channels of a thread that are loaded together, widest first
MAX_CHANNELS = 128 * THREADS  # that registers hold
# gelu(x) = x * sigmoid(2u) of u = sqrt(2 / pi) (x + 0.044715 x^3), by powers of two.
_CUBIC, _LINEAR = 0.044715, -2 * math.sqrt(2 / math.pi) * math.log2(math.e)


def gelu_rows(
    product: Float[Array, "R K"],
    rows: Float[Array, " R"],
    columns: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float8e4m3fn[Array, "R K"], Float[Array, " R"]]:
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
    if cause := why_unsupported(product.shape, product.dtype):
        raise ValueError(f"the kernel for rows in FP8 cannot take them: {cause}")
    ops = registers if interpret is None else emulated
    num_rows, channels = product.shape
    vec = vec_of(channels)
    assert vec is not None, "see why_unsupported"
    bits, scale = plgpu.kernel(
        functools.partial(_body, vec=vec, ops=ops),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, channels), jnp.int8),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ),
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gelu_rows_sm90",
        interpret=interpret,
    )(product, rows, columns, bias)
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), scale


def why_unsupported(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernel takes such a product on no device, or None.

    Args:
      shape: That of the product.
      dtype: Of the product.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, not {jnp.dtype(dtype).name}"
    channels = shape[-1]
    if vec_of(channels) is None or channels > MAX_CHANNELS:
        return (
            f"it takes a multiple of {THREADS * VECTORS[-1]} channels up to "
            f"{MAX_CHANNELS}, not {channels}"
        )
    return None


def vec_of(channels: int) -> int | None:
    """Returns how many channels a thread loads together; None where none fits."""
    fitting = (vec for vec in VECTORS if channels and channels % (THREADS * vec) == 0)
    return next(fitting, None)


def _body(
    product_gmem,
    rows_gmem,
    columns_gmem,
    bias_gmem,
    values_gmem,
    scale_gmem,
    *,
    vec: int,
    ops: types.ModuleType,
):
    row = lax.axis_index("row")
    channels = product_gmem.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((channels,), vec_size=vec)

    def load(ref):
        # Neighbouring lanes read neighbouring vectors, which is not looked into here.
        return plgpu.load(ref, layout=layout, optimized=False)

    x = load(product_gmem.at[row]).astype(jnp.float32)
    x = x * rows_gmem[row] * load(columns_gmem) + load(bias_gmem)
    root = lax.rsqrt(1.0 + jnp.exp2(x * (_LINEAR + _LINEAR * _CUBIC * (x * x))))
    y = x * (root * root)
    largest = jnp.maximum(jnp.max(jnp.abs(y)), LEAST_MAXIMUM)
    values_gmem[row] = ops.to_float8(y * (LARGEST / largest), layout)
    scale_gmem[row] = largest * (1 / LARGEST)
