"""The best scores of maps and of their rows, as bits of words and as lists.

Selection is exact and without a sort: integers of the scores' order are searched for a
threshold, and ties at the threshold go to the first ones. Hopper GPUs have kernels for
it; XLA does it elsewhere, which on another GPU is many times slower and warns once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.common.arrays import AnyArray, to_jax
from pallas_kernels.common.device import Device, current_device
from pallas_kernels.common.linear_maps import on_own_shards
from pallas_kernels.common.sharding import lists_of_maps
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.common.static import StaticArray, jit_once
from pallas_kernels.ranking import packed_bits, sm90, xla
from pallas_kernels.ranking.keys import MASS_UNITS, rank_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingPath:
    """How a device ranks: chosen once outside of jit, where devices are known.

    Attributes:
      selects_in_kernels: Whether the kernels select; else XLA does.
      lists_in_kernel: Whether a kernel lists the columns.
      digit_bits: Bits of a key that XLA finds in one pass over the scores.
    """

    selects_in_kernels: bool
    lists_in_kernel: bool
    digit_bits: int


def choose_path(columns: int, device: Device) -> RankingPath:
    """Chooses the kernels where the device has them for rows of this size, else XLA.

    On a GPU without them XLA takes over, many times slower: that warns once.

    Args:
      columns: Scores of a row.
      device: Device that ranks.

    Returns:
      The path, which is a static argument of what runs on it.
    """
    cause = sm90.backend.why_unsupported(columns, device)
    if cause is not None and device.platform == "gpu":
        warn_once(f"selection runs on XLA instead of its kernels: {cause}")
    is_cpu = device.platform == "cpu"
    return RankingPath(
        selects_in_kernels=cause is None,
        lists_in_kernel=_has_list_kernel(device),
        digit_bits=xla.CPU_DIGIT_BITS if is_cpu else xla.DIGIT_BITS,
    )


def select_in_maps(
    scores: Float[AnyArray, "B N R C"],
    count: Int[AnyArray, ""],
    *,
    forced: Bool[np.ndarray, "R C"],
    path: RankingPath | None = None,
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each map; every row keeps its best one at least.

    Args:
      scores: Larger is better; NaN ranks last, with minus infinity. Ties go to the
        lower row, then to the lower column.
      count: Scores to keep of each map, from 1 and not less than the forced ones. A row
        that none of them is in keeps its best one beyond the count.
      forced: Scores that rank before all others, the same in each map. Static.
      path: What to run on; None takes what the device of the scores has. Static.

    Returns:
      Bits of the kept scores, 32 columns to a word, the lowest bit first.
    """
    (scores,) = to_jax(scores)
    path = path or _path_of(scores)
    return _select_in_maps(scores, count, forced=StaticArray(forced), path=path)


@functools.partial(jit_once, static_argnames=("forced", "path"))
def _select_in_maps(scores, count, *, forced: StaticArray, path: RankingPath):
    def select(scores, count):
        return (_best_of_maps(scores, count, forced.values, path),)

    (words,) = _on_own_maps(select, "count:")(scores, count)
    return words


def _on_own_maps(select: Callable[..., Any], *operands: str) -> Callable[..., Any]:
    """Makes a selection run where its maps are; `operands` are those after scores."""
    return on_own_shards(
        select,
        operation="selection",
        operands=("scores: B N R C", *operands),
        results=("B N R W",),
    )


def _best_of_maps(scores, count, forced, path: RankingPath):
    keys = rank_keys(scores, forced)
    if path.selects_in_kernels:
        threshold = sm90.backend.kth_largest_of_map(keys, count)
    else:
        threshold = xla.kth_largest_of_map(keys, count, digit_bits=path.digit_bits)
    pack_rows = sm90.backend.pack_rows if path.selects_in_kernels else xla.pack_rows
    of_rows = jnp.broadcast_to(threshold[..., None], keys.shape[:3])
    return pack_rows(keys, of_rows).largest_of_map(count)


def select_in_rows(
    scores: Float[AnyArray, "B N R C"],
    count: Int[AnyArray, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
    path: RankingPath | None = None,
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each row.

    Args:
      scores: Larger is better; NaN ranks last, with minus infinity. Ties go to the
        lower column.
      count: Scores to keep of each row, from 1 and not less than the forced ones.
      forced: Scores that rank before all others, the same in each map. Static.
      path: What to run on; None takes what the device of the scores has. Static.

    Returns:
      Bits of the kept scores, 32 columns to a word, the lowest bit first.
    """
    (scores,) = to_jax(scores)
    path = path or _path_of(scores)
    return _select_in_rows(scores, count, forced=StaticArray(forced), path=path)


@functools.partial(jit_once, static_argnames=("forced", "path"))
def _select_in_rows(scores, count, *, forced: StaticArray, path: RankingPath):
    def select(scores, count):
        if path.selects_in_kernels:
            return (sm90.backend.select_in_rows(scores, count, forced.values),)
        bits = path.digit_bits
        return (xla.select_in_rows(scores, count, forced.values, digit_bits=bits),)

    (words,) = _on_own_maps(select, "count: R")(scores, count)
    return words


def select_to_mass(
    probabilities: Float[AnyArray, "B N R C"],
    least: Int[AnyArray, " R"],
    most: Int[AnyArray, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
    mass: float,
    path: RankingPath | None = None,
) -> UInt32[Array, "B N R W"]:
    """Selects the fewest best probabilities of each row that hold a mass together.

    Args:
      probabilities: Added in units of 2^-30: each counts as a mass of 0 to 1, negative
        ones and NaN as 0, larger ones as 1. They rank as in `select_in_rows`, and the
        sum of a row may be any.
      least: Probabilities to keep at least of each row: 1 or more, and all forced ones.
      most: Probabilities to keep at most, not less than `least`.
      forced: Probabilities that rank before all others, the same in each map. Static.
      mass: Mass to reach, in (0, 1]. Static.
      path: What to run on; None takes what the device of the scores has. Static.

    Returns:
      Bits of the kept probabilities, 32 columns to a word, the lowest bit first.
    """
    wanted = round(mass * MASS_UNITS)
    (probabilities,) = to_jax(probabilities)
    path = path or _path_of(probabilities)
    return _select_to_mass(
        probabilities, least, most, forced=StaticArray(forced), wanted=wanted, path=path
    )


@functools.partial(jit_once, static_argnames=("forced", "wanted", "path"))
def _select_to_mass(
    probabilities, least, most, *, forced: StaticArray, wanted: int, path: RankingPath
):
    def select(*arrays):
        arguments = (*arrays, forced.values, wanted)
        if path.selects_in_kernels:
            return (sm90.backend.select_to_mass(*arguments),)
        return (xla.select_to_mass(*arguments, digit_bits=path.digit_bits),)

    (words,) = _on_own_maps(select, "least: R", "most: R")(probabilities, least, most)
    return words


def compress_rows(
    words: UInt32[AnyArray, "*lists R W"],
    first_columns: Int[np.ndarray, " W"],
    capacity: int,
    *,
    path: RankingPath | None = None,
) -> tuple[Int[Array, "*lists R+1"], Int[Array, "*lists M"]]:
    """Lists the set bits of rows of words, as compressed sparse rows.

    Args:
      words: Sets of columns.
      first_columns: Column of the lowest bit of each word, ascending. Static.
      capacity: Most entries of a list, M. Later ones are dropped. Static.
      path: What to run on; None takes what the device of the words has. Static.

    Returns:
      Offsets of the rows, and the columns in ascending order within each row; 0 past
      the last entry.
    """
    if path is None:
        in_kernel = _has_list_kernel(current_device(words))
    else:
        in_kernel = path.lists_in_kernel
    return _compress_rows(
        words,
        first_columns=StaticArray(first_columns),
        capacity=capacity,
        in_kernel=in_kernel,
    )


@functools.partial(jit_once, static_argnames=("first_columns", "capacity", "in_kernel"))
def _compress_rows(words, **options):
    lists = lists_of_maps(words.ndim - 2)
    run = on_own_shards(
        functools.partial(_lists_of_rows, **options),
        operation="selection",
        operands=(f"words: {lists} R W",),
        results=(f"{lists} R", f"{lists} M"),
    )
    return run(words)


def _lists_of_rows(
    words, *, first_columns: StaticArray, capacity: int, in_kernel: bool
):
    *batch, num_rows, _ = words.shape
    in_row = jnp.cumsum(packed_bits.num_set(words), axis=-1, dtype=jnp.int32)
    row_ends = jnp.cumsum(in_row[..., -1], axis=-1, dtype=jnp.int32)
    row_starts = row_ends - in_row[..., -1]
    ends = (row_starts[..., None] + in_row).reshape(*batch, -1)
    flat = words.reshape(*batch, -1)
    columns = np.tile(first_columns.values, num_rows)
    list_columns = (sm90.backend if in_kernel else xla).list_columns
    block_ids = list_columns(flat, ends, columns, capacity)
    offsets = jnp.pad(row_ends, [(0, 0)] * len(batch) + [(1, 0)])
    return jnp.minimum(offsets, capacity), block_ids


@jit_once
def pack(flags: Bool[AnyArray, "*rows C"]) -> UInt32[Array, "*rows W"]:
    """Packs the last axis, W = ceil(C / 32); the bits past C are 0."""
    rows = lists_of_maps(flags.ndim - 1)
    run = on_own_shards(
        lambda flags: (packed_bits.pack(flags),),
        operation="pack",
        operands=(f"flags: {rows} C",),
        results=(f"{rows} W",),
    )
    return run(flags)[0]


@functools.partial(jit_once, static_argnums=1)
def unpack(words: UInt32[AnyArray, "*rows W"], columns: int) -> Bool[Array, "*rows C"]:
    """Inverts `pack`: whether the bit of each column is set. Columns are static."""
    rows = lists_of_maps(words.ndim - 1)
    run = on_own_shards(
        lambda words: (packed_bits.unpack(words, columns),),
        operation="unpack",
        operands=(f"words: {rows} W",),
        results=(f"{rows} C",),
    )
    return run(words)[0]


def _has_list_kernel(device: Device) -> bool:
    # It takes a word at a time: rows may have any number of them.
    return sm90.backend.why_unsupported(packed_bits.WORD_BITS, device) is None


def _path_of(scores: Float[Array, "B N R C"]) -> RankingPath:
    return choose_path(scores.shape[-1], current_device(scores))
