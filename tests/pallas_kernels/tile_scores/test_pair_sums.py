"""The sums that lanes exchange, with each instruction done for 128 threads in NumPy.

Interpret mode has another sum in their place.
"""

import types

import numpy as np
import pytest

from pallas_kernels.tile_scores.sm90 import instructions
from pallas_kernels.tile_scores.sm90.plan import KEY_GROUP, QUERY_GROUP

THREAD = np.arange(128)
ARITH = types.SimpleNamespace(
    andi=np.bitwise_and,
    shrui=np.right_shift,
    addi=np.add,
    subi=np.subtract,
    muli=np.multiply,
    divui=np.floor_divide,
    remui=np.remainder,
    addf=np.add,
    select=np.where,
    cmpi=lambda predicate, a, b: predicate(a, b),
    CmpIPredicate=types.SimpleNamespace(ne=np.not_equal),
)


@pytest.fixture
def threads(monkeypatch):
    """Runs the module's instructions on arrays of all threads."""
    exchange = types.SimpleNamespace(
        utils=types.SimpleNamespace(shfl_bfly=lambda x, distance: x[THREAD ^ distance])
    )
    monkeypatch.setattr(instructions, "arith", ARITH)
    monkeypatch.setattr(instructions, "mgpu", exchange)
    extract = types.SimpleNamespace(extract=lambda pair, _, index: pair[index[0]])
    monkeypatch.setattr(instructions, "vector", extract)
    monkeypatch.setattr(instructions, "const", lambda value: np.full(128, value))


def registers_of(weights):
    """What each thread holds of a product, as PTX documents it (wgmma, m64nNk16, D)."""
    warp, lane = THREAD // 32, THREAD % 32
    registers = np.empty((weights.shape[1] // 8, 2), dtype=object)
    for group, lower in np.ndindex(registers.shape):
        row = 16 * warp + 8 * lower + lane // 4
        column = 8 * group + 2 * (lane % 4)
        registers[group, lower] = np.stack(
            [weights[row, column], weights[row, column + 1]]
        )
    return types.SimpleNamespace(registers=registers.reshape(-1))


def in_places(parts, group, axis):
    """Orders parts as products have them: the first two axes of a group change."""
    moved = np.moveaxis(parts, axis, 0)
    groups = moved.reshape(-1, *group, *moved.shape[1:]).swapaxes(1, 2)
    return np.moveaxis(groups.reshape(moved.shape), 0, axis)


@pytest.mark.parametrize("per_tile", [2, 4, 8, 16])
def test_each_pair_of_tiles_is_stored_once(per_tile, threads):
    weights = np.random.default_rng(0).integers(0, 1000, (64, 128))
    ordered = in_places(in_places(weights, QUERY_GROUP, 0), KEY_GROUP, 1)
    sums = instructions._tile_sums(registers_of(ordered), per_tile)
    own_rows = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    pairs = instructions._PairSums(own_rows, THREAD, per_tile)
    rows, columns = 64 // per_tile, 128 // per_tile
    got, times = np.zeros((2, rows, columns), int)
    stored = np.broadcast_to(pairs.is_stored, 128).astype(bool)
    row = pairs.row
    for value, column in pairs.columns():
        np.add.at(times, (row[stored], column[stored]), 1)
        got[row[stored], column[stored]] = value[stored]
    want = weights.reshape(rows, per_tile, columns, per_tile).sum((1, 3))
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_array_equal(got, want)
