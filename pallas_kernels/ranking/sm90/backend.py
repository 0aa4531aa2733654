"""Selection by the Hopper kernels, with the maps of a batch in one axis."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.common.device import Device
from pallas_kernels.common.inline_ptx import THREADS
from pallas_kernels.ranking import packed_bits
from pallas_kernels.ranking.sm90 import maps, rows


def why_unsupported(columns: int, device: Device) -> str | None:
    """Returns why the kernels cannot take rows of this many keys, or None if they can.

    Args:
      columns: Keys of a row.
      device: Device that they would run on.
    """
    if cause := device.why_not_hopper():
        return cause
    if columns > maps.MAX_COLUMNS:
        return f"they take rows of at most {maps.MAX_COLUMNS} keys, not {columns}"
    return None


def select_in_rows(
    scores: Float[Array, "B N R C"],
    count: Int[Array, " R"],
    forced: Bool[np.ndarray, "R C"],
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each row; see `pallas_kernels.ranking`."""
    return _select_in_rows(scores, count, count, forced, wanted=None)


def select_to_mass(
    probabilities: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    forced: Bool[np.ndarray, "R C"],
    wanted: int,
) -> UInt32[Array, "B N R W"]:
    """Selects the fewest probabilities of a mass; see `xla.select_to_mass`."""
    return _select_in_rows(probabilities, least, most, forced, wanted=wanted)


def kth_largest_of_map(
    keys: UInt32[Array, "B N R C"], k: Int[Array, ""]
) -> UInt32[Array, "B N"]:
    """Finds the k-th largest key of each map by a histogram of each of its digits."""
    flat = rearrange(keys, "b n r c -> (b n) r c")
    prefix = jnp.zeros(flat.shape[:1], jnp.uint32)
    k = jnp.broadcast_to(k, prefix.shape)
    for digit in maps.DIGITS:
        counts = maps.count_digits(flat, prefix, digit)
        at_least = jnp.cumsum(counts[:, ::-1], axis=-1, dtype=jnp.int32)[:, ::-1]
        value = (at_least >= k[:, None]).sum(-1, dtype=jnp.int32) - 1
        is_above = jnp.arange(digit.num_values) > value[:, None]
        k -= jnp.where(is_above, counts, 0).sum(-1, dtype=jnp.int32)
        prefix = (prefix << digit.bits) | value.astype(jnp.uint32)
    return prefix.reshape(keys.shape[:2])


def list_columns(
    words: UInt32[Array, "*lists K"],
    ends: Int[Array, "*lists K"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
) -> Int[Array, "*lists M"]:
    """Lists the columns of the set bits of all words; see `xla.list_columns`.

    Each word writes its columns where they belong.
    """
    *batch, size = words.shape
    padding = -size % THREADS

    def padded(x):
        return jnp.pad(x.reshape(-1, size), ((0, 0), (0, padding)))

    block_ids = maps.write_lists(
        padded(words),
        padded(ends - packed_bits.num_set(words)),
        ends[..., -1].reshape(-1),
        np.pad(columns, (0, padding)),
        capacity,
    )
    return block_ids.reshape(*batch, capacity)


def _select_in_rows(
    scores: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    forced: Bool[np.ndarray, "R C"],
    *,
    wanted: int | None,
) -> UInt32[Array, "B N R W"]:
    flat = rearrange(scores.astype(jnp.float32), "b n r c -> (b n) r c")
    least, most = (jnp.broadcast_to(x, flat.shape[:2]) for x in (least, most))
    words = packed_bits.pack_numpy(forced) if forced.any() else None
    above, tied, count = (
        x.reshape(*scores.shape[:3], *x.shape[2:])
        for x in rows.select_in_rows(flat, least, most, words, wanted=wanted)
    )
    return packed_bits.with_first_ties(above, tied, count)


def pack_rows(
    keys: UInt32[Array, "B N R C"], threshold: UInt32[Array, "B N R"]
) -> packed_bits.PackedRows:
    """Compares the keys with the threshold of their row."""
    num_words = -(-keys.shape[-1] // packed_bits.WORD_BITS)
    packed = maps.pack_rows(
        rearrange(keys, "b n r c -> (b n) r c"),
        rearrange(threshold, "b n r -> (b n) r"),
    )
    shape = (*keys.shape[:3], -1)
    return packed_bits.PackedRows(*(x.reshape(shape)[..., :num_words] for x in packed))
