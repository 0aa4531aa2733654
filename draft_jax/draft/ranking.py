"""Exact ranking without a sort: thresholds by bisection on the bits of the scores.

Scores become integers of the same order. The k-th largest is then the largest integer
that at least k of them reach, which is found digit by digit: each digit is a count over
the scores. All of it is integer arithmetic, so results are the same on every device.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from draft_jax.draft import packed_bits
from pallas_kernels.common.device import current_device
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.ranking import sm90

KEY_BITS = 32
# Of a key, found in one pass over the scores: b bits take 2^b - 1 comparisons each, of
# which a CPU wants few; a GPU wants few passes.
CPU_DIGIT_BITS = 1
DIGIT_BITS = 2
FIRST = np.uint32(0xFFFFFFFF)  # ranks before every score
_LAST = np.uint32(0x007FFFFF)  # of minus infinity


def rank_keys(scores: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Integers in the order of the scores.

    -0 and 0 are one value; numbers too small to be normal differ from 0. NaN ranks
    with minus infinity.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = np.uint32(0x80000000)
    keys = jnp.where(bits > sign, ~bits, bits | sign)
    is_nan = (bits & ~sign) > np.uint32(0x7F800000)
    return jnp.where(is_nan, _LAST, keys)


def has_kernels(keys: Num[Array, "B N R C"]) -> bool:
    """Whether the device has kernels for maps of keys, or of scores, of this shape.

    On a GPU without them XLA takes over, many times slower: that warns once.
    """
    device = current_device(keys)
    cause = sm90.maps.why_unsupported(keys.shape[-1], device)
    if cause is not None and device.platform == "gpu":
        warn_once(f"selection runs on XLA instead of its kernels: {cause}")
    return cause is None


def largest_key(
    reached: Callable[[UInt32[Array, "*groups"]], Bool[Array, "*groups"]],
    groups: tuple[int, ...],
) -> UInt32[Array, "*groups"]:
    """The largest key for which `reached` holds, which must hold for 0.

    Args:
      reached: Whether enough lies at or above a key of each group; never true for a
        key and false for a smaller one.
      groups: Shape of the groups.
    """
    bits = CPU_DIGIT_BITS if current_device().platform == "cpu" else DIGIT_BITS

    def find_digit(i, key):
        shift = (KEY_BITS - bits * (i + 1)).astype(jnp.uint32)
        candidates = [key | (jnp.uint32(n) << shift) for n in range(1, 1 << bits)]
        digit = sum(reached(candidate).astype(jnp.uint32) for candidate in candidates)
        return key | (digit << shift)

    first = jnp.zeros(groups, jnp.uint32)
    return jax.lax.fori_loop(0, KEY_BITS // bits, find_digit, first)


def kth_largest_of_map(
    keys: UInt32[Array, "B N R C"], k: Int[Array, ""]
) -> UInt32[Array, "B N"]:
    """The k-th largest key of each map, k from 1."""
    if has_kernels(keys):
        return _kth_largest_by_counts(keys, k)

    def reached(key):
        return (keys >= key[..., None, None]).sum((-2, -1), dtype=jnp.int32) >= k

    return largest_key(reached, keys.shape[:2])


def _kth_largest_by_counts(
    keys: UInt32[Array, "B N R C"], k: Int[Array, ""]
) -> UInt32[Array, "B N"]:
    """The k-th largest key of each map by a histogram of each of its digits."""
    flat = keys.reshape(-1, *keys.shape[2:])
    prefix = jnp.zeros(flat.shape[:1], jnp.uint32)
    k = jnp.broadcast_to(k, prefix.shape)
    for digit in sm90.maps.DIGITS:
        counts = sm90.maps.count_digits(flat, prefix, digit)
        at_least = jnp.cumsum(counts[:, ::-1], axis=-1, dtype=jnp.int32)[:, ::-1]
        value = (at_least >= k[:, None]).sum(-1, dtype=jnp.int32) - 1
        is_above = jnp.arange(digit.num_values) > value[:, None]
        k -= jnp.where(is_above, counts, 0).sum(-1, dtype=jnp.int32)
        prefix = (prefix << digit.bits) | value.astype(jnp.uint32)
    return prefix.reshape(keys.shape[:2])


def kth_largest_of_row(
    keys: UInt32[Array, "B N R C"], k: Int[Array, " #R"]
) -> UInt32[Array, "B N R"]:
    """The k-th largest key of each row, k from 1."""

    def reached(key):
        return (keys >= key[..., None]).sum(-1, dtype=jnp.int32) >= k

    return largest_key(reached, keys.shape[:3])


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Keys of each row as bits of words: above a threshold, at it, and the largest."""

    above: UInt32[Array, "B N R W"]
    tied: UInt32[Array, "B N R W"]
    best: UInt32[Array, "B N R W"]

    def largest_of_map(self, k: Int[Array, ""]) -> UInt32[Array, "B N R W"]:
        """The k largest of each map; ties at the threshold go to the first ones."""
        num_above = packed_bits.num_set(self.above).sum((-2, -1), dtype=jnp.int32)
        num_tied = packed_bits.num_set(self.tied).sum(-1, dtype=jnp.int32)
        tied_before = jnp.cumsum(num_tied, axis=-1, dtype=jnp.int32) - num_tied
        wanted = (k - num_above)[..., None] - tied_before
        return self.above | _first_of_rows(self.tied, wanted)

    def largest_of_row(self, k: Int[Array, "*#rows"]) -> UInt32[Array, "B N R W"]:
        """The k largest of each row; ties at the threshold go to the first ones."""
        return _with_first_ties(self.above, self.tied, k)

    def best_of_row(self) -> UInt32[Array, "B N R W"]:
        """The first of the largest keys of each row."""
        return _first_of_rows(self.best, jnp.ones(self.best.shape[:3], jnp.int32))


def pack_rows(
    keys: UInt32[Array, "B N R C"],
    threshold: UInt32[Array, "B N R"],
) -> PackedRows:
    """Compares the keys with the threshold of their row."""
    num_words = -(-keys.shape[-1] // packed_bits.BITS)
    if not has_kernels(keys):
        return PackedRows(
            above=packed_bits.pack(keys > threshold[..., None]),
            tied=packed_bits.pack(keys == threshold[..., None]),
            best=packed_bits.pack(keys == keys.max(-1, keepdims=True)),
        )
    packed = sm90.maps.pack_rows(
        keys.reshape(-1, *keys.shape[2:]), threshold.reshape(-1, threshold.shape[2])
    )
    shape = (*keys.shape[:3], -1)
    return PackedRows(*(x.reshape(shape)[..., :num_words] for x in packed))


def select_in_rows(
    scores: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    forced: UInt32[np.ndarray, "R W"] | None,
    *,
    wanted: int | None,
) -> UInt32[Array, "B N R W"]:
    """Bits of the best scores of each row, by a kernel: `has_kernels` must hold.

    Args:
      scores: Larger is better.
      least: Scores to keep at least: 1 or more, and all that are forced.
      most: Scores to keep at most.
      forced: Bits of scores that rank before all others, or None.
      wanted: Keeps the fewest whose units of 1 / MASS_UNITS reach this number, between
        least and most. None keeps `most`.
    """
    maps = scores.astype(jnp.float32).reshape(-1, *scores.shape[2:])
    least, most = (jnp.broadcast_to(x, maps.shape[:2]) for x in (least, most))
    above, tied, count = (
        x.reshape(*scores.shape[:3], *x.shape[2:])
        for x in sm90.rows.select_in_rows(maps, least, most, forced, wanted=wanted)
    )
    return _with_first_ties(above, tied, count)


def _with_first_ties(
    above: UInt32[Array, "B N R W"],
    tied: UInt32[Array, "B N R W"],
    count: Int[Array, "*#rows"],
) -> UInt32[Array, "B N R W"]:
    """What is above a threshold and the first ties: `count` in each row."""
    num_above = packed_bits.num_set(above).sum(-1, dtype=jnp.int32)
    return above | _first_of_rows(tied, count - num_above)


def _first_of_rows(
    words: UInt32[Array, "B N R W"], count: Int[Array, "B N R"]
) -> UInt32[Array, "B N R W"]:
    """Clears all but the `count` first set bits of each row."""
    num_set = packed_bits.num_set(words)
    before = jnp.cumsum(num_set, axis=-1, dtype=jnp.int32) - num_set
    return packed_bits.keep_first(words, count[..., None] - before)
