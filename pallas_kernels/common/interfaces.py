"""Interfaces of backends: what they take and promise, and when they can run.

The package knows masks and grids only by structure, so that kernels depend on no
model or method code. `draft_jax.VideoGrid` is a `BlockGrid` and
`draft_jax.BlockMask` is a `BlockLists`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.device import Device
from pallas_kernels.common.sub_tiles import SubTiles

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")

# Of the tokens: frame by frame and row by row, or blocks one after another.
Order = Literal["raster", "tiled"]


@runtime_checkable  # for tests that check types
class BlockGrid(Protocol):
    """Static, hashable geometry: a sequence cut into consecutive blocks.

    In tiled order blocks follow each other without gaps: block `r` is the tokens
    `block_starts[r]` to `block_starts[r] + block_lengths[r]`. Text stands at one end of
    the sequence. `tiled = raster[tile_order]` and `raster = tiled[raster_order]`.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, text included."""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of tokens: one visual block."""

    @property
    def tile_order(self) -> np.ndarray:
        """Raster index of each token in tiled order."""

    @property
    def raster_order(self) -> np.ndarray:
        """Tiled index of each token in raster order."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence, text included."""

    @property
    def block_size(self) -> int:
        """Most tokens of a block."""

    @property
    def text_length(self) -> int:
        """Tokens of text, padding included."""

    @property
    def block_starts(self) -> np.ndarray:
        """First token of each block in tiled order."""

    @property
    def block_lengths(self) -> np.ndarray:
        """Tokens of each block."""

    @property
    def text_tokens(self) -> slice:
        """Tokens that are text."""

    @property
    def text_blocks(self) -> slice:
        """Blocks that are text."""


@runtime_checkable
class BlockLists(Protocol):
    """Kept key blocks of every query block, as compressed sparse rows.

    Query block `r` of head `n` attends to the key blocks
    `block_ids[b, n, row_offsets[b, n, r] : row_offsets[b, n, r + 1]]`, each at most
    once. The first offset is 0, none is less than the one before, and entries past the
    last are not read.

    A true attribute `lists_are_valid`, where a mask has it, says that its maker built
    the lists so; those of other masks are checked where their values are known.
    """

    @property
    def row_offsets(self) -> Int[Array, "B N R+1"]:
        """Start of each query block's list in `block_ids`, int32."""

    @property
    def block_ids(self) -> Int[Array, "B N M"]:
        """Key blocks of all lists, int32."""

    @property
    def grid(self) -> Any:
        """Geometry of the blocks."""


def valid_lengths(grid: BlockGrid, text_lengths: Int[Array, " B"]) -> Int[Array, "B R"]:
    """Counts the tokens of each block that are not padding, for each batch item."""
    is_text = np.zeros(grid.num_blocks, bool)
    is_text[grid.text_blocks] = True
    text_end = grid.text_tokens.start + text_lengths[:, None]
    used = jnp.clip(text_end - grid.block_starts, 0, grid.block_lengths)
    return jnp.where(is_text, used, grid.block_lengths).astype(jnp.int32)


def valid_tokens(grid: BlockGrid, text_lengths: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """Returns which tokens are not padding, in either order of tokens."""
    token, text = np.arange(grid.num_tokens), grid.text_tokens
    is_video = (token < text.start) | (token >= text.stop)
    return is_video | (token < text.start + text_lengths[:, None])


def valid_prefix(grid: BlockGrid, text_lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Returns how many tokens are valid, which come first where padding stands last."""
    return grid.num_tokens - grid.text_length + text_lengths


def clear_padding(
    x: Float[Array, "B T N D"], grid: BlockGrid, text_lengths: Int[Array, " B"]
) -> Float[Array, "B T N D"]:
    """Replaces padded text by zeros, in place where XLA can.

    Padding may be NaN, and a probability of zero times NaN is NaN. Only the text is
    written: a kernel that reads all of x would else wait for a pass over the video.
    An argument of the whole program is copied, as XLA may not write to it.
    """
    # XLA on GPUs would fuse the reshape of a projection with the update, and then
    # copies x: an update through a reshape does not count as one in place.
    x = lax.optimization_barrier(x)
    text = grid.text_tokens
    is_valid = jnp.arange(grid.text_length) < text_lengths[:, None]
    own = jnp.where(is_valid[:, :, None, None], x[:, text], 0)
    return lax.dynamic_update_slice_in_dim(x, own, text.start, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that the choice of a backend depends on, known before tracing."""

    head_dim: int
    dtype: str
    grid: BlockGrid
    order: Order
    device: Device
    sub_tiles: SubTiles | None = None  # of means for skipped blocks


BackendFunction = Callable[..., tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of block-sparse attention.

    Attributes:
      name: What callers pass as `backend`.
      function: `f(q, k, v, mask, *, grid, scale, text_lengths, device)` returns the
        output and the log-sum-exp. It is traced once for the arguments that are not
        arrays. Inputs were validated. `text_lengths` is int32 [B] or None. Rows
        without a valid key are zeros in the output and -inf in the log-sum-exp. It
        takes `means` too where it supports a problem that has them.
      takes_raster: Whether the function takes `order`, and tokens in raster order.
        Others get them in tiled order.
      why_unsupported: Returns why it cannot take a problem, or None if it can.
      why_slow: Returns why "auto" should tell the user that a faster path exists for
        this device but does not run, or None.
    """

    name: str
    function: BackendFunction
    why_unsupported: Callable[[Problem], str | None]
    why_slow: Callable[[Problem], str | None]
    takes_raster: bool = False
