"""Selection as XLA operations, for any device: thresholds by bisection on keys' bits.

The k-th largest of some keys is the largest integer that at least k of them reach. It
is found digit by digit: each digit is a count over the keys. All of it is integer
arithmetic, so results are the same on every device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.ranking import packed_bits
from pallas_kernels.ranking.keys import MASS_UNITS, rank_keys

KEY_BITS = 32
# Bits of a key that are found in one pass over the scores: b bits take 2^b - 1
# comparisons each, of which a CPU wants few; a GPU wants few passes.
CPU_DIGIT_BITS = 1
DIGIT_BITS = 2


def select_in_rows(
    scores: Float[Array, "B N R C"],
    count: Int[Array, " R"],
    forced: Bool[np.ndarray, "R C"],
    *,
    digit_bits: int,
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each row; see `pallas_kernels.ranking`."""
    keys = rank_keys(scores, forced)
    threshold = kth_largest_of_row(keys, count, digit_bits=digit_bits)
    return pack_rows(keys, threshold).largest_of_row(count)


def select_to_mass(
    probabilities: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    forced: Bool[np.ndarray, "R C"],
    wanted: int,
    *,
    digit_bits: int,
) -> UInt32[Array, "B N R W"]:
    """Selects the fewest probabilities of a mass; see `pallas_kernels.ranking`.

    Args:
      probabilities: Probabilities of each row.
      least: Probabilities to keep at least of each row.
      most: Probabilities to keep at most.
      forced: Probabilities that rank before all others.
      wanted: Mass to reach, in units of 1 / MASS_UNITS.
      digit_bits: See `largest_key`.
    """
    keys = rank_keys(probabilities, forced)
    mass = np.uint32(wanted)
    units = jnp.nan_to_num(probabilities.astype(jnp.float32)) * MASS_UNITS
    units = jnp.round(jnp.clip(units, 0.0, MASS_UNITS)).astype(jnp.uint32)

    def at_or_above(key):
        is_in = keys >= key[..., None]
        return is_in.sum(-1, dtype=jnp.int32), _sum_up_to_one(is_in, units)

    def reached(key):
        count, held = at_or_above(key)
        return (count >= least) & ((held >= mass) | (count >= most))

    threshold = largest_key(reached, keys.shape[:3], digit_bits=digit_bits)
    is_above = keys > threshold[..., None]
    above = is_above.sum(-1, dtype=jnp.int32)
    held = _sum_up_to_one(is_above, units)
    missing = mass - jnp.minimum(held, mass)
    # Pairs at the threshold are equal, so they hold the same mass.
    each = jnp.where(keys == threshold[..., None], units, 0).max(-1)
    num_missing = -(
        -missing.astype(jnp.int32) // jnp.maximum(each, 1).astype(jnp.int32)
    )
    count = jnp.clip(above + num_missing, least, most)
    return pack_rows(keys, threshold).largest_of_row(count)


def kth_largest_of_map(
    keys: UInt32[Array, "B N R C"], k: Int[Array, ""], *, digit_bits: int
) -> UInt32[Array, "B N"]:
    """Finds the k-th largest key of each map, k from 1."""

    def reached(key):
        return (keys >= key[..., None, None]).sum((-2, -1), dtype=jnp.int32) >= k

    return largest_key(reached, keys.shape[:2], digit_bits=digit_bits)


def kth_largest_of_row(
    keys: UInt32[Array, "B N R C"], k: Int[Array, " #R"], *, digit_bits: int
) -> UInt32[Array, "B N R"]:
    """Finds the k-th largest key of each row, k from 1."""

    def reached(key):
        return (keys >= key[..., None]).sum(-1, dtype=jnp.int32) >= k

    return largest_key(reached, keys.shape[:3], digit_bits=digit_bits)


def largest_key(
    reached: Callable[[UInt32[Array, "*groups"]], Bool[Array, "*groups"]],
    groups: tuple[int, ...],
    *,
    digit_bits: int,
) -> UInt32[Array, "*groups"]:
    """Finds the largest key for which `reached` holds, which must hold for 0.

    Args:
      reached: Whether enough lies at or above a key of each group; never true for a
        key and false for a smaller one.
      groups: Shape of the groups.
      digit_bits: Bits of a key that are found in one pass.
    """

    def find_digit(i, key):
        # Without jit the loop's index is Python's.
        shift = jnp.asarray(KEY_BITS - digit_bits * (i + 1), jnp.uint32)
        candidates = [key | (jnp.uint32(n) << shift) for n in range(1, 1 << digit_bits)]
        digit = sum(reached(candidate).astype(jnp.uint32) for candidate in candidates)
        return key | (digit << shift)

    first = jnp.zeros(groups, jnp.uint32)
    return jax.lax.fori_loop(0, KEY_BITS // digit_bits, find_digit, first)


def list_columns(
    words: UInt32[Array, "*lists K"],
    ends: Int[Array, "*lists K"],
    columns: Int[np.ndarray, " K"],
    capacity: int,
) -> Int[Array, "*lists M"]:
    """Lists the columns of the set bits of all words, in order.

    Each entry looks its word up by binary search, and then its bit: no scatter.

    Args:
      words: Sets of columns.
      ends: Set bits of all words up to each, itself included.
      columns: Column of the lowest bit of each word.
      capacity: Entries of a list, M. Later ones are dropped.

    Returns:
      The columns, 0 past the last one.
    """
    size = words.shape[-1]
    entry = jnp.arange(capacity, dtype=jnp.int32)
    index = _count_at_most(ends, entry)
    found = jnp.minimum(index, size - 1)
    word = jnp.take_along_axis(words, found, axis=-1)
    start = jnp.take_along_axis(ends, found, axis=-1) - packed_bits.num_set(word)
    bit = packed_bits.longest_prefix(word, entry - start)
    column = jnp.asarray(columns, jnp.int32)[found] + bit
    return jnp.where(index < size, column, 0)


def pack_rows(
    keys: UInt32[Array, "B N R C"], threshold: UInt32[Array, "B N R"]
) -> packed_bits.PackedRows:
    """Compares the keys with the threshold of their row."""
    return packed_bits.PackedRows(
        above=packed_bits.pack(keys > threshold[..., None]),
        tied=packed_bits.pack(keys == threshold[..., None]),
        best=packed_bits.pack(keys == keys.max(-1, keepdims=True)),
    )


def _sum_up_to_one(
    is_in: Bool[Array, "B N R C"], units: UInt32[Array, "B N R C"]
) -> UInt32[Array, "B N R"]:
    """Adds the chosen units of each row, at most MASS_UNITS: it cannot wrap."""

    def add(a, b):
        return jnp.minimum(a + b, np.uint32(MASS_UNITS))

    chosen = jnp.where(is_in, units, jnp.uint32(0))
    return jax.lax.reduce(chosen, np.uint32(0), add, (chosen.ndim - 1,))


def _count_at_most(
    ascending: Int[Array, "*lists L"], values: Int[Array, " M"]
) -> Int[Array, "*lists M"]:
    """Counts the entries of each list that are at most each value: a binary search."""
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
