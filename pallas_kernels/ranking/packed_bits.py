"""Sets of columns as bits of 32-bit words.

Word `w` of a row holds the columns `first_columns[w]` to `first_columns[w] + 31`, the
lowest bit first. A row of 990 columns is 31 words: whatever is done on them costs
nothing beside one pass over the scores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

WORD_BITS = 32


def pack(flags: Bool[Array, "*rows C"]) -> UInt32[Array, "*rows W"]:
    """Packs the last axis, W = ceil(C / 32); the bits past C are 0."""
    *rows, columns = flags.shape
    num_words = -(-columns // WORD_BITS)
    padding = [(0, 0)] * len(rows) + [(0, num_words * WORD_BITS - columns)]
    lanes = jnp.pad(flags, padding).reshape(*rows, num_words, WORD_BITS)
    bits = np.uint32(1) << np.arange(WORD_BITS, dtype=np.uint32)
    return jnp.where(lanes, bits, np.uint32(0)).sum(-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*rows W"], columns: int) -> Bool[Array, "*rows C"]:
    """Inverts `pack`: whether the bit of each column is set. Columns are static."""
    lanes = np.arange(WORD_BITS, dtype=np.uint32)
    is_set = (words[..., None] >> lanes & 1).astype(jnp.bool_)
    return is_set.reshape(*words.shape[:-1], -1)[..., :columns]


def pack_numpy(flags: Bool[np.ndarray, "R C"]) -> UInt32[np.ndarray, "R W"]:
    """Packs the last axis of a NumPy array like `pack`."""
    padded = np.pad(flags, ((0, 0), (0, -flags.shape[-1] % WORD_BITS)))
    octets = np.packbits(padded, axis=-1, bitorder="little")
    return octets.view("<u4").astype(np.uint32)


def all_set(columns: int) -> UInt32[np.ndarray, " W"]:
    """Returns the words of a row that holds every column."""
    lengths = np.minimum(columns - np.arange(0, columns, WORD_BITS), WORD_BITS)
    return ((np.uint64(1) << lengths.astype(np.uint64)) - 1).astype(np.uint32)


def num_set(words: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Counts the set bits of each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def keep_first(
    words: UInt32[Array, "*shape"], count: Int[Array, "*#shape"]
) -> UInt32[Array, "*shape"]:
    """Clears all but the `count` lowest set bits of each word; none for count <= 0."""
    return words & low_bits(longest_prefix(words, count))


def longest_prefix(
    words: UInt32[Array, "*shape"], count: Int[Array, "*#shape"]
) -> Int[Array, "*shape"]:
    """Returns most low bits, 0 to 32, of which at most `count` are set.

    It is the position of the set bit of index `count`, from 0, if there is one.
    """
    length = jnp.zeros(words.shape, jnp.int32)
    for step in (16, 8, 4, 2, 1, 1):
        fits = num_set(words & low_bits(length + step)) <= count
        length = jnp.where(fits, length + step, length)
    return length


def low_bits(length: Int[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns words with the lowest `length` bits set, 0 to 32."""
    # A shift by 32 would be undefined.
    shift = (WORD_BITS - length).astype("uint32")
    return jnp.where(length == 0, 0, ~jnp.uint32(0) >> shift)


def first_of_rows(
    words: UInt32[Array, "*rows W"], count: Int[Array, "*#rows"]
) -> UInt32[Array, "*rows W"]:
    """Clears all but the `count` first set bits of each row."""
    set_in_word = num_set(words)
    before = jnp.cumsum(set_in_word, axis=-1, dtype=jnp.int32) - set_in_word
    return keep_first(words, count[..., None] - before)


def with_first_ties(
    above: UInt32[Array, "B N R W"],
    tied: UInt32[Array, "B N R W"],
    count: Int[Array, "*#rows"],
) -> UInt32[Array, "B N R W"]:
    """Joins the bits above a threshold and the first ties: `count` in each row."""
    num_above = num_set(above).sum(-1, dtype=jnp.int32)
    return above | first_of_rows(tied, count - num_above)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Keys of each row as bits: above a threshold, at it, and the largest."""

    above: UInt32[Array, "B N R W"]
    tied: UInt32[Array, "B N R W"]
    best: UInt32[Array, "B N R W"]

    def largest_of_map(self, count: Int[Array, ""]) -> UInt32[Array, "B N R W"]:
        """Returns the largest of each map, and the best of a row without any of them.

        Ties at the threshold go to the first ones.
        """
        num_above = num_set(self.above).sum((-2, -1), dtype=jnp.int32)
        num_tied = num_set(self.tied).sum(-1, dtype=jnp.int32)
        tied_before = jnp.cumsum(num_tied, axis=-1, dtype=jnp.int32) - num_tied
        wanted = (count - num_above)[..., None] - tied_before
        kept = self.above | first_of_rows(self.tied, wanted)
        is_empty = (kept == 0).all(-1, keepdims=True)
        return jnp.where(is_empty, self.best_of_row(), kept)

    def largest_of_row(self, count: Int[Array, "*#rows"]) -> UInt32[Array, "B N R W"]:
        """Returns the largest of each row; ties at the threshold go to the first."""
        return with_first_ties(self.above, self.tied, count)

    def best_of_row(self) -> UInt32[Array, "B N R W"]:
        """Returns the first of the largest keys of each row."""
        return first_of_rows(self.best, jnp.ones(self.best.shape[:3], jnp.int32))
