"""Bits of rows in NumPy, and a check of the kernel that selects within rows."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ranking.sm90 import rows as row_kernel


def unpack(words, columns):
    """Flags of words of 32, the lowest bit first."""
    bits = np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :columns].astype(bool)


def pack(flags):
    padded = np.pad(flags, ((0, 0), (0, -flags.shape[1] % 32)))
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def softmax(rng, shape, sharpness=2.0):
    weights = np.exp(sharpness * rng.normal(size=shape))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def few_values(rng, shape):
    """Ties everywhere, both zeros, both infinities, NaN, denormals."""
    values = [-np.inf, -1.5, -0.0, 0.0, 1e-45, 3e-45, 0.25, 3e38, np.inf, np.nan]
    return np.array(values, np.float32)[rng.integers(0, 10, shape)]


def huge(rng, shape):
    """Rows whose sums pass any integer."""
    return rng.choice([0.5, 1.0, 3e38, np.inf], shape).astype(np.float32)


def any_bits(rng, shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


def denormals(rng, shape):
    return rng.integers(0, 1000, shape, dtype=np.uint32).view(np.float32)


def equal(rng, shape):
    return np.full(shape, 1 / shape[-1], np.float32)


def minus_infinity(rng, shape):
    return np.full(shape, -np.inf, np.float32)


def check_rows(scores, least, most, forced, want, wanted, interpret=None):
    """Runs the kernel and compares what it keeps, after ties, with `want`."""
    rows, columns = scores.shape[:2], scores.shape[-1]
    above, tied, count = row_kernel.select_in_rows(
        jnp.asarray(scores),
        *(jnp.broadcast_to(jnp.asarray(x), rows) for x in (least, most)),
        pack(forced) if forced.any() else None,
        wanted=wanted,
        interpret=interpret,
    )
    for words in (above, tied):
        assert not unpack(words, words.shape[-1] * 32)[..., columns:].any()
    above, tied = unpack(above, columns), unpack(tied, columns)
    assert not (above & tied).any()
    place = np.cumsum(tied, -1) + above.sum(-1, keepdims=True)
    kept = above | (tied & (place <= np.asarray(count)[..., None]))
    np.testing.assert_array_equal(kept, want)
    np.testing.assert_array_equal(count, want.sum(-1))


def check_mask(mask, want):
    """Compares a mask's lists with a map [B, N, R, R] of kept pairs."""
    offsets, ids = np.asarray(mask.row_offsets), np.asarray(mask.block_ids)
    np.testing.assert_array_equal(np.diff(offsets, axis=-1), want.sum(-1))
    used = np.arange(ids.shape[-1]) < offsets[..., -1:]
    # Row-major order of the map is that of the lists: ascending within each row.
    np.testing.assert_array_equal(ids[used], np.nonzero(want)[-1])
    assert not ids[~used].any()
