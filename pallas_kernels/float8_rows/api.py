"""Between two products in FP8: scales, bias, GELU, and the rounding of each row.

XLA makes such rows twice, once for their maxima and once for their values, with a
tangent of some fifty instructions in both. The kernel for Hopper GPUs reads the product
once and writes FP8 once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.common.arrays import AnyArray
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.device import Device
from pallas_kernels.common.sharding import (
    Axes,
    lists_of_maps,
    over_explicit_axes,
    partitioned,
    vary_alike,
)
from pallas_kernels.common.static import jit_once
from pallas_kernels.float8_rows import sm90


def gelu_tanh(x: Float[AnyArray, "*axes"]) -> Float[Array, "*axes"]:
    """Applies GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def gelu_rows(
    product: Float[AnyArray, "*rows K"],
    rows: Float[AnyArray, "*rows"],
    columns: Float[AnyArray, " K"],
    bias: Float[AnyArray, " K"] | None = None,
) -> tuple[Float8e4m3fn[Array, "*rows K"], Float[Array, "*rows"]]:
    """Computes `gelu_tanh(product * rows * columns + bias)`, and rounds rows to FP8.

    A row is divided by its scale, so that its largest value becomes 448, the largest of
    e4m3. What is not finite makes its row not finite. It has no derivative. Rows may be
    sharded over devices.

    Args:
      product: A product of FP8 numbers, without their scales, bfloat16 or float16.
      rows: Scale of each of its rows, float32.
      columns: Scale of each of its columns, float32.
      bias: Added after scaling, float32.

    Returns:
      Values and float32 scales; what they stand for is the product of both.

    Raises:
      ValueError: The kernel does not take such a product on any device: see
        `why_not_in_kernel`.
    """
    if cause := sm90.kernel.why_unsupported(product.shape, product.dtype):
        raise ValueError(f"gelu_rows cannot take this product: {cause}")
    bias = jnp.zeros(columns.shape, jnp.float32) if bias is None else bias
    return _gelu_rows(*map(jnp.asarray, (product, rows, columns, bias)))


def why_not_in_kernel(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, device: Device
) -> str | None:
    """Returns why the kernel does not take such products on a device, or None.

    Args:
      shape: That of the product.
      dtype: Of the product.
      device: Device that it would run on.
    """
    return device.why_not_hopper() or sm90.kernel.why_unsupported(shape, dtype)


@jit_once
def _gelu_rows(product, *scales):
    lead = lists_of_maps(product.ndim - 1)
    axes = Axes(
        operation="GELU of rows in FP8",
        operands=(f"product: {lead} K", f"rows: {lead}", "columns: K", "bias: K"),
        results=(f"{lead} K", lead),
    )

    def run(*arrays):
        call = fold_mapped_axes(partitioned(_run, axes), num_shared=2)
        return tuple(call(*vary_alike(arrays)))

    arrays = (product, *(x.astype(jnp.float32) for x in scales))
    return over_explicit_axes(
        run, operation=axes.operation, operands=axes.operands, results=axes.results
    )(*arrays)


def _run(product, rows, columns, bias):
    lead = product.shape[:-1]
    count = int(np.prod(lead))
    flat = product.reshape(count, product.shape[-1]), rows.reshape(count)
    values, scale = sm90.kernel.gelu_rows(*flat, columns, bias)
    return values.reshape(product.shape), scale.reshape(lead)
