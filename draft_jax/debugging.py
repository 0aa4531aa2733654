"""Checks for debugging a model: what an operation cannot see by itself."""

import itertools

import einops
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Real

from draft_jax.grid import VideoGrid
from pallas_kernels.common import Order, validation

_AXES = ("frame", "row", "column")


def check_finite(**arrays: Float[Array | np.ndarray, "..."]) -> None:
    """Raises if an array holds NaN or infinity, and says where the first one is.

    It waits for the arrays, so it is for debugging, and it works outside jit only.

    Args:
      **arrays: Arrays by the names that messages give them.

    Raises:
      ValueError: A value is not finite, or an array is traced.

    Example:
        ```python
        import jax.numpy as jnp
        from draft_jax import check_finite

        q = k = v = jnp.ones((1, 6, 2, 4))
        check_finite(q=q, k=k, v=v)
        ```
    """
    for name, array in arrays.items():
        if isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"check_finite cannot look into traced {name}: call outside jit, "
                'or use jax.config.update("jax_debug_nans", True)'
            )
        bad = np.argwhere(~np.isfinite(np.asarray(array, np.float32)))
        if len(bad):
            where = ", ".join(str(index) for index in bad[0])
            raise ValueError(
                f"{name}[{where}] is {array[tuple(bad[0])]}, the first of {len(bad)} "
                f"values of {name} that are not finite; all must be"
            )


def check_positions(
    position_ids: Real[Array | np.ndarray, "*B T 3"],
    *,
    grid: VideoGrid,
    order: Order = "raster",
) -> None:
    """Raises unless a model's position ids are those of a grid.

    Nothing else notices a grid whose height and width are swapped: its number of tokens
    is right, and attention runs within tiles of the wrong shape. Position ids are what
    a model makes its rotary embedding from. It works outside jit only.

    Args:
      position_ids: Frame, row and column of each token, of one item or of a batch:
        T = `grid.num_tokens`, where those of text may be anything, or the visual tokens
        alone. They may start anywhere on each axis.
      grid: Geometry of the sequence, as passed to `draft_attention`.
      order: Order of the tokens, as passed to `draft_attention`.

    Raises:
      ValueError: A token lies elsewhere (the message names the first one and, where it
        can, the cause), the shape does not fit, or position_ids are traced.

    Example:
        ```python
        import jax.numpy as jnp
        from draft_jax import VideoGrid, check_positions

        grid = VideoGrid(frames=21, height=45, width=80)
        positions = jnp.indices((grid.frames, grid.height, grid.width))  # a model's
        check_positions(jnp.stack(positions, axis=-1).reshape(-1, 3), grid=grid)
        ```
    """
    validation.check_order(order)
    if isinstance(position_ids, jax.core.Tracer):
        raise ValueError(
            "check_positions cannot look into traced position_ids: call outside jit"
        )
    ids = np.asarray(position_ids)
    accepted = {grid.num_tokens, grid.num_visual_tokens}
    if ids.ndim not in (2, 3) or ids.shape[-1] != 3 or ids.shape[-2] not in accepted:
        tokens = " or ".join(map(str, sorted(accepted, reverse=True)))
        raise ValueError(
            f"position_ids has shape {ids.shape}; expected [tokens, 3] or [batch, "
            f"tokens, 3] with {tokens} tokens: frame, row and column of {grid}"
        )
    has_text = ids.shape[-2] == grid.num_tokens
    start = grid.visual_tokens.start if has_text else 0
    expected = _positions(grid, order)
    for index in np.ndindex(ids.shape[:-2]):
        item = ids[index]
        visual = item[start : start + grid.num_visual_tokens]
        wrong = (visual - visual[0] != expected).any(-1)
        if not wrong.any():
            continue
        token = int(np.argmax(wrong))
        where = ", ".join(map(str, (*index, start + token)))
        raise ValueError(
            f"position_ids[{where}] is {visual[token].tolist()}; a token there lies at "
            f"frame, row, column {(visual[0] + expected[token]).tolist()} of {grid} in "
            f"{order} order, counted from its first token's {visual[0].tolist()}"
            f"{_cause(item, visual - visual[0], grid, order)}"
        )


def _positions(grid: VideoGrid, order: Order) -> Int[np.ndarray, "T 3"]:
    """Returns frame, row and column of the visual tokens."""
    sizes = (grid.frames, grid.height, grid.width)
    positions = einops.rearrange(np.indices(sizes), "fhw f h w -> (f h w) fhw")
    if order == "raster":
        return positions
    start = grid.visual_tokens.start
    return positions[grid.tile_order[grid.visual_tokens] - start]


def _cause(
    item: Real[np.ndarray, "T 3"],
    visual: Real[np.ndarray, "V 3"],
    grid: VideoGrid,
    order: Order,
) -> str:
    """Returns the likeliest cause of wrong ids; empty if there is none to see.

    Args:
      item: Ids of all tokens that were given.
      visual: Those of the visual tokens, less the first one's.
      grid: What they were compared to.
      order: What they were compared to.
    """
    frames, height, width = sizes = (grid.frames, grid.height, grid.width)
    expected = _positions(grid, order)
    turned = VideoGrid(frames, width, height, tile=grid.tile)
    if (visual == _positions(turned, order)).all():
        return f". Height and width look swapped: use height={width}, width={height}"
    for axes in itertools.permutations(range(3)):
        if (visual[:, axes] == expected).all():
            given = ", ".join(_AXES[axes.index(axis)] for axis in range(3))
            return f". The last axis looks like ({given}), not (frame, row, column)"
    other: Order = "tiled" if order == "raster" else "raster"
    if (visual == _positions(grid, other)).all():
        return f". The tokens look to be in {other} order: pass order={other!r}"
    raster = _positions(grid, "raster")
    for axes in itertools.permutations(range(3)):
        # The axis that changes fastest is the last key of a walk, lexsort's first.
        walk = raster[np.lexsort([raster[:, axis] for axis in reversed(axes)])]
        if (visual == walk).all():
            names = ", then ".join(_AXES[axis] for axis in axes)
            return f". The tokens look sorted by {names}; sort by frame, row, column"
    given_sizes = visual.max(0).astype(int) + 1
    if (visual.min(0) >= 0).all() and tuple(given_sizes) != sizes:
        return ". They look like those of {} frames of {} x {} tokens".format(
            *given_sizes
        )
    if grid.text_length and len(item) == grid.num_tokens:
        start = 0 if grid.text_side == "before" else grid.text_length
        moved = item[start : start + grid.num_visual_tokens]
        if (moved - moved[0] == expected).all():
            side = "after" if grid.text_side == "before" else "before"
            return f". The text looks to stand {side} the video: use text_side={side!r}"
    return ""
