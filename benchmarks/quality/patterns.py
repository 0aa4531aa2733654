"""Fixed patterns of block pairs that published methods keep, as mask makers.

Each method has settings, such as the size of a window, which keep more and more pairs.
A budget takes the setting that keeps the most pairs within it; so a pattern may keep
fewer than other methods at the same budget, and what it kept is measured.

Blocks are tiles of one latent frame, (rows, columns) of `VideoGrid.tile`, in the order
frame, row, column. The published methods use blocks of 128 tokens in raster order, or
tiles over several frames; a kernel of this package keeps whole blocks of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax import BlockMask, DraftConfig, VideoGrid, mask_capacity
from pallas_kernels.common import Order, Scale, register_configuration

MOST_SETTINGS = 128
SAMPLED_QUERIES = 32  # rows of attention that choose a head's pattern, as published


class Patterns(NamedTuple):
    """A method's settings for a grid, and what they keep.

    Attributes:
      settings: Numbers of each setting, ascending in the pairs that it keeps.
      counts: Pairs that each keeps in a head.
      keeps: Returns the kept pairs of a setting, with NumPy or jax.numpy.
    """

    settings: np.ndarray
    counts: np.ndarray
    keeps: Callable[[Any, Any], Any]

    @classmethod
    def of(cls, keeps: Callable[[Any, Any], Any], settings: np.ndarray) -> "Patterns":
        """Counts what settings keep, and leaves out those that keep no more."""
        counts = np.array([keeps(np, one).sum() for one in settings])
        order = np.lexsort((np.arange(len(counts)), counts))
        is_new = np.diff(counts[order], prepend=-1) > 0
        order = order[is_new]
        return cls(settings[order], counts[order], keeps)

    def within(self, budget: int | Int[Array, ""]) -> Bool[Array, "S S"]:
        """Returns the kept pairs of the largest setting within a budget."""
        place = jnp.searchsorted(jnp.asarray(self.counts), budget, side="right") - 1
        return self.keeps(jnp, jnp.asarray(self.settings)[jnp.maximum(place, 0)])


class Places(NamedTuple):
    """Where blocks lie; query blocks along the first axis, key blocks the second.

    Attributes:
      frames: Frame of each block.
      rows: Row of its tile in the frame.
      columns: Column of its tile in the frame.
      shape: Frames, rows and columns of tiles.
    """

    frames: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, grid: VideoGrid) -> "Places":
        """Returns the places of a grid's tiles."""
        shape = (grid.frames, *grid.tiles_per_frame)
        numbers = np.arange(grid.num_visual_blocks)
        frames, rows, columns = np.unravel_index(numbers, shape)
        return cls(frames, rows, columns, shape)

    @property
    def in_frame(self) -> np.ndarray:
        """Number of each block's tile within its frame."""
        return self.rows * self.shape[2] + self.columns


def mask_of_map(
    kept: Bool[Array, "S S"] | Bool[Array, "B N S S"],
    q: Float[Array, "B T N D"],
    grid: VideoGrid,
    config: DraftConfig,
) -> BlockMask:
    """Makes the mask of a map of tiles; one map serves all items and heads."""
    size = grid.num_visual_blocks
    kept = jnp.broadcast_to(kept, (q.shape[0], q.shape[2], size, size))
    capacity = mask_capacity(grid, config)
    return BlockMask.from_visual(kept, grid=grid, capacity=capacity)


# ---------------------------------------------------------- sliding tile attention


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingTiles:
    """Keeps the tiles within a window around each tile.

    At the border of the video the window is moved inwards, so that all queries keep
    equally many keys. Sides of a window are odd, or those of the video. Of windows that
    keep at least `EVEN_SHARE` of the most that a budget allows, the most even one is
    taken, by the share of each axis that it spans. The paper searches a window for each
    head with prompts of its own; here one serves all heads.

    Source: Fast Video Generation with Sliding Tile Attention (arXiv 2502.04507).
    """

    def __call__(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"] | None,
        *,
        grid: VideoGrid,
        config: DraftConfig,
        budget: int | Int[Array, ""],
        scale: Scale | None,
        order: Order,
    ) -> BlockMask:
        """Makes the masks; see `draft_jax.MaskMaker`."""
        return mask_of_map(sliding_windows(grid).within(budget), q, grid, config)


EVEN_SHARE = 0.75


@functools.lru_cache(maxsize=8)
def sliding_windows(grid: VideoGrid) -> Patterns:
    """Returns the windows of a grid; a setting is their frames, rows and columns."""
    places = Places.of(grid)

    def keeps(xp, window):
        inside = True
        axes = zip(places[:3], places.shape, range(3), strict=True)
        for place, size, axis in axes:
            half = window[axis] // 2
            centre = xp.clip(place, half, size - 1 - half)
            near = abs(centre[:, None] - place[None]) <= half
            inside = inside & (near | (window[axis] >= size))
        return inside

    sides = [sorted({*range(1, size, 2), size}) for size in places.shape]
    windows = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
    spans = windows / np.array(places.shape)
    sizes, evenness = windows.prod(-1), spans.min(-1) / spans.max(-1)
    near = [(sizes <= n) & (sizes >= EVEN_SHARE * n) for n in np.unique(sizes)]
    best = {int(np.argmax(np.where(is_near, evenness, -1.0))) for is_near in near}
    chosen = windows[sorted(best)]
    counts = chosen.prod(-1) * grid.num_visual_blocks
    by_count = np.argsort(counts, kind="stable")
    return Patterns(chosen[by_count], counts[by_count], keeps)


# ------------------------------------------------------------------ radial attention


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Radial:
    """Keeps ever narrower bands between frames that lie ever further apart.

    Between frames at distance d the band spans w = f n / 2^floor(log2 max(d, 1)) of a
    frame's n tiles to each side. Where it is narrower than a tile, it keeps the same
    tile of every ceil(1 / w)-th frame. All tiles of the first frame are kept where the
    budget has room for them. A setting is the factor f, 1 in the paper; its code scales
    the bands likewise. There the bands of a frame with itself and with its neighbours
    do not shrink with f, which sets a floor on the density that a short video is above.

    Source: Radial Attention (arXiv 2506.19852).
    """

    def __call__(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"] | None,
        *,
        grid: VideoGrid,
        config: DraftConfig,
        budget: int | Int[Array, ""],
        scale: Scale | None,
        order: Order,
    ) -> BlockMask:
        """Makes the masks; see `draft_jax.MaskMaker`."""
        kept = with_first_frame(radial_bands(grid), budget)
        return mask_of_map(kept, q, grid, config)


class WithSink(NamedTuple):
    """Settings of a pattern with the first frame kept, and without."""

    with_sink: Patterns
    without: Patterns


def with_first_frame(patterns: WithSink, budget: Any) -> Bool[Array, "S S"]:
    """Returns the kept pairs, with the first frame where the budget allows it."""
    has_room = budget >= int(patterns.with_sink.counts[0])
    return jnp.where(
        has_room, patterns.with_sink.within(budget), patterns.without.within(budget)
    )


def both(
    keeps: Callable[[Any, Any], Any], settings: np.ndarray, places: Places
) -> WithSink:
    """Returns a pattern with and without the first frame."""
    is_first = np.broadcast_to(places.frames == 0, (len(places.frames),) * 2)
    return WithSink(
        Patterns.of(lambda xp, one: keeps(xp, one) | is_first, settings),
        Patterns.of(keeps, settings),
    )


@functools.lru_cache(maxsize=8)
def radial_bands(grid: VideoGrid) -> WithSink:
    """Returns the bands of a grid; a setting is the factor of their width."""
    places = Places.of(grid)
    num_tiles = places.shape[1] * places.shape[2]
    apart = abs(places.frames[:, None] - places.frames[None])
    beside = abs(places.in_frame[:, None] - places.in_frame[None])
    halvings = np.frexp(np.maximum(apart, 1))[1] - 1  # floor of the logarithm
    # float32 everywhere, so that what is counted here is what a device keeps.
    tiles_of_band = (num_tiles / 2.0**halvings).astype(np.float32)

    def keeps(xp, factor):
        width = factor[0] * tiles_of_band
        every = xp.ceil(1.0 / width)
        is_diagonal = (beside == 0) & (apart % xp.maximum(every, 1.0) == 0)
        return xp.where(width >= 1.0, beside < width, is_diagonal)

    widest = 2.0 ** (halvings.max() + 1)
    factors = np.geomspace(1.0 / (num_tiles * places.shape[0]), widest, MOST_SETTINGS)
    return both(keeps, factors[:, None].astype(np.float32), places)


# ----------------------------------------------------- spatial and temporal heads


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialTemporalHeads:
    """Keeps a band along the frames or along the places, whichever suits a head.

    A spatial head keeps blocks that are near in the order frame, place: those of its
    own frame and of neighbours. A temporal head keeps those that are near in the order
    place, frame: the same place in all frames. Both keep the first frame where the
    budget has room for it, as the published code does. Of every item and head,
    `SAMPLED_QUERIES` rows of attention are computed in full and under both patterns;
    that with the smaller squared error is taken. Padded text counts in them.

    Source: Sparse VideoGen (arXiv 2502.01776).
    """

    def __call__(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"] | None,
        *,
        grid: VideoGrid,
        config: DraftConfig,
        budget: int | Int[Array, ""],
        scale: Scale | None,
        order: Order,
    ) -> BlockMask:
        """Makes the masks; see `draft_jax.MaskMaker`."""
        if v is None:
            raise ValueError("v=None, but the rule compares outputs: pass the values")
        spatial, temporal = head_bands(grid)
        maps = jnp.stack(
            [with_first_frame(spatial, budget), with_first_frame(temporal, budget)]
        )
        errors = sampled_errors(q, k, v, maps, grid=grid, scale=scale, order=order)
        kept = maps[jnp.argmin(errors, axis=0)]
        return mask_of_map(kept, q, grid, config)


@functools.lru_cache(maxsize=8)
def head_bands(grid: VideoGrid) -> tuple[WithSink, WithSink]:
    """Returns the bands of spatial and of temporal heads; a setting is their width."""
    places = Places.of(grid)
    size = grid.num_visual_blocks
    by_place = places.in_frame * grid.frames + places.frames
    widths = np.unique(np.geomspace(1, size, MOST_SETTINGS).round().astype(np.int32))

    def band(position: np.ndarray) -> WithSink:
        apart = abs(position[:, None] - position[None])
        return both(lambda xp, width: apart < width[0], widths[:, None], places)

    return band(np.arange(size)), band(by_place)


def sampled_errors(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    maps: Bool[Array, "K S S"],
    *,
    grid: VideoGrid,
    scale: Scale | None,
    order: Order,
) -> Float[Array, "K B N"]:
    """Returns mean squared errors of sampled rows of attention under some patterns.

    Args:
      q: Queries of the whole sequence.
      k: Keys, like q.
      v: Values, like q.
      maps: Kept pairs of tiles of each pattern; text is kept always.
      grid: Geometry of the sequence.
      scale: Factor of the logits; 1 / sqrt(D) if None.
      order: How the visual tokens are ordered.
    """
    block_of = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    if order == "raster":
        block_of = block_of[grid.raster_order]
    visual = grid.visual_tokens
    count = min(SAMPLED_QUERIES, grid.num_visual_tokens)
    rng = np.random.default_rng(0)
    rows = visual.start + rng.choice(grid.num_visual_tokens, count, replace=False)
    tile_of = block_of - grid.visual_blocks.start
    text = (visual.start, grid.num_tokens - visual.stop)

    def kept_tokens(kept):
        of_rows = kept[tile_of[rows]][:, tile_of[visual]]
        return jnp.pad(of_rows, ((0, 0), text), constant_values=True)

    product = functools.partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = product("bqnd,bknd->bnqk", q[:, rows], k) * factor

    def attend(logits):
        weights = jax.nn.softmax(logits, axis=-1)
        return product("bnqk,bknd->bnqd", weights, v.astype(jnp.float32))

    full = attend(logits)

    def error(kept):
        difference = attend(jnp.where(kept_tokens(kept), logits, -jnp.inf)) - full
        return (difference**2).mean((-1, -2))

    return jax.lax.map(error, maps)
