"""Adds an affine map of the query, one of each head, to attention's output.

One kernel for Hopper GPUs, which reads queries and output once and writes the sum: XLA
writes the product out between the two, and copies the queries for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.linear_maps import (
    kernel_on_own_shards,
    with_derivatives_on_own_shards,
)
from pallas_kernels.common.sharding import Axes
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import jit_once
from pallas_kernels.query_map import sm90


def unchecked_add_query_map(
    out: Float[Array, "B T N D"],
    q: Float[Array, "B T N D"],
    matrix: Float[Array, "B N D E"],
    offset: Float[Array, "B N E"],
    *,
    tokens: tuple[int, int],
) -> Float[Array, "B T N D"]:
    """Computes out + q @ matrix + offset of some tokens; others stay as they are.

    Products are of numbers in the dtype of q, and are summed in float32, in which the
    output is added. Derivatives are those of XLA. On a GPU where the kernel cannot
    run, a warning says why, once.

    Args:
      out: What is added to, in the dtype of q.
      q: Queries.
      matrix: Of each batch item and head; E is D.
      offset: Likewise.
      tokens: The first token that the map is added to, and the one after the last.

    Returns:
      The sum, in the dtype of out.
    """
    device = current_device(q)
    cause = why_not_in_kernel(q.shape, q.dtype, device)
    if cause is not None and device.platform == "gpu":
        warn_once(f"the map of queries runs on XLA instead of its kernel: {cause}")
    in_kernel = cause is None
    return _add(out, q, matrix, offset, tokens=tokens, in_kernel=in_kernel)


def why_not_in_kernel(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, device: Device
) -> str | None:
    """Returns why the kernel does not take such queries on a device, or None.

    Args:
      shape: That of the queries.
      dtype: Theirs.
      device: Device that it would run on.
    """
    return device.why_not_hopper() or sm90.kernel.why_unsupported(shape, dtype)


@functools.partial(jit_once, static_argnames=("tokens", "in_kernel"))
def _add(out, q, matrix, offset, *, tokens: tuple[int, int], in_kernel: bool):
    def by_xla(*arrays):
        return (_by_xla(*arrays, tokens=tokens),)

    def kernel(*arrays):
        return (sm90.kernel.add_query_map(*arrays, tokens=tokens),)

    if in_kernel:
        run = kernel_on_own_shards(kernel, by_xla, _AXES)
    else:
        run = with_derivatives_on_own_shards(by_xla, _AXES)
    return run(out, q, matrix, offset)[0]


def _by_xla(out, q, matrix, offset, *, tokens: tuple[int, int]):
    # In the queries' dtype, as it is small beside the output.
    moved = jnp.einsum("btnd,bnde->btne", q, matrix.astype(q.dtype))
    is_mapped = np.zeros(q.shape[1], np.bool_)
    is_mapped[slice(*tokens)] = True
    change = jnp.where(is_mapped[:, None, None], moved + offset[:, None], 0.0)
    return (out.astype(jnp.float32) + change).astype(out.dtype)


_AXES = Axes(
    operation="add_query_map",
    operands=("out: B T N D", "q: B T N D", "matrix: B N D E", "offset: B N E"),
    results=("B T N D",),
)
