"""Whether another library's attention is that of this project's kernel.

One token of each query block is compared, in every head: so another list of one query
block shows, and no copy of a whole output is made.
"""

import jax
import jax.numpy as jnp
import numpy as np

from draft_jax import VideoGrid

# Relative L2 error of the worst row. Bfloat16 rounds weights and outputs on both sides;
# against float32 the kernel's was 2.2e-3 over all rows. Without one key block of the
# 990 that a full row of the largest shape has, it is 3e-2.
MOST_ERROR = 2e-2


def one_token_of_each_block(grid: VideoGrid, seed: int = 0) -> np.ndarray:
    """Tokens in tiled order, at random places of their blocks."""
    rng = np.random.default_rng(seed)
    return grid.block_starts + rng.integers(0, grid.block_lengths)


def rows_at(out, tokens: np.ndarray) -> np.ndarray:
    """Rows [B, S, N, D] of an output [B, T, N, D] of JAX or PyTorch, in float32.

    Of a tuple the first is taken: FlashAttention may return its log-sum-exp too.
    """
    out = out[0] if isinstance(out, tuple) else out
    rows = out[:, tokens]
    if isinstance(rows, jax.Array):
        return np.asarray(rows.astype(jnp.float32))
    return rows.float().cpu().numpy()


def compare(out, want: np.ndarray, tokens: np.ndarray) -> dict[str, object]:
    """Returns the record of an output: its error, or that it is another one."""
    got = rows_at(out, tokens)
    if got.shape != want.shape:
        return {"error": f"rows of shape {got.shape}, not {want.shape} as ours"}
    size = np.maximum(np.linalg.norm(want, axis=-1), np.finfo(np.float32).tiny)
    worst = float((np.linalg.norm(got - want, axis=-1) / size).max())
    if not worst <= MOST_ERROR:  # NaN is refused too
        return {"error": f"differs from ours: relative error {worst:.3g} of a row"}
    return {"error_to_ours": worst}
