"""Fixed patterns of block pairs that published methods keep, as mask makers.

Each method has settings, such as the size of a window, which keep more and more pairs.
A budget takes the setting that keeps the most pairs within it; so a pattern may keep
fewer than other methods at the same budget, and what it kept is measured. Makers are
functions with the arguments of `draft_jax.MaskMaker`.

Blocks are tiles of one latent frame, (rows, columns) of `VideoGrid.tile`, in the order
frame, row, column. The published methods use blocks of 128 tokens in raster order, or
tiles over several frames; a kernel of this package keeps whole blocks of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from draft_jax import BlockMask, DraftConfig, VideoGrid, mask_capacity
from pallas_kernels.common import Order, Scale

MOST_SETTINGS = 128
MOST_WINDOWS = 8  # that are tried in a head
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
        return self.keeps(jnp, largest_within(budget, self.counts, self.settings))


def largest_within(
    budget: int | Int[Array, ""], counts: np.ndarray, settings: np.ndarray
) -> Array:
    """Returns the last setting that keeps no more than a budget, or the first of all.

    Args:
      budget: Pairs that may be kept in a head.
      counts: Pairs that each setting keeps, ascending.
      settings: Their numbers.
    """
    place = jnp.searchsorted(jnp.asarray(counts), budget, side="right") - 1
    return jnp.asarray(settings)[jnp.maximum(place, 0)]


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


def sliding_tiles(
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
    """Keeps the tiles within a window around each tile, another window in each head.

    At the border of the video the window is moved inwards, so that all queries keep
    equally many keys. Sides of a window are odd, or those of the video. Windows that
    no other one within the budget holds are tried on `SAMPLED_QUERIES` rows of each
    head, and that with the smallest squared error is taken. The paper searches each
    head's window once, on prompts of its own: here every prompt and step has its best
    one, and `even_sliding_tiles` has the cost of a window that is known before.

    Source: Fast Video Generation with Sliding Tile Attention (arXiv 2502.04507).
    """
    windows = sliding_windows(grid)
    maps, is_known = windows.candidates(budget)
    errors = sampled_errors(q, k, v, maps, grid=grid, scale=scale, order=order)
    errors = jnp.where(is_known[:, None, None], errors, jnp.inf)
    return mask_of_map(maps[jnp.argmin(errors, axis=0)], q, grid, config)


def even_sliding_tiles(
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
    """Keeps the tiles within the largest window that a budget allows, in all heads."""
    del k, v, scale, order
    return mask_of_map(sliding_windows(grid).largest(budget), q, grid, config)


class Windows(NamedTuple):
    """Windows of sliding tiles.

    Attributes:
      places: Where the tiles lie.
      sides: Frames, rows and columns of each, ascending in what they keep.
      counts: Pairs that each keeps in a head.
      holds: Whether the first window holds the second, another one.
    """

    places: Places
    sides: np.ndarray
    counts: np.ndarray
    holds: Bool[np.ndarray, "W W"]

    def kept(self, sides: Int[Array | np.ndarray, " 3"]) -> Bool[Array, "S S"]:
        """Returns the pairs of a window; its sides may be traced."""
        inside = jnp.bool_(True)
        for axis, size in enumerate(self.places.shape):
            place, side = jnp.asarray(self.places[axis]), sides[axis]
            centre = jnp.clip(place, side // 2, size - 1 - side // 2)
            near = abs(centre[:, None] - place[None]) <= side // 2
            inside = inside & (near | (side >= size))
        return inside

    def largest(self, budget: int | Int[Array, ""]) -> Bool[Array, "S S"]:
        """Returns the pairs of the largest window within a budget."""
        return self.kept(largest_within(budget, self.counts, self.sides))

    def candidates(
        self, budget: int | Int[Array, ""]
    ) -> tuple[Bool[Array, "K S S"], Bool[Array, " K"]]:
        """Returns windows within a budget that no other one within it holds.

        The largest `MOST_WINDOWS` of them; and which are such windows at all. The
        smallest window of all is one where the budget has room for none.
        """
        fits = (jnp.asarray(self.counts) <= budget).at[0].set(True)
        is_held = (jnp.asarray(self.holds) & fits[:, None]).any(0)
        is_candidate = fits & ~is_held
        numbers = jnp.arange(len(self.counts))
        rank = jnp.where(is_candidate, numbers, numbers - len(numbers))
        _, found = jax.lax.top_k(rank, min(MOST_WINDOWS, len(numbers)))
        return jax.vmap(self.kept)(jnp.asarray(self.sides)[found]), is_candidate[found]


@functools.lru_cache(maxsize=8)
def sliding_windows(grid: VideoGrid) -> Windows:
    """Returns the windows of a grid."""
    places = Places.of(grid)
    sides = [sorted({*range(1, size, 2), size}) for size in places.shape]
    windows = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
    windows = windows[np.argsort(windows.prod(-1), kind="stable")]
    within = (windows[:, None] >= windows[None]).all(-1)
    return Windows(
        places=places,
        sides=windows,
        counts=windows.prod(-1) * grid.num_visual_blocks,
        holds=within & ~np.eye(len(windows), dtype=np.bool_),
    )


# ------------------------------------------------------------------ radial attention


def radial(
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
    """Keeps ever narrower bands between frames that lie ever further apart.

    Between frames at distance d the band spans w = f n / 2^floor(log2 max(d, 1)) of a
    frame's n tiles to each side. Where it is narrower than a tile, it keeps the same
    tile of every ceil(1 / w)-th frame. All tiles of the first frame are kept where they
    take at most half of the budget. A setting is the factor f, 1 in the paper; its code
    scales the bands likewise. There the bands of a frame with itself and with its
    neighbours do not shrink with f, which sets a floor on the density that a short
    video is above.

    Source: Radial Attention (arXiv 2506.19852).
    """
    del k, v, scale, order
    return mask_of_map(with_first_frame(radial_bands(grid), budget), q, grid, config)


class WithSink(NamedTuple):
    """Settings of a pattern with the first frame kept, and without.

    Attributes:
      with_sink: With the first frame.
      without: Without it.
      first_frame: Pairs with its tiles as keys.
    """

    with_sink: Patterns
    without: Patterns
    first_frame: int


def with_first_frame(patterns: WithSink, budget: Any) -> Bool[Array, "S S"]:
    """Returns the kept pairs, with the first frame if it takes at most half of them.

    Published settings keep 0.2 and more of 21 frames and more, of which the first is a
    small part. Where it would be most of the budget, a band alone is nearer to them.
    """
    has_room = budget >= 2 * patterns.first_frame
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
        int(is_first.sum()),
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


def spatial_temporal_heads(
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
    """Keeps a band along the frames or along the places, whichever suits a head.

    A spatial head keeps blocks that are near in the order frame, place: those of its
    own frame and of neighbours. A temporal head keeps those that are near in the order
    place, frame: the same place in all frames. Both keep the first frame, as the
    published code does, where it takes at most half of the budget. Of every item and
    head, `SAMPLED_QUERIES` rows of attention are computed in full and under both
    patterns; that with the smaller squared error is taken. Padded text counts in them.

    Source: Sparse VideoGen (arXiv 2502.01776).
    """
    spatial, temporal = head_bands(grid)
    maps = jnp.stack(
        [with_first_frame(spatial, budget), with_first_frame(temporal, budget)]
    )
    errors = sampled_errors(q, k, v, maps, grid=grid, scale=scale, order=order)
    return mask_of_map(maps[jnp.argmin(errors, axis=0)], q, grid, config)


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
    v: Float[Array, "B T N D"] | None,
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

    Raises:
      ValueError: There are no values.
    """
    if v is None:
        raise ValueError("v=None, but the rule compares outputs: pass the values")
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

    # As attention multiplies: inputs of their dtype, sums in float32.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = product("bqnd,bknd->bnqk", q[:, rows], k) * factor

    def attend(logits):
        weights = jax.nn.softmax(logits, axis=-1)
        return product("bnqk,bknd->bnqd", weights.astype(v.dtype), v)

    full = attend(logits)

    def error(kept):
        difference = attend(jnp.where(kept_tokens(kept), logits, -jnp.inf)) - full
        return (difference**2).mean((-1, -2))

    return jax.lax.map(error, maps)
