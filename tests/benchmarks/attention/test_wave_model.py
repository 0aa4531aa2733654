"""The model of how CTAs share key blocks in L2."""

import numpy as np
import pytest

from benchmarks.attention.wave_model import simulate


def lists_of(*rows):
    return [[np.array(row) for row in rows]]


@pytest.mark.parametrize(
    ("rows", "slots", "capacity", "hits", "ticks"),
    [
        # Two in step: the second finds what the first has read.
        (((0, 1, 2), (0, 1, 2)), 2, 1, 3 / 6, 2 + 3),
        # One after the other: found again only if there is room for the whole list.
        (((0, 1, 2), (0, 1, 2)), 1, 2, 0.0, 2 * (2 + 3)),
        (((0, 1, 2), (0, 1, 2)), 1, 3, 3 / 6, 2 * (2 + 3)),
        # What was used last stays: 0 is used again before 2 comes.
        (((0, 1, 0, 2, 0),), 1, 2, 2 / 5, 2 + 5),
        # An empty list takes its start only.
        (((), (0,)), 1, 1, 0.0, 2 + 3),
    ],
)
def test_hits_and_ticks(rows, slots, capacity, hits, ticks):
    order = np.arange(len(rows))
    assert simulate(lists_of(*rows), order, capacity, slots) == (hits, ticks)
