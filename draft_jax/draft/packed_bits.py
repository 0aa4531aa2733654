"""Sets of key blocks as bits of 32-bit words, and their lists.

Word `w` of a row holds the columns `first_columns[w]` to `first_columns[w] + 31`, the
lowest bit first. A row of 990 columns is 31 words: whatever is done on them costs
nothing beside one pass over the scores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels.common.device import current_device
from pallas_kernels.ranking import sm90

BITS = 32  # of a word


def pack(flags: Bool[Array, "*rows C"]) -> UInt32[Array, "*rows W"]:
    """Packs the last axis, W = ceil(C / 32); the bits past C are 0."""
    *rows, columns = flags.shape
    num_words = -(-columns // BITS)
    padding = [(0, 0)] * len(rows) + [(0, num_words * BITS - columns)]
    lanes = jnp.pad(flags, padding).reshape(*rows, num_words, BITS)
    bits = np.uint32(1) << np.arange(BITS, dtype=np.uint32)
    return jnp.where(lanes, bits, np.uint32(0)).sum(-1, dtype=jnp.uint32)


def full(columns: int) -> UInt32[np.ndarray, " W"]:
    """Words of a row that holds every column."""
    lengths = np.minimum(columns - np.arange(0, columns, BITS), BITS)
    return ((np.uint64(1) << lengths.astype(np.uint64)) - 1).astype(np.uint32)


def num_set(words: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Set bits of each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def keep_first(
    words: UInt32[Array, "*shape"], count: Int[Array, "*#shape"]
) -> UInt32[Array, "*shape"]:
    """Clears all but the `count` lowest set bits of each word; none for count <= 0."""
    return words & _low_bits(_longest_prefix(words, count))


def lists(
    words: UInt32[Array, "*lists R W"],
    first_columns: Int[np.ndarray, " W"],
    capacity: int,
) -> tuple[Int[Array, "*lists R+1"], Int[Array, "*lists M"]]:
    """Compressed sparse rows of the set bits.

    Args:
      words: Sets of columns.
      first_columns: Column of the lowest bit of each word, ascending.
      capacity: Most entries of a list, M. What comes later is dropped.

    Returns:
      Offsets of the rows, and the columns in ascending order within each row; 0 past
      the last entry.
    """
    *batch, num_rows, _ = words.shape
    in_row = jnp.cumsum(num_set(words), axis=-1, dtype=jnp.int32)
    row_ends = jnp.cumsum(in_row[..., -1], axis=-1, dtype=jnp.int32)
    row_starts = row_ends - in_row[..., -1]
    ends = (row_starts[..., None] + in_row).reshape(*batch, -1)
    flat = words.reshape(*batch, -1)
    columns = np.tile(first_columns, num_rows)
    # A word at a time: rows may have any number of them.
    if sm90.maps.why_unsupported(BITS, current_device(words)) is None:
        block_ids = _write(flat, ends, columns, capacity)
    else:
        block_ids = _look_up(flat, ends, columns, capacity)
    offsets = jnp.pad(row_ends, [(0, 0)] * len(batch) + [(1, 0)])
    return jnp.minimum(offsets, capacity), block_ids


def _write(
    words: UInt32[Array, "*lists K"],
    ends: Int[Array, "*lists K"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
) -> Int[Array, "*lists M"]:
    """Each word writes its columns where they belong."""
    *batch, size = words.shape
    padding = -size % sm90.maps.THREADS

    def padded(x):
        return jnp.pad(x.reshape(-1, size), ((0, 0), (0, padding)))

    block_ids = sm90.maps.write_lists(
        padded(words),
        padded(ends - num_set(words)),
        ends[..., -1].reshape(-1),
        np.pad(columns, (0, padding)),
        capacity,
    )
    return block_ids.reshape(*batch, capacity)


def _look_up(
    words: UInt32[Array, "*lists K"],
    ends: Int[Array, "*lists K"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
) -> Int[Array, "*lists M"]:
    """Each place looks its word up by binary search, and then its bit: no scatter."""
    size = words.shape[-1]
    place = jnp.arange(capacity, dtype=jnp.int32)
    index = _count_at_most(ends, place)
    found = jnp.minimum(index, size - 1)
    word = jnp.take_along_axis(words, found, axis=-1)
    start = jnp.take_along_axis(ends, found, axis=-1) - num_set(word)
    column = jnp.asarray(columns, jnp.int32)[found] + _longest_prefix(
        word, place - start
    )
    return jnp.where(index < size, column, 0)


def _longest_prefix(
    words: UInt32[Array, "*shape"], count: Int[Array, "*#shape"]
) -> Int[Array, "*shape"]:
    """Most low bits, 0 to 32, of which at most `count` are set.

    It is the position of the set bit number `count`, counted from 0, if there is one.
    """
    length = jnp.zeros(words.shape, jnp.int32)
    for step in (16, 8, 4, 2, 1, 1):
        fits = num_set(words & _low_bits(length + step)) <= count
        length = jnp.where(fits, length + step, length)
    return length


def _low_bits(length: Int[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Words with the lowest `length` bits set, 0 to 32."""
    # A shift by 32 would be undefined.
    return jnp.where(length == 0, 0, ~jnp.uint32(0) >> (BITS - length).astype("uint32"))


def _count_at_most(
    ascending: Int[Array, "*lists L"], values: Int[Array, " M"]
) -> Int[Array, "*lists M"]:
    """How many entries of each list are at most each value: a binary search."""
    *batch, length = ascending.shape
    num_steps = length.bit_length()

    # A loop, because XLA takes seconds to compile that many gathers in a chain.
    def add_bit(i, count):
        candidate = count + (1 << (num_steps - 1 - i))
        entry = jnp.take_along_axis(
            ascending, jnp.minimum(candidate, length) - 1, axis=-1
        )
        return jnp.where((candidate <= length) & (entry <= values), candidate, count)

    count = jnp.zeros((*batch, values.size), jnp.int32)
    return jax.lax.fori_loop(0, num_steps, add_bit, count)
