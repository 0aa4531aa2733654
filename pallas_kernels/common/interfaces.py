"""What a backend takes and promises, and how dispatch asks whether it can run.

The package knows masks and grids only by structure, so that kernels depend on no
model or method code. `draft_jax.VideoGrid` is a `BlockGrid` and
`draft_jax.BlockMask` is a `BlockLists`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.common.device import Device

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")

# Of the tokens: blocks one after another, or frame by frame, row by row.
Order = Literal["raster", "tiled"]


class BlockGrid(Protocol):
    """Static, hashable geometry: a sequence cut into consecutive blocks.

    In tiled order blocks follow each other without gaps: block `r` is the tokens
    `block_starts[r]` to `block_starts[r] + block_lengths[r]`. Text stands at one end of
    the sequence. `tiled = raster[tile_order]` and `raster = tiled[raster_order]`.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def tile(self) -> tuple[int, int]: ...

    @property
    def tile_order(self) -> np.ndarray: ...

    @property
    def raster_order(self) -> np.ndarray: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def text_length(self) -> int: ...

    @property
    def block_starts(self) -> np.ndarray: ...

    @property
    def block_lengths(self) -> np.ndarray: ...

    @property
    def text_tokens(self) -> slice: ...

    @property
    def text_blocks(self) -> slice: ...


class BlockLists(Protocol):
    """Kept key blocks of every query block, as compressed sparse rows.

    Query block `r` of head `n` attends to the key blocks
    `block_ids[b, n, row_offsets[b, n, r] : row_offsets[b, n, r + 1]]`, each at most
    once. The first offset is 0, none is less than the one before, and entries past the
    last are not read.
    """

    @property
    def row_offsets(self) -> Int[Array, "B N R+1"]: ...

    @property
    def block_ids(self) -> Int[Array, "B N M"]: ...

    @property
    def grid(self) -> Any: ...


def valid_lengths(grid: BlockGrid, text_lengths: Int[Array, " B"]) -> Int[Array, "B R"]:
    """Tokens of each block of each batch item that are not padding."""
    is_text = np.zeros(grid.num_blocks, bool)
    is_text[grid.text_blocks] = True
    text_end = grid.text_tokens.start + text_lengths[:, None]
    used = jnp.clip(text_end - grid.block_starts, 0, grid.block_lengths)
    return jnp.where(is_text, used, grid.block_lengths).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that the choice of a backend depends on, known before tracing."""

    head_dim: int
    dtype: str
    grid: BlockGrid
    order: Order
    device: Device


BackendFunction = Callable[..., tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of block-sparse attention.

    Attributes:
      name: What callers pass as `backend`.
      function: `f(q, k, v, mask, *, grid, scale, text_lengths) -> (out, lse)`.
        Inputs were validated. `text_lengths` is int32 [B] or None. Rows without a
        valid key are zeros in `out` and -inf in `lse`.
      takes_raster: Whether the function takes `order`, and tokens in raster order.
        Others get them in tiled order.
      why_unsupported: Why it cannot take a problem, or None if it can.
      why_slow: Why "auto" should tell the user that a faster path exists for this
        device but does not run, or None.
    """

    name: str
    function: BackendFunction
    why_unsupported: Callable[[Problem], str | None]
    why_slow: Callable[[Problem], str | None]
    takes_raster: bool = False
