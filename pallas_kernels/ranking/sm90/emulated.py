"""The functions of `registers` and `teams` in plain JAX.

GPU interpret mode runs them in place of PTX. Values are whole arrays of a warpgroup
there, element i * 128 + t being what register i of thread t holds.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common.emulation import store_each
from pallas_kernels.common.inline_ptx import THREADS, WORD
from pallas_kernels.ranking.keys import MASS_UNITS
from pallas_kernels.ranking.sm90.teams import Rows

# --------------------------------------------------------------- of registers


def load_row(row_gmem, dtype=jnp.uint32):
    """Emulates `registers.load_row`."""
    row = row_gmem[...]
    assert row.dtype == dtype
    return jnp.pad(row, (0, -row.size % THREADS))


def add_ones(values, is_counted, counts_smem):
    """Emulates `registers.add_ones`."""
    candidates = jnp.arange(counts_smem.shape[0], dtype=values.dtype)
    is_equal = (values[:, None] == candidates) & is_counted[:, None]
    counts_smem[...] = counts_smem[...] + is_equal.sum(0, dtype=jnp.int32)


def store_votes(flags, words_gmem):
    """Emulates `registers.store_votes`."""
    words_gmem[...] = _votes(flags.reshape(-1, WORD))


def store_columns(words, starts, columns, ids_gmem, capacity: int):
    """Emulates `registers.store_columns`."""
    lanes = jnp.arange(WORD, dtype=jnp.uint32)
    is_set = ((words[:, None] >> lanes) & 1) == 1
    entry = starts[:, None] + jnp.cumsum(is_set, axis=1, dtype=jnp.int32) - 1
    # What no thread stores goes nowhere; stores are made one by one, so that two
    # to one entry would be a race.
    entry = jnp.where(is_set, entry, capacity).reshape(-1)
    column = (columns[:, None] + lanes.astype(jnp.int32)).reshape(-1)
    store_each(entry, column, ids_gmem, capacity)


def store_zeros(first, stride: int, ids_gmem, capacity: int):
    """Emulates `registers.store_zeros`."""
    steps = jnp.arange(-(-capacity // stride), dtype=jnp.int32) * stride
    entry = first + steps[:, None] + jnp.arange(THREADS, dtype=jnp.int32)
    entry = entry.reshape(-1)
    store_each(entry, jnp.zeros_like(entry), ids_gmem, capacity)


def warpgroup_barrier():
    """Interpret mode has one thread for a warpgroup."""


def _votes(flags):
    """Packs the last axis, of 32, into words."""
    bits = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.where(flags, bits, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)


# -------------------------------------------------------------------- of teams


def load_rows(matrix_gmem, first, rows: Rows):
    """Emulates `teams.load_rows`."""
    loaded = []
    for i in range(rows.per_cta):
        row = matrix_gmem[jnp.minimum(first + i, rows.num_rows - 1), :]
        loaded.append(_by_register(row, rows))
    is_column = _by_register(jnp.ones(rows.columns, jnp.bool_), rows)
    words = jnp.stack(loaded, axis=1).reshape(-1)
    return words, jnp.stack([is_column] * rows.per_cta, axis=1).reshape(-1)


def load_flags(words_gmem, first, rows: Rows):
    """Emulates `teams.load_flags`."""
    loaded = []
    for i in range(rows.per_cta):
        words = words_gmem[lax.rem(first + i, words_gmem.shape[0]), :]
        bits = (words[:, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
        loaded.append(_by_register(bits.reshape(-1) == 1, rows))
    return jnp.stack(loaded, axis=1).reshape(-1)


def load_values(values_gmem, first, rows: Rows):
    """Emulates `teams.load_values`."""
    values = [
        values_gmem[jnp.minimum(first + i, rows.num_rows - 1)]
        for i in range(rows.per_cta)
    ]
    return jnp.repeat(jnp.stack(values), rows.lanes)


def spread(values, rows: Rows):
    """Emulates `teams.spread`."""
    return jnp.tile(values, rows.registers)


def units_of(words, units: int):
    """Emulates `teams.units_of`."""
    x = lax.bitcast_convert_type(words, jnp.float32) * jnp.float32(units)
    x = jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, 0.0, units))
    return jnp.round(x).astype(jnp.uint32)


def totals_from(keys, value, units, scratch_smem, rows: Rows):
    """Emulates `teams.totals_from`."""
    is_in = keys >= spread(value, rows)
    count = _reduced(is_in.astype(jnp.uint32), jnp.sum, rows).astype(jnp.int32)
    if units is None:
        return count, None
    return count, _reduced(jnp.where(is_in, units, 0), _sum_up_to_max, rows)


def reduce_rows(values, operation: str, scratch_smem, rows: Rows):
    """Emulates `teams.reduce_rows`."""
    functions = {"add": jnp.sum, "min": jnp.min, "max": jnp.max}
    return _reduced(values, functions[operation], rows)


def or_of_all(values, scratch_smem, rows: Rows):
    """Emulates `teams.or_of_all`."""
    return lax.reduce(values, jnp.uint32(0), lax.bitwise_or, (0,))


def store_row_votes(flags, words_gmem, first, rows: Rows):
    """Emulates `teams.store_row_votes`."""
    shape = (rows.registers, rows.per_cta, rows.team, WORD)
    words = _votes(flags.reshape(shape))
    for i in range(rows.per_cta):
        own = words[:, i].reshape(-1)[: rows.num_words]
        _store_if_row(own, words_gmem, first + i, rows)


def store_values(values, values_gmem, first, rows: Rows):
    """Emulates `teams.store_values`."""
    for i in range(rows.per_cta):
        _store_if_row(values[i * rows.lanes], values_gmem, first + i, rows)


def _store_if_row(value, out_gmem, row, rows: Rows):
    @pl.when(row < rows.num_rows)
    def _():
        out_gmem[row] = value


def _by_register(row, rows: Rows):
    """A row as [registers, lanes], zeros past its end."""
    size = rows.registers * rows.lanes
    return jnp.pad(row[:size], (0, size - min(row.size, size))).reshape(
        rows.registers, rows.lanes
    )


def _sum_up_to_max(units, axis):
    def add(a, b):
        return jnp.minimum(a + b, jnp.uint32(MASS_UNITS))

    return lax.reduce(units, jnp.uint32(0), add, axis)


def _reduced(values, function, rows: Rows) -> jax.Array:
    shape = (rows.registers, rows.per_cta, rows.lanes)
    of_rows = function(values.reshape(shape), axis=(0, 2))
    return jnp.repeat(of_rows.astype(values.dtype), rows.lanes)
