"""Norm, rotation and pooling of queries and keys.

There is one kernel for Hopper GPUs and XLA operations for the rest. On a GPU where the
kernel cannot run, a warning says why, once.
"""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.common.device import current_device
from pallas_kernels.common.linear_maps import sealed
from pallas_kernels.common.products import Product, check_product
from pallas_kernels.common.sharding import Axes, over_explicit_axes, vary_alike
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import jit_once
from pallas_kernels.pooling import sm90, xla
from pallas_kernels.pooling.interfaces import (
    QKV,
    MeanSquares,
    Projected,
    QKNorm,
    Reduction,
    Rope,
    Scales,
    Tiling,
)
from pallas_kernels.pooling.tiles import pool_tiles


def norm_rope_pool(
    q: Projected,
    k: Projected,
    tiling: Tiling,
    *,
    norm: QKNorm | None = None,
    scales: Scales | None = None,
    text_scales: Scales | None = None,
    rope: Rope | None = None,
    mean_squares: MeanSquares | None = None,
    reductions: tuple[Reduction, ...] = ("mean",),
    pool_anyway: bool = True,
) -> tuple[
    Float[Array, "B T N D"],
    Float[Array, "B T N D"],
    tuple[Float[Array, "B S N D"], ...] | None,
]:
    """Norms and rotates queries and keys, and pools the tiles of the results.

    Norm and rotation are float32; values are rounded to the dtype of q once, after
    both, and pooled as rounded. One pass where a kernel can, XLA operations elsewhere.
    Tokens outside the frames are neither rotated nor pooled. No gradient flows through
    the pooled values.

    Args:
      q: Queries of the whole sequence as projected. The kernel finishes a `Product` as
        it reads, and rounds it to its dtype before the norm.
      k: Keys, like q.
      tiling: Tiles of the frames. Static.
      norm: RMS norm to apply, or None. Static.
      scales: Factors of the channels of q and of k after the norm: N * D for a norm
        over all heads, D for one per head.
      text_scales: Factors for the tokens outside the frames, like scales. None takes
        scales for them too.
      rope: Cosine and sine of each channel pair (2i, 2i + 1) of a head, one row for
        each token of the frames in their order, D / 2 columns. None does not rotate.
      mean_squares: Of the tokens of q and of k over all heads, where q and k have some
        of the heads; for a norm over heads. None computes them.
      reductions: What to compute of each tile; none pools nothing. Static.
      pool_anyway: False does not pool where that would take a pass of its own.

    Returns:
      q and k in their dtype, and float32 reductions of q in the order of `reductions`,
      then those of k, or None where nothing was pooled.

    Raises:
      ValueError: Scales are given without a norm or a norm without scales, mean squares
        without a norm over heads, or the shape of one of them or of rope does not fit
        q.
    """
    task = _Task(tiling=tiling, norm=norm, reductions=reductions)
    written, pooled = _prepare(
        task,
        {"q": q, "k": k},
        None,
        scales,
        text_scales,
        rope,
        mean_squares,
        pool_anyway=pool_anyway,
    )
    return *written, pooled


def joint_norm_rope_pool(
    video: QKV,
    text: QKV,
    tiling: Tiling,
    *,
    norm: QKNorm | None = None,
    scales: Scales | None = None,
    text_scales: Scales | None = None,
    rope: Rope | None = None,
    reductions: tuple[Reduction, ...] = ("mean",),
    pool_anyway: bool = True,
) -> tuple[
    Float[Array, "B T N D"],
    Float[Array, "B T N D"],
    Float[Array, "B T N D"],
    tuple[Float[Array, "B S N D"], ...] | None,
]:
    """Computes `norm_rope_pool` of the joint sequence of a video and its text.

    The results are those of concatenated arrays. Where a kernel can, it reads both
    parts and writes the joint arrays: no other copy is made.

    Args:
      video: Arrays of the tokens of the frames, as projected.
      text: Arrays of the text. Where it stands, `tiling.start` says: 0 for after the
        video, the number of text tokens for before it.
      tiling: Tiles of the frames in the joint sequence. Static.
      norm: See `norm_rope_pool`, like all arguments below.
      scales: Factors of the channels after the norm.
      text_scales: Factors for the text.
      rope: Cosine and sine of each channel pair of the frames' tokens.
      reductions: What to compute of each tile.
      pool_anyway: False does not pool where that would take a pass of its own.

    Returns:
      q, k and v of the joint sequence in their dtype; v is only copied. Then the
      reductions, as `norm_rope_pool`.

    Raises:
      ValueError: As `norm_rope_pool`.
    """
    task = _Task(tiling=tiling, norm=norm, reductions=reductions)
    written, pooled = _prepare(
        task,
        {f"video.{name}": x for name, x in video._asdict().items()},
        {f"text.{name}": x for name, x in text._asdict().items()},
        scales,
        text_scales,
        rope,
        None,
        pool_anyway=pool_anyway,
    )
    return *written, pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """The static arguments of norm, rotation and pooling."""

    tiling: Tiling
    norm: QKNorm | None
    reductions: tuple[Reduction, ...]

    @property
    def needs_all_heads(self) -> bool:
        """Whether the heads of a token are normed together."""
        return self.norm is not None and self.norm.over == "heads"

    @property
    def tokens(self) -> str:
        """Axes of arrays of tokens: what may be sharded, see `common.sharding`."""
        return f"B T {'all_heads' if self.needs_all_heads else 'N'} D"

    @property
    def tiles(self) -> str:
        """Axes of pooled arrays."""
        return f"B S {'all_heads' if self.needs_all_heads else 'N'} D"

    def operands(
        self, video: tuple[Product, ...], text: tuple[Product, ...] | None
    ) -> tuple[Any, ...]:
        """Returns names and axes of the arguments of `_norm_rope`."""
        rows, channels = self.tokens.rsplit(maxsplit=2)[0], self.tokens.split()[2:]
        axes = Product(self.tokens, rows, *(" ".join(channels),) * 2)

        def name(part: str, product: Product) -> Product:
            pairs = zip(axes, product, strict=True)
            names = (None if x is None else f"{part}: {own}" for own, x in pairs)
            return Product(*names)

        of_video = tuple(name("video", x) for x in video)
        of_text = None if text is None else tuple(name("text", x) for x in text)
        shared = ("scales: C", "text_scales: C", "rope: V half")
        return of_video, of_text, *shared, "mean_squares: B T"


def _prepare(
    task: _Task,
    video,
    text,
    scales,
    text_scales,
    rope,
    mean_squares,
    *,
    pool_anyway: bool,
):
    """Checks, chooses the kernel or XLA, and returns written and pooled arrays.

    `video` is q and k of the whole sequence where `text` is None.
    """
    video = _products(video)
    text = None if text is None else _products(text)
    q = video[0].values
    _check_norm(q, task.norm, scales, text_scales)
    _check_rope(q, rope, task.tiling.tokens)
    _check_mean_squares(q, task.norm, mean_squares)
    device = current_device(q)
    cause = sm90.norm_rope_pool.why_unsupported(
        q.shape,
        q.dtype,
        task.norm,
        device,
        has_mean_squares=mean_squares is not None,
    )
    arrays = (video, text, scales, text_scales, rope, mean_squares)
    if cause is None:
        written, pooled = _fused(task, *arrays)
        return written, pooled if task.reductions else None
    if device.is_hopper:
        warn_once(f"norm_rope_pool runs as XLA operations: {cause}")
    written = _norm_rope(task, *arrays)
    if not (task.reductions and pool_anyway):
        return written, None
    q, k = jax.lax.stop_gradient(written[:2])
    return written, pool_tiles(q, k, task.tiling, reductions=task.reductions)


@functools.partial(jit_once, static_argnums=0)
def _norm_rope(task: _Task, video, text, scales, text_scales, rope, mean_squares):
    tiling = task.tiling
    video = tuple(x.finished() for x in video)
    if text is not None:
        text = tuple(x.finished() for x in text)
        video = xla.join_text(video, text, tiling)
    q, k, *rest = video
    prepared = xla.norm_rope(
        q,
        k,
        scales,
        text_scales,
        rope,
        visual_tokens=tiling.tokens,
        norm=task.norm,
        mean_squares=mean_squares,
    )
    return *prepared, *rest


@functools.partial(jit_once, static_argnums=0)
def _fused(task: _Task, *arrays):
    def run(*arguments):
        # A gradient of what devices share, such as scales, is then summed over them.
        leaves, tree = jax.tree.flatten(arguments)
        arguments = jax.tree.unflatten(tree, vary_alike(leaves))
        return _differentiable_kernel(task, *arguments)

    return over_explicit_axes(
        run,
        operation="norm_rope_pool",
        operands=task.operands(*arrays[:2]),
        results=(task.tokens, task.tiles),
    )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_kernel(task: _Task, *arguments):
    video = arguments[0]
    leaves, tree = jax.tree.flatten(arguments)
    operands = task.operands(*arguments[:2])
    names = jax.tree.leaves(jax.tree.broadcast(operands, arguments))
    num_pooled = 2 * len(task.reductions)
    axes = Axes(
        operation="norm_rope_pool",
        operands=tuple(names),
        results=(task.tokens,) * len(video) + (task.tiles,) * num_pooled,
    )

    def run(*leaves):
        arguments = jax.tree.unflatten(tree, leaves)
        video, text, scales, text_scales, rope, mean_squares = arguments
        cause = sm90.norm_rope_pool.why_unsupported_shape(
            video[0].shape, video[0].dtype, task.norm, mean_squares is not None
        )
        if cause is not None:  # a device has fewer heads than all together
            warn_once(f"norm_rope_pool runs as XLA operations: {cause}")
            written = _norm_rope(task, *arguments)
            q, k, *_ = written
            pooled = xla.pool_tiles(q, k, task.tiling, reductions=task.reductions)
            return *written, *pooled
        written, pooled = sm90.norm_rope_pool.norm_rope_pool(
            video,
            text,
            scales,
            text_scales,
            rope,
            task.tiling.table,
            task.tiling.tokens,
            norm=task.norm,
            mean_squares=mean_squares,
            reductions=task.reductions,
        )
        return *written, *pooled

    outs = tuple(sealed(run, *leaves, axes=axes))
    return outs[: len(video)], outs[len(video) :]


def _forward(task: _Task, *arrays):
    return _differentiable_kernel(task, *arrays), arrays


def _backward(task: _Task, arrays, cotangents):
    _, transposed = jax.vjp(functools.partial(_norm_rope, task), *arrays)
    return transposed(tuple(cotangents[0]))


_differentiable_kernel.defvjp(_forward, _backward)


def _products(named: dict[str, Projected]) -> tuple[Product, ...]:
    """Returns products of what is finished or not; raises unless their parts fit."""
    products = {name: Product.of(x) for name, x in named.items()}
    for name, product in products.items():
        check_product(name, product, num_rows=2)
    return tuple(products.values())


def _check_norm(q, norm: QKNorm | None, scales, text_scales) -> None:
    """Raises ValueError unless the scales are those that the norm of q needs."""
    if (norm is None) != (scales is None):
        given = "None" if scales is None else "given"
        raise ValueError(f"{norm=}, but scales are {given}; give both or neither")
    if norm is None:
        if text_scales is not None:
            raise ValueError("norm=None, but text_scales are given; give both")
        return
    _, _, num_heads, head_dim = q.shape
    width = num_heads * head_dim if norm.over == "heads" else head_dim
    for kind, pair in (("scale", scales), ("text scale", text_scales)):
        for name, scale in zip(("q", "k"), pair or (), strict=pair is not None):
            if scale.shape != (width,):
                raise ValueError(
                    f"the {kind} of {name} has shape {scale.shape}; {norm} needs "
                    f"({width},)"
                )


def _check_mean_squares(q, norm: QKNorm | None, mean_squares) -> None:
    """Raises ValueError unless they are those of a norm over heads, of each token."""
    if mean_squares is None:
        return
    if norm is None or norm.over != "heads":
        raise ValueError(
            f"mean_squares are those of a norm over heads, but {norm=}: leave them out"
        )
    for name, squares in zip(("q", "k"), mean_squares, strict=True):
        if squares.shape != q.shape[:2]:
            raise ValueError(
                f"the mean squares of {name} have shape {squares.shape}; expected "
                f"{q.shape[:2]}, one for each token"
            )


def _check_rope(q, rope: Rope | None, visual_tokens: slice) -> None:
    """Raises ValueError unless rope has a row for each token of the frames."""
    if rope is None:
        return
    head_dim = q.shape[3]
    expected = (visual_tokens.stop - visual_tokens.start, head_dim // 2)
    for name, table in zip(("cosines", "sines"), rope, strict=True):
        if table.shape != expected or head_dim % 2:
            raise ValueError(
                f"the {name} of rope have shape {table.shape}; expected {expected}, a "
                f"row for each visual token and a column for each of {head_dim=} / 2 "
                "pairs"
            )
