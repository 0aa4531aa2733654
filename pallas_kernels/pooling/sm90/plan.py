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
    text_start: int | None  # first token of the text if it has arrays of its own
    heads: int  # heads of a CTA
    head_dim: int
    vec: int  # channels of one load of a thread
    ahead: int  # tokens
    ops: types.ModuleType  # `registers`, or `emulated` in interpret mode

    @property
    def source_starts(self) -> tuple[int, int]:
        """Tokens that are first in the arrays of the video and of the text."""
        if self.text_start is None:
            return 0, 0
        return self.visual_start, self.text_start

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
    def heads_at_once(self) -> int:
        """Heads that the warpgroup loads with one load of each thread."""
        return heads_at_once(self.head_dim, self.vec)

    @property
    def groups(self) -> list:
        """The heads of a CTA, as many at a time as it loads at once.

        Each group is finished and stored before the next: ptxas cannot load the scales
        of all groups early and run out of registers.
        """
        at_once = self.heads_at_once
        return [pl.ds(first, at_once) for first in range(0, self.heads, at_once)]

    def layout(self, vec: int, *, is_half: bool = False):
        """Returns a layout whose registers have `vec` channels.

        A thread holds the same channels in all layouts.
        """
        heads = self.heads_at_once
        head_dim, own = self.head_dim, self.vec
        if is_half:
            head_dim, own = head_dim // 2, own // 2
        tiles = ((heads, head_dim), (heads // WARPS, head_dim), (1, own), (1, vec))
        layout = mgpu.TiledLayout(
            mgpu.fragmented_array.Tiling(tiles),
            (-8,),
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
    vec = vec_of(num_heads, head_dim, dtype)
    assert vec is not None, "see why_unsupported_shape"
    joins = joins_heads(fields["norm"], fields["has_mean_squares"])
    heads = heads_of_cta(num_heads, head_dim, vec, joins=joins)
    own = heads // heads_at_once(head_dim, vec) * vec
    ahead = ahead or max(1, min(MAX_AHEAD, CHANNELS_AHEAD // own))
    return NormRopePoolPlan(
        heads=heads, head_dim=head_dim, vec=vec, ahead=ahead, **fields
    )


def why_unsupported_shape(
    shape, dtype, norm: QKNorm | None, has_mean_squares: bool
) -> str | None:
    """Returns why no device can take arrays of this shape, or None if one can."""
    if jnp.dtype(dtype).name not in SUPPORTED_DTYPES:
        return f"it takes {', '.join(SUPPORTED_DTYPES)}, not {jnp.dtype(dtype).name}"
    num_heads, head_dim = shape[2:]
    vec = vec_of(num_heads, head_dim, dtype)
    if vec is None:
        return (
            f"{num_heads} heads of {head_dim} channels cannot be divided evenly among "
            f"{WARPS} warps, a head within one warp"
        )
    joins = joins_heads(norm, has_mean_squares)
    heads = heads_of_cta(num_heads, head_dim, vec, joins=joins)
    if heads // heads_at_once(head_dim, vec) * vec > MAX_CHANNELS:
        most = MAX_CHANNELS * WARPS * LANES
        return (
            f"a norm over {num_heads} heads of {head_dim} channels does not fit in "
            f"registers (at most {most} channels)"
        )
    return None


def vec_of(num_heads: int, head_dim: int, dtype) -> int | None:
    """Returns the channels of a load: most that divide heads among warps and lanes."""
    for nbytes in LOAD_BYTES:
        vec = nbytes // jnp.dtype(dtype).itemsize
        if vec < 2 or head_dim % vec or LANES * vec % head_dim:
            continue
        if num_heads % heads_at_once(head_dim, vec) == 0:
            return vec
    return None


def heads_at_once(head_dim: int, vec: int) -> int:
    """Returns the heads that the warpgroup loads with one load of each thread."""
    return WARPS * LANES * vec // head_dim


def joins_heads(norm: QKNorm | None, has_mean_squares: bool) -> bool:
    """Returns whether a token needs sums over all its heads."""
    return norm is not None and norm.over == "heads" and not has_mean_squares


def heads_of_cta(num_heads: int, head_dim: int, vec: int, *, joins: bool) -> int:
    """Returns the heads of a CTA: all if the norm joins them, else what fits well."""
    if joins:
        return num_heads
    at_once = heads_at_once(head_dim, vec)
    num_loads = num_heads // at_once
    fitting = max(1, CHUNK_CHANNELS // vec)
    return at_once * max(n for n in range(1, fitting + 1) if num_loads % n == 0)


def text_units(num_tokens: int, visual_tokens: slice) -> Int[np.ndarray, "X 4"]:
    """Returns runs of text tokens in the form of tiles of one row."""
    units = []
    for start, stop in ((0, visual_tokens.start), (visual_tokens.stop, num_tokens)):
        for first in range(start, stop, TEXT_TOKENS):
            length = min(TEXT_TOKENS, stop - first)
            units.append((first, length, 1, length))
    return np.array(units, np.int32).reshape(-1, 4)
