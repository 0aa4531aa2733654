"""The work of the norm-rope-pool kernel for Hopper, and how it is divided."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int

from pallas_kernels.common.interfaces import SUPPORTED_DTYPES
from pallas_kernels.common.validation import why_not_among
from pallas_kernels.pooling.interfaces import QKNorm, Reduction

WARPS, LANES = 4, 32  # warps of a warpgroup, lanes of a warp
LOAD_BYTES = (16, 8, 4)  # bytes of a thread's load, widest first
TEXT_TOKENS = 128  # text tokens of a CTA
MAX_CHANNELS = 48  # channels of a token that a thread holds in registers
CHUNK_CHANNELS = 24  # channels that a thread should hold where heads divide
CHANNELS_AHEAD, MAX_AHEAD = 48, 4  # channels of a thread, tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormRopePoolPlan:
    """Everything static about one launch."""

    norm: QKNorm | None
    has_mean_squares: bool  # of the norm, which are then not computed
    has_text_scales: bool
    has_rope: bool
    reductions: tuple[Reduction, ...]
    num_tiles: int
    num_units: int  # tiles and runs of text tokens
    visual_start: int  # token of the first row of the rotary table
    num_arrays: int  # 2 for q and k, 3 if v is copied
    has_parts: tuple[bool, bool, bool]  # of a `Product`: rows, columns, bias
    text_start: int | None  # first token of the text if it has arrays of its own
    heads: int  # heads of a CTA
    head_dim: int
    vec: int  # channels of one load of a thread
    heads_at_once: int  # heads that the warpgroup loads with one load of each thread
    ahead: int  # tokens
    ops: types.ModuleType  # `registers`, or `emulated` in interpret mode

    @property
    def source_starts(self) -> tuple[int, int]:
        """Tokens that are first in the arrays of the video and of the text."""
        if self.text_start is None:
            return 0, 0
        return self.visual_start, self.text_start

    @property
    def num_sources(self) -> int:
        """Arrays to read: those of the video, and of the text if it has its own."""
        return self.num_arrays * (1 if self.text_start is None else 2)

    @property
    def num_squares(self) -> int:
        """Arrays of mean squares, of q and of k."""
        return 2 if self.has_mean_squares else 0

    @property
    def num_scales(self) -> int:
        """Factors of q and k, and those of the text if it has its own."""
        if self.norm is None:
            return 0
        return 4 if self.has_text_scales else 2

    @property
    def groups(self) -> list:
        """The heads of a CTA, as many at a time as it loads at once.

        The last group ends with the last head: where they do not divide, it begins
        with heads of the group before, whose values are written twice. Each group is
        finished and stored before the next: ptxas cannot load the scales of all groups
        early and run out of registers.
        """
        at_once = self.heads_at_once
        firsts = range(0, self.heads, at_once)
        return [pl.ds(min(first, self.heads - at_once), at_once) for first in firsts]

    @property
    def repeated_heads(self) -> int:
        """Heads of the last group that the group before has too."""
        return -self.heads % self.heads_at_once

    def layout(self, vec: int, *, is_half: bool = False):
        """Returns a layout whose registers have `vec` channels.

        A thread holds the same channels in all layouts. With too few heads for all
        warps, several hold the same ones and write the same values.
        """
        heads = self.heads_at_once
        head_dim, own = self.head_dim, self.vec
        warps = heads * head_dim // (LANES * own)
        alike = () if warps == WARPS else (plgpu.Replicated(WARPS // warps),)
        if is_half:
            head_dim, own = head_dim // 2, own // 2
        tiles = ((heads, head_dim), (heads // warps, head_dim), (1, own), (1, vec))
        layout = mgpu.TiledLayout(
            mgpu.fragmented_array.Tiling(tiles),
            (*alike, -8),
            (-6, -5),
            -1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(
            layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
        )

    @property
    def half_layout(self):
        """Layout of the even or the odd channels of all heads."""
        return self.layout(self.vec // 2, is_half=True)


def make_plan(
    num_heads: int, head_dim: int, dtype, *, ahead: int | None, **fields
) -> NormRopePoolPlan:
    """Fills in how the work is divided; `ahead` None takes what registers allow."""
    load = load_of(num_heads, head_dim, dtype)
    assert load is not None, "see why_unsupported_shape"
    vec, at_once = load
    joins = joins_heads(fields["norm"], fields["has_mean_squares"])
    heads = heads_of_cta(num_heads, vec, at_once, joins=joins)
    own = pl.cdiv(heads, at_once) * vec
    ahead = ahead or max(1, min(MAX_AHEAD, CHANNELS_AHEAD // own))
    return NormRopePoolPlan(
        heads=heads,
        head_dim=head_dim,
        vec=vec,
        heads_at_once=at_once,
        ahead=ahead,
        **fields,
    )


def why_unsupported_shape(
    shape, dtype, norm: QKNorm | None, has_mean_squares: bool
) -> str | None:
    """Returns why no device can take arrays of this shape, or None if one can."""
    if cause := why_not_among(SUPPORTED_DTYPES, jnp.dtype(dtype).name):
        return cause
    num_heads, head_dim = shape[2:]
    load = load_of(num_heads, head_dim, dtype)
    if load is None:
        return (
            f"{num_heads} heads of {head_dim} channels cannot be divided evenly among "
            "the lanes of a warp"
        )
    vec, at_once = load
    joins = joins_heads(norm, has_mean_squares)
    heads = heads_of_cta(num_heads, vec, at_once, joins=joins)
    if pl.cdiv(heads, at_once) * vec > MAX_CHANNELS:
        most = MAX_CHANNELS * WARPS * LANES
        return (
            f"{heads} heads of {head_dim} channels in one CTA do not fit in registers "
            f"(at most {most} channels)"
        )
    return None


def load_of(num_heads: int, head_dim: int, dtype) -> tuple[int, int] | None:
    """Returns the channels of a thread's load and the heads of all threads' loads.

    That is the widest load that divides the heads; if none does, the narrowest, by as
    many warps as there are heads for. None if a head cannot stay within a warp.
    """
    loads = []
    for nbytes in LOAD_BYTES:
        vec = nbytes // jnp.dtype(dtype).itemsize
        if vec >= 2 and head_dim % vec == 0 and LANES * vec % head_dim == 0:
            loads.append((vec, LANES * vec // head_dim))
    for vec, heads_of_warp in loads:
        if num_heads % (WARPS * heads_of_warp) == 0:
            return vec, WARPS * heads_of_warp
    if not loads or num_heads < loads[-1][1]:
        return None
    vec, heads_of_warp = loads[-1]
    warps = next(n for n in (WARPS, 2, 1) if n * heads_of_warp <= num_heads)
    return vec, warps * heads_of_warp


def shares_heads(num_heads: int, head_dim: int, dtype) -> bool:
    """Returns whether several warps hold the same heads: there are too few for all."""
    load = load_of(num_heads, head_dim, dtype)
    return load is not None and load[1] * head_dim < WARPS * LANES * load[0]


def joins_heads(norm: QKNorm | None, has_mean_squares: bool) -> bool:
    """Returns whether a token needs sums over all its heads."""
    return norm is not None and norm.over == "heads" and not has_mean_squares


def heads_of_cta(num_heads: int, vec: int, at_once: int, *, joins: bool) -> int:
    """Returns the heads of a CTA: all if the norm joins them, else what fits well.

    That is a divisor of the heads, so that no head is written by two CTAs.
    """
    if joins:
        return num_heads
    fitting = max(1, CHUNK_CHANNELS // vec)

    def cost(heads: int) -> tuple[int, int, int]:
        loads = pl.cdiv(heads, at_once)
        return max(loads - fitting, 0), num_heads // heads * loads, -heads

    divisors = (n for n in range(at_once, num_heads + 1) if num_heads % n == 0)
    return min(divisors, key=cost)


def text_units(num_tokens: int, visual_tokens: slice) -> Int[np.ndarray, "X 4"]:
    """Returns runs of text tokens in the form of tiles of one row."""
    units = []
    for start, stop in ((0, visual_tokens.start), (visual_tokens.stop, num_tokens)):
        for first in range(start, stop, TEXT_TOKENS):
            length = min(TEXT_TOKENS, stop - first)
            units.append((first, length, 1, length))
    return np.array(units, np.int32).reshape(-1, 4)
