"""Block-sparse attention: public functions, backends, and how one is chosen.

To add a backend, write a module with a `BACKEND` record, add it to `BACKENDS` and
`BackendName`, and put its name where it belongs in `PREFERENCE`.
"""

import dataclasses
import functools
import logging
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference as oracle
from pallas_kernels.attention import sm90, xla
from pallas_kernels.attention.derivatives import AXES, AXES_OF_MEANS
from pallas_kernels.attention.means import Means
from pallas_kernels.common import AnyArray, Scale, to_jax, validation
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.interfaces import (
    Backend,
    BlockGrid,
    BlockLists,
    Order,
    Problem,
)
from pallas_kernels.common.sharding import over_explicit_axes
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import jit_once, split_scale
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.common.token_order import reorder_tokens

BackendName = Literal["auto", "hopper", "xla", "oracle"]

# Stands for the Hopper backend's record, whose kernels the first use imports.
_HOPPER = Backend(
    name="hopper",
    function=lambda *arrays, **options: sm90.backend.BACKEND.function(
        *arrays, **options
    ),
    why_unsupported=lambda problem: sm90.backend.BACKEND.why_unsupported(problem),
    why_slow=lambda problem: sm90.backend.BACKEND.why_slow(problem),
    takes_raster=True,
)

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (_HOPPER, xla.BACKEND, oracle.BACKEND)
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


def block_sparse_attention(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    order: Order,
    scale: Scale | None = None,
    text_lengths: Int[AnyArray, " B"] | None = None,
    means: Means | None = None,
    backend: BackendName = "auto",
) -> Float[Array, "B T N D"]:
    """Computes softmax attention of each query block over the key blocks it keeps.

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
      order: How the tokens of q, k, v and of the output are ordered: "raster", which
        is frame, row, column, or "tiled". Required: a wrong order gives wrong numbers
        without an error. The Hopper kernel reads raster order in place where the
        tile's width divides that of the frame.
      scale: Factor on the logits, 1 / sqrt(D) by default: a number, or a scalar array,
        which may be traced and is not checked. Kernels for GPUs multiply an array
        into q, rounded to its dtype; XLA multiplies in float32.
      text_lengths: Valid text tokens of each batch item, the first ones of the
        text; None means all. Keys past them are not attended to.
      means: Means of keys and values that stand for the skipped blocks, in the same
        softmax; None leaves them out. Gradients flow to its k and v.
      backend: A backend by name, or "auto" for the fastest one that supports the
        inputs on this device; see `chosen_backend`.

    Returns:
      The output in q's dtype. Query blocks that keep no key block, queries whose kept
      keys are all masked, and text queries past `text_lengths` get zeros. Never NaN
      for finite inputs.

    Raises:
      ValueError: A shape, the mask's grid or lists, a text length, the scale or the
        backend is not acceptable, or the named backend does not support the inputs.
      TypeError: A dtype or the scale's type is not acceptable.
    """
    q, k, v = to_jax(q, k, v)
    scale, text_lengths = validation.check_attention(
        q, k, v, grid=grid, order=order, scale=scale, text_lengths=text_lengths
    )
    validation.check_mask(q, mask, grid)
    validation.check_lists(mask)
    means = _checked_means(means, q, grid)
    return unchecked_block_sparse_attention(
        q,
        k,
        v,
        mask,
        grid=grid,
        order=order,
        scale=scale,
        text_lengths=text_lengths,
        means=means,
        backend=backend,
    )


def block_sparse_attention_with_lse(
    q: Float[AnyArray, "B T N D"],
    k: Float[AnyArray, "B T N D"],
    v: Float[AnyArray, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    order: Order,
    scale: Scale | None = None,
    text_lengths: Int[AnyArray, " B"] | None = None,
    means: Means | None = None,
    backend: BackendName = "auto",
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Computes `block_sparse_attention` and the log-sum-exp of the logits.

    Args:
      q: See `block_sparse_attention`, like all other arguments.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      order: How the tokens of q, k, v and of both results are ordered. Required.
      scale: Factor on the logits.
      text_lengths: Valid text tokens of each batch item.
      means: What stands for skipped blocks.
      backend: A backend by name, or "auto".

    Returns:
      The output, and the natural log of each query's sum of exponentials in float32.
      Queries without a valid key get zeros and -inf.

    Raises:
      ValueError: As `block_sparse_attention`.
      TypeError: As `block_sparse_attention`.
    """
    q, k, v = to_jax(q, k, v)
    scale, text_lengths = validation.check_attention(
        q, k, v, grid=grid, order=order, scale=scale, text_lengths=text_lengths
    )
    validation.check_mask(q, mask, grid)
    validation.check_lists(mask)
    means = _checked_means(means, q, grid)
    return _dispatch(
        q,
        k,
        v,
        mask,
        grid=grid,
        order=order,
        scale=scale,
        text_lengths=text_lengths,
        means=means,
        backend=backend,
        with_lse=True,
    )


def unchecked_block_sparse_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    order: Order,
    scale: Scale,
    text_lengths: Int[Array, " B"] | None,
    means: Means | None = None,
    backend: BackendName,
) -> Float[Array, "B T N D"]:
    """Computes `block_sparse_attention` for a caller that checks arguments.

    Args:
      q: See `block_sparse_attention`, like all other arguments.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      order: How the tokens of q, k, v and of the output are ordered.
      scale: Factor on the logits, as `validation.check_attention` returns it.
      text_lengths: Valid text tokens, as `validation.check_attention` returns them.
      means: What stands for skipped blocks.
      backend: A backend by name, or "auto".

    Returns:
      The output.

    Raises:
      ValueError: The backend is unknown or does not support the inputs.
    """
    out, _ = _dispatch(
        q,
        k,
        v,
        mask,
        grid=grid,
        order=order,
        scale=scale,
        text_lengths=text_lengths,
        means=means,
        backend=backend,
        with_lse=False,
    )
    return out


def _dispatch(
    q, k, v, mask, *, grid, order, scale, text_lengths, means, backend, with_lse: bool
) -> Any:
    """Chooses a backend and runs it; the log-sum-exp is None where it is not asked."""
    device = current_device(q)
    sub_tiles = None if means is None else means.sub_tiles
    problem = _describe(q, grid, order, device, sub_tiles=sub_tiles)
    choice = choose(problem, backend)
    if choice.slower_because is not None:
        warn_once(
            f"block_sparse_attention runs on backend {choice.name!r}: "
            f"{choice.slower_because}"
        )
    _logger.debug("%s: %s", choice.name, choice.reason)
    known_scale, scale_array = split_scale(scale)
    return _attend(
        q,
        k,
        v,
        mask.row_offsets,
        mask.block_ids,
        text_lengths,
        scale_array,
        means,
        grid=grid,
        order=order,
        scale=known_scale,
        backend=BACKENDS[choice.name],
        device=device,
        with_lse=with_lse,
    )


def _checked_means(
    means: Means | None, q: Float[Array, "B T N D"], grid: BlockGrid
) -> Means | None:
    """Returns means whose arrays are jax's; raises unless they fit q and the grid."""
    if means is None:
        return None
    if not isinstance(means, Means):
        raise TypeError(
            f"means is {type(means).__name__}; expected Means, such as of "
            "draft_jax.make_means, or None"
        )
    k, v, dropped = to_jax(*means[:3])
    means = Means(k, v, dropped, means.sub_tiles)
    validation.check_means(q, means, grid)
    return means


class _Lists(NamedTuple):
    """The lists of a mask, of whatever class, as backends take them."""

    row_offsets: Int[Array, "B N R+1"]
    block_ids: Int[Array, "B N M"]
    grid: Any


@functools.partial(
    jit_once,
    static_argnames=("grid", "order", "scale", "backend", "device", "with_lse"),
)
def _attend(*arrays, **options):
    """Runs a backend on the batch items and heads that each device has."""
    axes_of_means: Any = "means:"
    if (means := arrays[-1]) is not None:
        axes_of_means = jax.tree.unflatten(jax.tree.structure(means), AXES_OF_MEANS)
    run = over_explicit_axes(
        functools.partial(_attend_where_arrays_are, **options),
        operation=AXES.operation,
        operands=(*AXES.operands, "scale:", axes_of_means),
        results=AXES.results if options["with_lse"] else (AXES.results[0], None),
    )
    return run(*arrays)


def _attend_where_arrays_are(
    q,
    k,
    v,
    row_offsets,
    block_ids,
    text_lengths,
    scale_array,
    means,
    *,
    grid: BlockGrid,
    order: Order,
    scale: float | None,
    backend: Backend,
    device: Device,
    with_lse: bool,
):
    """Runs a backend, in tiled order if it takes no other.

    A result that nobody asked for is none of the program's: the log-sum-exp may be
    minus infinity, at which `jax_debug_infs` would stop.
    """
    mask = _Lists(row_offsets, block_ids, grid)
    options: dict[str, Any] = {
        "grid": grid,
        "scale": scale_array if scale is None else scale,
        "text_lengths": text_lengths,
        "device": device,
    }
    if means is not None:
        options["means"] = means
    if backend.takes_raster:
        out, lse = backend.function(q, k, v, mask, order=order, **options)
        return out, lse if with_lse else None
    if order == "tiled":
        out, lse = backend.function(q, k, v, mask, **options)
        return out, lse if with_lse else None
    q, k, v = (reorder_tokens(x, grid, to="tiled", axis=1) for x in (q, k, v))
    out, lse = backend.function(q, k, v, mask, **options)
    out = reorder_tokens(out, grid, to="raster", axis=1)
    return out, reorder_tokens(lse, grid, to="raster", axis=2) if with_lse else None


def chosen_backend(
    q: Float[Array, "B T N D"] | jax.ShapeDtypeStruct,
    *,
    grid: BlockGrid,
    order: Order,
    sub_tiles: SubTiles | None = None,
    backend: BackendName = "auto",
) -> BackendChoice:
    """Says which backend a call with such queries runs on, and why.

    Args:
      q: The queries, or their shape and dtype.
      grid: As passed to `block_sparse_attention`.
      order: As passed to `block_sparse_attention`. Required.
      sub_tiles: Those of the means that `block_sparse_attention` is given, if any.
      backend: As passed to `block_sparse_attention`.

    Returns:
      The backend's name and the reason. Neither the mask nor text lengths matter.

    Raises:
      ValueError: As `block_sparse_attention` would for the order or the backend.
    """
    validation.check_order(order)
    problem = _describe(q, grid, order, current_device(q), sub_tiles=sub_tiles)
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


def _describe(
    q: jax.Array | jax.ShapeDtypeStruct,
    grid: BlockGrid,
    order: Order,
    device: Device,
    *,
    sub_tiles: SubTiles | None,
) -> Problem:
    return Problem(
        head_dim=q.shape[-1],
        dtype=q.dtype.name,
        grid=grid,
        order=order,
        device=device,
        sub_tiles=sub_tiles,
    )
