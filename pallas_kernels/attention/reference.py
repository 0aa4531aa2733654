"""Block-sparse attention as plain masked softmax: the reference for every backend.

It expands the kept blocks to a token-by-token mask. It holds the whole N x T x T logits
in float32, so it is for tests and small sizes. It shares no helper with the
kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.means import Means
from pallas_kernels.common.interfaces import Backend, BlockGrid, BlockLists, Problem

MAX_TOKENS = 8_192  # 256 MiB of float32 logits for each head and batch item


def oracle_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    mask: BlockLists,
    *,
    grid: BlockGrid,
    scale: float | Float[Array, ""],
    text_lengths: Int[Array, " B"] | None,
    means: Means | None = None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """Computes a softmax over the kept and valid keys of each query, in float32.

    Means are further keys: a mean of n dropped tokens is one key n times.

    Args:
      q: Queries in tiled order.
      k: Keys.
      v: Values.
      mask: Kept block pairs.
      grid: Geometry of the blocks.
      scale: Factor on the logits.
      text_lengths: Valid text tokens of each batch item; None means all.
      means: What stands for the blocks that each query block skips, or None.

    Returns:
      The attention output in q's dtype, and the natural log of the sum of exp of
      the kept logits. A query without any key gets zeros and -inf.
    """
    kept = _token_mask(mask, grid, text_lengths)
    if text_lengths is not None:  # padding may be NaN, and zero times NaN is NaN
        valid = _valid_tokens(grid, text_lengths)[:, :, None, None]
        q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
    count = kept.astype(jnp.float32)
    if means is not None:
        k, v = (jnp.concatenate(pair, 1) for pair in ((k, means.k), (v, means.v)))
        count = jnp.concatenate([count, _tokens_of_means(means, grid)], axis=-1)
        kept = count > 0
    logits = scale * jnp.einsum(
        "btnd,bsnd->bnts",
        q.astype(jnp.float32),
        k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    logits += jnp.log(jnp.where(kept, count, 1.0))
    has_key = kept.any(-1)
    # Two steps of `where`: a row without keys is replaced before the softmax, so
    # that neither its value nor its gradient is ever NaN.
    logits = jnp.where(kept, logits, -jnp.inf)
    logits = jnp.where(has_key[..., None], logits, 0.0)
    lse = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jnp.exp(logits - lse[..., None])
    out = jnp.einsum(
        "bnts,bsnd->btnd",
        jnp.where(has_key[..., None], probabilities, 0.0),
        v.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    # Again, so that a cotangent of such a row, which may be NaN, is dropped.
    out = jnp.where(has_key.swapaxes(1, 2)[..., None], out, 0.0)
    return out.astype(q.dtype), jnp.where(has_key, lse, -jnp.inf)


def _tokens_of_means(means: Means, grid: BlockGrid) -> Float[Array, "B N T M"]:
    """Counts the tokens that each mean stands for, for each query."""
    cells = means.sub_tiles
    column_of_mean = np.arange(cells.num_cells) // cells.per_column
    block_of_token = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    frames = means.dropped[:, :, block_of_token][..., column_of_mean]
    return frames.astype(jnp.float32) * cells.tokens_per_frame


def _token_mask(
    mask: BlockLists, grid: BlockGrid, text_lengths: Int[Array, " B"] | None
) -> Bool[Array, "B N T T"]:
    """Returns a map that is true where a query token attends to a key token."""
    batch, num_heads, capacity = mask.block_ids.shape
    entry = jnp.arange(capacity)
    # The row of an entry is the number of rows that end at or before it; entries
    # that no row owns get row R, which is cut off.
    row = (entry[:, None] >= mask.row_offsets[:, :, None, 1:]).sum(-1)  # [B, N, M]
    item = jnp.arange(batch)[:, None, None]
    head = jnp.arange(num_heads)[None, :, None]
    num_blocks = grid.num_blocks
    none_kept = jnp.zeros((batch, num_heads, num_blocks + 1, num_blocks), bool)
    column = jnp.where(row < num_blocks, mask.block_ids, 0)
    block_pairs = none_kept.at[item, head, row, column].set(True)[:, :, :num_blocks]
    block_of_token = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    token_pairs = block_pairs[:, :, block_of_token][:, :, :, block_of_token]
    if text_lengths is None:
        return token_pairs
    valid = _valid_tokens(grid, text_lengths)
    return token_pairs & valid[:, None, :, None] & valid[:, None, None, :]


def _valid_tokens(
    grid: BlockGrid, text_lengths: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    token = jnp.arange(grid.num_tokens)
    first, last = grid.text_tokens.start, grid.text_tokens.stop
    is_text = (token >= first) & (token < last)
    return ~is_text | (token < first + text_lengths[:, None])


def _why_unsupported(problem: Problem) -> str | None:
    if problem.grid.num_tokens > MAX_TOKENS:
        return (
            f"it holds every pair of tokens and takes at most {MAX_TOKENS} tokens, "
            f"not {problem.grid.num_tokens}"
        )
    return None


BACKEND = Backend(
    name="oracle",
    function=lambda *arrays, device, **options: oracle_attention(*arrays, **options),
    why_unsupported=_why_unsupported,
    why_slow=lambda problem: None,
)
