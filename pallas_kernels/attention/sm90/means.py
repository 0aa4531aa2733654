"""Means for skipped blocks, as the Hopper kernel walks them.

Behind its list a query block walks all means, in blocks of BLOCK: their products and
their softmax are those of any key block, but for the logits of mean m, which get the
base-2 logarithm of the tokens that it stands for. With J means in a column, mean m is
of column c = m // J, and

    log2(tokens of a frame[m] * dropped[r, c])  =  log_tokens[m] + log_dropped[r, c]

where the first term is folded into the second if all means have as many tokens. A
thread holds pairs of columns of logits, one of each GROUP. So where J is a multiple of
GROUP, what a step reads is BLOCK / J numbers, the same for all threads. Of a frame with
edge tiles it also reads log_tokens. Columns of another J get means of no token at their
end, up to the next number that is a multiple of GROUP and divides BLOCK.

Rows that drop nothing, such as those of text, walk no means. A full row must not: its
CTA may copy keys for another one, which counts the copies.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.means import Means
from pallas_kernels.attention.sm90.cta import MeanBlocks
from pallas_kernels.attention.sm90.plan import BLOCK, BlockCopies, MeanPlan
from pallas_kernels.common.lanes import GROUP
from pallas_kernels.common.sub_tiles import SubTiles


def plan_of(sub_tiles: SubTiles) -> MeanPlan:
    """Returns what is static about the means of sub-tiles."""
    # A tile has at most BLOCK tokens, and so many means.
    fitting = (n for n in range(GROUP, BLOCK + 1, GROUP) if BLOCK % n == 0)
    per_column = next(n for n in fitting if n >= sub_tiles.per_column)
    return MeanPlan(
        num_blocks=-(-sub_tiles.num_columns * per_column // BLOCK),
        per_column=per_column,
        has_log_tokens=per_column != sub_tiles.per_column
        or len(np.unique(sub_tiles.tokens_per_frame)) > 1,
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
    added = plan.per_column - means.sub_tiles.per_column
    columns = means.sub_tiles.tokens_per_frame.reshape(num_columns, -1)
    tokens = np.pad(columns, ((0, 0), (0, added))).ravel()
    log_tokens = _log2(np.pad(tokens, (0, plan.num_blocks * BLOCK - tokens.size)))
    log_dropped = jnp.log2(dropped.astype(jnp.float32))
    if not plan.has_log_tokens:
        log_dropped += log_tokens[0]
    missing = plan.num_blocks * BLOCK // plan.per_column - num_columns
    walks = (dropped > 0).any(-1) & (counts < num_rows)
    return MeanBlocks(
        k=_as_copied(_pad_columns(means.k, num_columns, added), copies),
        v=_as_copied(_pad_columns(means.v, num_columns, added), copies),
        log_dropped=jnp.pad(
            log_dropped, ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf
        ),
        log_tokens=jnp.asarray(log_tokens),
        num_blocks=jnp.where(walks, plan.num_blocks, 0).astype(jnp.int32),
    )


def _pad_columns(
    x: Float[Array, "B M N D"], num_columns: int, added: int
) -> Float[Array, "B _ N D"]:
    """Returns means with so many zeros at the end of each column."""
    if not added:
        return x
    columns = x.reshape(x.shape[0], num_columns, -1, *x.shape[2:])
    padding = ((0, 0), (0, 0), (0, added), (0, 0), (0, 0))
    return jnp.pad(columns, padding).reshape(x.shape[0], -1, *x.shape[2:])


def _as_copied(x: Array, copies: BlockCopies) -> Array:
    """Splits the axis of means as copies read it; there is a block of them at least."""
    x = jnp.pad(x, ((0, 0), (0, max(0, BLOCK - x.shape[1])), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], *copies.mean_shape(x.shape[1]), *x.shape[2:])


def _log2(tokens: np.ndarray) -> np.ndarray:
    logarithm = np.log2(np.maximum(tokens, 1)).astype(np.float32)
    return np.where(tokens > 0, logarithm, np.float32(-np.inf))
