"""Attention in float64 NumPy loops, independent of the code under test, and cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid


def numpy_attention(q, k, v, dense_mask, grid, *, scale=None, text_lengths=None):
    """Query by query softmax over the keys of the kept blocks.

    Returns out [B, T, N, D] and lse [B, N, T] in float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, num_tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    block_of, text = _block_of_token(grid), _text_tokens(grid)
    out = np.zeros_like(q)
    lse = np.full((batch, num_heads, num_tokens), -np.inf)
    for b in range(batch):
        used = len(text) if text_lengths is None else int(text_lengths[b])
        padding = set(text[used:])
        for n in range(num_heads):
            for t in range(num_tokens):
                kept = dense_mask[b, n, block_of[t]]
                keys = [
                    s
                    for s in range(num_tokens)
                    if kept[block_of[s]] and s not in padding
                ]
                if t in padding or not keys:
                    continue
                logits = scale * k[b, keys, n] @ q[b, t, n]
                top = logits.max()
                weights = np.exp(logits - top)
                out[b, t, n] = weights @ v[b, keys, n] / weights.sum()
                lse[b, n, t] = top + np.log(weights.sum())
    return out, lse


def matrix_attention(q, k, v, dense_mask, grid, *, text_lengths=None, xp=np):
    """The same with matrices, for larger sizes; `xp=jnp` can be differentiated.

    float64 with NumPy, float32 at the current matmul precision with jax.numpy. A head
    and 2048 queries at a time: GPU tests run this in many processes side by side.
    """
    if xp is np:
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    block_of = np.asarray(_block_of_token(grid))
    batch, num_tokens, num_heads, _ = q.shape
    parts = [slice(start, start + 2048) for start in range(0, num_tokens, 2048)]
    out, lse = [], []
    for b, n in itertools.product(range(batch), range(num_heads)):
        is_valid = np.ones(num_tokens, bool)
        if text_lengths:
            is_valid[_text_tokens(grid)[text_lengths[b] :]] = False
        keys, values = k[b, :, n], v[b, :, n]
        of_parts = []
        for part in parts:
            allowed = dense_mask[b, n][block_of[part]][:, block_of]
            allowed = allowed & is_valid & is_valid[part, None]
            of_parts.append(_attend_matrix(q[b, part, n], keys, values, allowed, xp))
        part_outs, part_lses = zip(*of_parts, strict=True)
        out.append(xp.concatenate(part_outs))
        lse.append(xp.concatenate(part_lses))
    out = xp.stack(out).reshape(batch, num_heads, num_tokens, -1)
    return xp.swapaxes(out, 1, 2), xp.stack(lse).reshape(batch, num_heads, -1)


def attention_of_rows(queries, k, v, is_valid, scale):
    """Softmax attention of some queries over the valid keys: is_valid [B, T].

    Returns out [B, R, N, D] in float64.
    """
    queries, k, v = (np.asarray(x).astype(np.float64) for x in (queries, k, v))
    out = np.zeros_like(queries)
    for b, n in np.ndindex(queries.shape[0], queries.shape[2]):
        keys, values = (x[b, is_valid[b], n] for x in (k, v))
        logits = queries[b, :, n] @ keys.T * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[b, :, n] = weights @ values / weights.sum(-1, keepdims=True)
    return out


def valid_keys(grid, lengths, batch=2):
    """Tokens that are not padding, [B, T], of text lengths or None."""
    is_valid = np.ones((batch, grid.num_tokens), bool)
    for own, length in zip(is_valid, lengths or (), strict=False):
        own[grid.text_tokens.start + length : grid.text_tokens.stop] = False
    return is_valid


def _attend_matrix(q, k, v, allowed, xp):
    """Some queries [Q, D] of a head over its keys [T, D]."""
    logits = q @ k.T * q.shape[-1] ** -0.5
    has_key = allowed.any(-1)
    # Rows without a key compute a softmax of zeros, which is then dropped.
    logits = xp.where(allowed, logits, xp.where(has_key[:, None], -xp.inf, 0.0))
    top = logits.max(-1, keepdims=True)
    weights = xp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = weights / total * has_key[:, None] @ v
    return out, xp.where(has_key, (top + xp.log(total))[:, 0], -xp.inf)


def _text_tokens(grid):
    visual = grid.frames * grid.height * grid.width
    first = 0 if grid.text_side == "before" else visual
    return list(range(first, first + grid.text_length))


def _block_of_token(grid):
    """Block of each token of the tiled sequence, counted tile by tile."""
    rows, columns = grid.tile
    visual = []
    for _ in range(grid.frames):
        for top in range(0, grid.height, rows):
            for left in range(0, grid.width, columns):
                visual.append(
                    min(rows, grid.height - top) * min(columns, grid.width - left)
                )
    size = rows * columns
    text = [
        min(size, grid.text_length - start)
        for start in range(0, grid.text_length, size)
    ]
    lengths = text + visual if grid.text_side == "before" else visual + text
    return [block for block, length in enumerate(lengths) for _ in range(length)]


def random_qkv(grid, *, batch=2, num_heads=2, head_dim=16, dtype="float32", seed=0):
    """Standard normal q, k and v, rounded to the dtype."""
    rng = np.random.default_rng(seed)
    shape = (batch, grid.num_tokens, num_heads, head_dim)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))


def random_mask(grid, *, batch=2, num_heads=2, density=0.4, seed=0):
    """A boolean map with one empty row, one row of one block and one full row."""
    rng = np.random.default_rng(seed)
    size = grid.num_blocks
    dense = rng.random((batch, num_heads, size, size)) < density
    dense[0, 0, 0] = False
    dense[-1, -1, -1] = np.arange(size) == size // 2
    dense[0, -1, size // 3] = True
    return dense


# One program per grid: eager calls would compile every operation for itself.
_from_dense = jax.jit(BlockMask.from_dense, static_argnames=("grid", "capacity"))


def compress(dense, grid, capacity=None):
    return _from_dense(jnp.asarray(dense), grid=grid, capacity=capacity)


ODD = VideoGrid(2, 5, 7, tile=(2, 4))
CASES = {  # grid, text lengths of the two batch items
    "divisible": (VideoGrid(2, 4, 8, tile=(2, 4)), None),
    "edge-tiles": (ODD, None),
    "one-block": (VideoGrid(1, 2, 3, tile=(4, 4)), None),
    "one-token-tiles": (VideoGrid(1, 2, 3, tile=(1, 1)), None),
    "text-after": (VideoGrid(2, 5, 7, tile=(2, 4), text_length=11), None),
    "text-after-ragged": (VideoGrid(2, 5, 7, tile=(2, 4), text_length=11), (9, 3)),
    "text-after-0": (VideoGrid(1, 4, 8, tile=(2, 4), text_length=8), (0, 8)),
    "text-before-ragged": (
        VideoGrid(2, 5, 7, tile=(2, 4), text_length=11, text_side="before"),
        (0, 10),
    ),
}


def check_partition(got, offsets, ids, classes) -> None:
    """Of `partition_lists`: each list in a stable order of its blocks' classes."""
    entries, ends = map(np.asarray, got)
    for number, starts in enumerate(np.asarray(offsets)):
        for row, (start, stop) in enumerate(itertools.pairwise(starts)):
            own = np.asarray(ids)[number, start:stop]
            want = own[np.argsort(classes[own], kind="stable")]
            np.testing.assert_array_equal(entries[number, start:stop], want)
            counts = np.bincount(classes[own], minlength=ends.shape[-1])
            np.testing.assert_array_equal(ends[number, row], np.cumsum(counts))
