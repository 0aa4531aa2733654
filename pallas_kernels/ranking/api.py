"""The best scores of maps and of their rows, as bits of words and as lists.

Selection is exact and without a sort: integers of the scores' order are searched for a
threshold, and ties at the threshold go to the first ones. Hopper GPUs have kernels for
it; XLA does it elsewhere, which on another GPU is many times slower and warns once.
"""

import types

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.common.device import current_device
from pallas_kernels.common.slow_paths import warn_once
from pallas_kernels.ranking import packed_bits, sm90, xla
from pallas_kernels.ranking.keys import MASS_UNITS


def select_in_maps(
    scores: Float[Array, "B N R C"],
    count: Int[Array, ""],
    *,
    forced: Bool[np.ndarray, "R C"],
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each map; every row keeps its best one at least.

    Args:
      scores: Larger is better; NaN ranks last, with minus infinity. Ties go to the
        lower row, then to the lower column.
      count: Scores to keep of each map, from 1 and not less than the forced ones. A row
        that none of them is in keeps its best one beyond the count.
      forced: Scores that rank before all others, the same in each map. Static.

    Returns:
      Bits of the kept scores, 32 columns to a word, the lowest bit first.
    """
    return _implementation(scores).select_in_maps(scores, count, forced)


def select_in_rows(
    scores: Float[Array, "B N R C"],
    count: Int[Array, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
) -> UInt32[Array, "B N R W"]:
    """Selects the best scores of each row.

    Args:
      scores: Larger is better; NaN ranks last, with minus infinity. Ties go to the
        lower column.
      count: Scores to keep of each row, from 1 and not less than the forced ones.
      forced: Scores that rank before all others, the same in each map. Static.

    Returns:
      Bits of the kept scores, 32 columns to a word, the lowest bit first.
    """
    return _implementation(scores).select_in_rows(scores, count, forced)


def select_to_mass(
    probabilities: Float[Array, "B N R C"],
    least: Int[Array, " R"],
    most: Int[Array, " R"],
    *,
    forced: Bool[np.ndarray, "R C"],
    mass: float,
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

    Returns:
      Bits of the kept probabilities, 32 columns to a word, the lowest bit first.
    """
    wanted = round(mass * MASS_UNITS)
    implementation = _implementation(probabilities)
    return implementation.select_to_mass(probabilities, least, most, forced, wanted)


def compress_rows(
    words: UInt32[Array, "*lists R W"],
    first_columns: Int[np.ndarray, " W"],
    capacity: int,
) -> tuple[Int[Array, "*lists R+1"], Int[Array, "*lists M"]]:
    """Lists the set bits of rows of words, as compressed sparse rows.

    Args:
      words: Sets of columns.
      first_columns: Column of the lowest bit of each word, ascending.
      capacity: Most entries of a list, M. Later ones are dropped.

    Returns:
      Offsets of the rows, and the columns in ascending order within each row; 0 past
      the last entry.
    """
    *batch, num_rows, _ = words.shape
    in_row = jnp.cumsum(packed_bits.num_set(words), axis=-1, dtype=jnp.int32)
    row_ends = jnp.cumsum(in_row[..., -1], axis=-1, dtype=jnp.int32)
    row_starts = row_ends - in_row[..., -1]
    ends = (row_starts[..., None] + in_row).reshape(*batch, -1)
    flat = words.reshape(*batch, -1)
    columns = np.tile(first_columns, num_rows)
    # The kernel takes a word at a time: rows may have any number of them.
    device = current_device(words)
    has_kernel = sm90.backend.why_unsupported(packed_bits.WORD_BITS, device) is None
    list_columns = (sm90.backend if has_kernel else xla).list_columns
    block_ids = list_columns(flat, ends, columns, capacity)
    offsets = jnp.pad(row_ends, [(0, 0)] * len(batch) + [(1, 0)])
    return jnp.minimum(offsets, capacity), block_ids


def _implementation(scores: Float[Array, "B N R C"]) -> types.ModuleType:
    """Chooses the kernels where the device has them for maps of this shape, else XLA.

    On a GPU without them XLA takes over, many times slower: that warns once.
    """
    device = current_device(scores)
    cause = sm90.backend.why_unsupported(scores.shape[-1], device)
    if cause is None:
        return sm90.backend
    if device.platform == "gpu":
        warn_once(f"selection runs on XLA instead of its kernels: {cause}")
    return xla
