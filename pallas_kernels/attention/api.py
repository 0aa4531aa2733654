"""Block-sparse attention: the public function, its backends, and how one is chosen.

To add a backend, write a module with a `BACKEND` record, add it to `BACKENDS` and
`BackendName`, and put its name where it belongs in `PREFERENCE`.
"""

import dataclasses
import logging
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference as oracle
from pallas_kernels.attention import xla
from pallas_kernels.attention.sm90 import backend as hopper
from pallas_kernels.common import validation
from pallas_kernels.common.device import current_device
from pallas_kernels.common.interfaces import (
    Backend,
    BlockLayout,
    BlockLists,
    Order,
    Problem,
)
from pallas_kernels.common.slow_paths import warn_once

BackendName = Literal["auto", "hopper", "xla", "oracle"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (hopper.BACKEND, xla.BACKEND, oracle.BACKEND)
}

# What "auto" tries on each platform, fastest first: the first backend that supports
# the problem is taken. The oracle is never chosen on its own.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("hopper", "xla"),
    "tpu": ("xla",),
}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The backend a call runs on.

    Attributes:
      name: The backend.
      reason: Why this one, in words.
      slower_because: Why a faster path does not run, or None.
    """

    name: str
    reason: str
    slower_because: str | None = None


@overload
def block_sparse_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockLayout,
    scale: float | None = None,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "tiled",
    backend: BackendName = "auto",
    return_lse: Literal[False] = False,
) -> Float[Array, "B T N D"]: ...


@overload
def block_sparse_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockLayout,
    scale: float | None = None,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "tiled",
    backend: BackendName = "auto",
    return_lse: Literal[True],
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]: ...


def block_sparse_attention(
    q,
    k,
    v,
    mask,
    *,
    grid,
    scale=None,
    text_lengths=None,
    order="tiled",
    backend="auto",
    return_lse=False,
):
    """Softmax attention of each query block over the key blocks it keeps.

    Args:
      q: Queries, text included, T = grid.num_tokens. float32,
        bfloat16 or float16; softmax and sums are float32 in every case. Products of
        float32 inputs follow `jax.default_matmul_precision`: TF32 on NVIDIA GPUs
        unless it says otherwise.
      k: Keys, like q.
      v: Values, like q.
      mask: Kept block pairs per batch item and head, such as a `BlockMask`. Its lists
        are checked outside jit only: there an entry that is no block is an error.
      grid: Geometry of the blocks; must equal `mask.grid`. Static.
      scale: Factor on the logits, a Python number; 1 / sqrt(D) by default.
      text_lengths: Valid text tokens of each batch item, the first ones of the
        text; None means all. Keys past them are not attended to.
      order: How the tokens of q, k, v and of the results are ordered: "tiled", or
        "raster", which is frame, row, column (and which the Hopper kernel reads in
        place where the tile's width divides that of the frame).
      backend: A backend by name, or "auto" for the fastest one that supports the
        inputs on this device; see `chosen_backend`.
      return_lse: Also return the log-sum-exp of the logits.

    Returns:
      The output [B, T, N, D] in q's dtype; with `return_lse` also the natural log
      of each query's sum of exponentials, float32 [B, N, T]. Query blocks that keep
      no key block, queries whose kept keys are all masked, and text queries past
      `text_lengths` get zeros and -inf. Never NaN for finite inputs.

    Raises:
      ValueError: A shape, the mask's grid or lists, a text length, the scale or the
        backend is not acceptable, or the named backend does not support the inputs.
      TypeError: A dtype or the scale's type is not acceptable.
    """
    validation.check_qkv(q, k, v)
    validation.check_tokens(q, grid)
    validation.check_mask(q, mask, grid)
    validation.check_lists(mask)
    scale = validation.check_scale(scale, q.shape[-1])
    text_lengths = validation.check_text_lengths(text_lengths, q, grid)
    validation.check_order(order)
    problem = _describe(q, mask, grid, text_lengths is not None, order)
    choice = choose(problem, backend)
    if choice.slower_because is not None:
        warn_once(
            f"block_sparse_attention runs on backend {choice.name!r}: "
            f"{choice.slower_because}"
        )
    _logger.debug("%s: %s", choice.name, choice.reason)
    chosen = BACKENDS[choice.name]
    options = {"layout": grid, "scale": scale, "text_lengths": text_lengths}
    if chosen.takes_raster:
        out, lse = chosen.function(q, k, v, mask, order=order, **options)
    elif order == "raster":
        q, k, v = (_take(x, grid.tile_order, axis=1) for x in (q, k, v))
        out, lse = chosen.function(q, k, v, mask, **options)
        out = _take(out, grid.raster_order, axis=1)
        lse = _take(lse, grid.raster_order, axis=2)
    else:
        out, lse = chosen.function(q, k, v, mask, **options)
    return (out, lse) if return_lse else out


def chosen_backend(
    q: Float[Array, "B T N D"] | jax.ShapeDtypeStruct,
    mask: BlockLists,
    *,
    grid: BlockLayout,
    text_lengths: Int[Array, " B"] | None = None,
    order: Order = "tiled",
    backend: BackendName = "auto",
) -> BackendChoice:
    """Says which backend a call with these inputs runs on, and why.

    Args:
      q: The queries, or their shape and dtype.
      mask: As passed to `block_sparse_attention`; its leaves may be shapes.
      grid: As passed to `block_sparse_attention`.
      text_lengths: As passed to `block_sparse_attention`.
      order: As passed to `block_sparse_attention`.
      backend: As passed to `block_sparse_attention`.

    Returns:
      The backend's name and the reason.

    Raises:
      ValueError: As `block_sparse_attention` would for the backend.
    """
    problem = _describe(q, mask, grid, text_lengths is not None, order)
    return choose(problem, backend)


def choose(problem: Problem, backend: str) -> BackendChoice:
    """Picks the backend of a problem, or raises ValueError with every reason."""
    if backend != "auto":
        if backend not in BACKENDS:
            accepted = ", ".join(repr(name) for name in ("auto", *BACKENDS))
            raise ValueError(f"{backend=} is unknown; accepted are {accepted}")
        if cause := BACKENDS[backend].why_unsupported(problem):
            raise ValueError(
                f"{backend=} cannot take these inputs: {cause}; backend='auto' would "
                f"run {choose(problem, 'auto').name!r}"
            )
        return BackendChoice(name=backend, reason="named by the caller")
    platform, kind = problem.device.platform, problem.device.kind
    passed_over = []
    for name in PREFERENCE.get(platform, ("xla",)):
        cause = BACKENDS[name].why_unsupported(problem)
        if cause is not None:
            passed_over.append(f"{name!r}: {cause}")
            continue
        reason = f"first choice for {platform} ({kind}) that supports the inputs"
        slower = [*passed_over, BACKENDS[name].why_slow(problem)]
        return BackendChoice(
            name=name,
            reason="; ".join([reason, *passed_over]),
            slower_because="; ".join(filter(None, slower)) or None,
        )
    raise ValueError(f"no backend supports these inputs: {'; '.join(passed_over)}")


def _take(x: jax.Array, indices: np.ndarray, *, axis: int) -> jax.Array:
    return jnp.take(x, indices, axis=axis, unique_indices=True, mode="clip")


def _describe(
    q: jax.Array | jax.ShapeDtypeStruct,
    mask: BlockLists,
    grid: BlockLayout,
    has_text_lengths: bool,
    order: Order,
) -> Problem:
    batch, _, num_heads, head_dim = q.shape
    return Problem(
        batch=batch,
        num_heads=num_heads,
        head_dim=head_dim,
        dtype=q.dtype.name,
        layout=grid,
        capacity=mask.block_ids.shape[-1],
        has_text_lengths=has_text_lengths,
        order=order,
        device=current_device(q),
    )
