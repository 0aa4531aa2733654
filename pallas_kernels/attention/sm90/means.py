"""Means for skipped blocks, as the Hopper kernel walks them.

Behind its list a query block walks all means, in blocks of BLOCK: their products and
their softmax are those of any key block, but for the logits of mean m, which get the
base-2 logarithm of the tokens that it stands for. With J means in a column, mean m is
of column c = m // J, and

    log2(tokens of a frame[m] * dropped[r, c])  =  log_tokens[m] + log_dropped[r, c]

where the first term is folded into the second if all means have as many tokens. A
thread holds pairs of columns of logits, one of each GROUP. So where J is a multiple of
GROUP, what a step reads is BLOCK / J numbers, the same for all threads. Of a frame with
edge tiles it also reads log_tokens.

Rows that drop nothing, such as those of text, walk no means. A full row must not: its
CTA may copy keys for another one, which counts the copies.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.attention.means import Means
from pallas_kernels.attention.sm90.cta import MeanBlocks
from pallas_kernels.attention.sm90.plan import BLOCK, BlockCopies, MeanPlan
from pallas_kernels.common.lanes import GROUP
from pallas_kernels.common.sub_tiles import SubTiles


def why_unsupported(sub_tiles: SubTiles) -> str | None:
    """Returns why the kernel cannot take the means of such sub-tiles, or None."""
    per_column = sub_tiles.per_column
    if _fits(per_column):
        return None
    accepted = ", ".join(str(n) for n in range(GROUP, BLOCK + 1) if _fits(n))
    return (
        f"it takes {accepted} means of a tile, not {per_column} "
        f"(sub_tile={sub_tiles.sub_tile} of tile={sub_tiles.tile})"
    )


def _fits(per_column: int) -> bool:
    return per_column % GROUP == 0 and BLOCK % per_column == 0


def plan_of(sub_tiles: SubTiles) -> MeanPlan:
    """Returns what is static about the means of sub-tiles."""
    return MeanPlan(
        num_blocks=-(-sub_tiles.num_cells // BLOCK),
        per_column=sub_tiles.per_column,
        has_log_tokens=len(np.unique(sub_tiles.tokens_per_frame)) > 1,
    )


def mean_blocks(
    means: Means, counts: Int[Array, "L R"], copies: BlockCopies
) -> MeanBlocks:
    """Arranges means as the kernel reads them.

    Args:
      means: What stands for the blocks that are in no list.
      counts: Length of each query block's list, L = B * N.
      copies: How blocks are copied.
    """
    plan = plan_of(means.sub_tiles)
    batch, num_heads, num_rows, num_columns = means.dropped.shape
    dropped = means.dropped.reshape(batch * num_heads, num_rows, num_columns)
    tokens = means.sub_tiles.tokens_per_frame
    log_tokens = _log2(np.pad(tokens, (0, plan.num_blocks * BLOCK - tokens.size)))
    log_dropped = jnp.log2(dropped.astype(jnp.float32))
    if not plan.has_log_tokens:
        log_dropped += log_tokens[0]
    missing = plan.num_blocks * BLOCK // plan.per_column - num_columns
    walks = (dropped > 0).any(-1) & (counts < num_rows)
    return MeanBlocks(
        k=_as_copied(means.k, copies),
        v=_as_copied(means.v, copies),
        log_dropped=jnp.pad(
            log_dropped, ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf
        ),
        log_tokens=jnp.asarray(log_tokens),
        num_blocks=jnp.where(walks, plan.num_blocks, 0).astype(jnp.int32),
    )


def _as_copied(x: Array, copies: BlockCopies) -> Array:
    """Splits the axis of means as copies read it; there is a block of them at least."""
    x = jnp.pad(x, ((0, 0), (0, max(0, BLOCK - x.shape[1])), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], *copies.mean_shape(x.shape[1]), *x.shape[2:])


def _log2(tokens: np.ndarray) -> np.ndarray:
    logarithm = np.log2(np.maximum(tokens, 1)).astype(np.float32)
    return np.where(tokens > 0, logarithm, np.float32(-np.inf))
