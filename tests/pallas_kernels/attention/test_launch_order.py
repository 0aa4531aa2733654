"""The order in which the Hopper kernel's CTAs take query blocks."""

import heapq

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.sm90.schedule import launch_order

SLOTS = 48


def order_of(counts):
    return np.asarray(launch_order(jnp.asarray(counts, jnp.int32), SLOTS))


def longest_first(counts):
    """Head by head, lists by falling length: the order that the kernel's improves."""
    rows = np.argsort(-counts, axis=1, kind="stable")
    return (rows + counts.shape[1] * np.arange(len(counts))[:, None]).ravel()


def start_times(order, counts):
    """When each tile starts on a card that runs SLOTS tiles at a time, in order."""
    free = [0] * SLOTS
    starts = np.zeros(counts.size)
    for tile in order:
        starts[tile] = heapq.heappop(free)
        heapq.heappush(free, starts[tile] + counts.flat[tile])
    return starts.reshape(counts.shape), max(free)


def longest_spread(starts):
    """How far apart, at most, tiles of one list start that start one after another.

    Between two waves of CTAs nothing starts for a while, so they count as two.
    """
    spread = 0.0
    for own in np.sort(starts, axis=1):
        for wave in np.split(own, np.flatnonzero(np.diff(own) > 20) + 1):
            spread = max(spread, wave[-1] - wave[0])
    return spread


@pytest.mark.parametrize("full", [0, 1, 2, 7])
@pytest.mark.parametrize(("num_lists", "num_blocks"), [(1, 7), (5, 31), (3, 12)])
def test_every_tile_once_and_full_rows_first(num_lists, num_blocks, full):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, num_blocks, (num_lists, num_blocks))
    counts[:, rng.permutation(num_blocks)[:full]] = num_blocks
    order = order_of(counts)
    np.testing.assert_array_equal(np.sort(order), np.arange(counts.size))
    in_order = counts.ravel()[order]
    number = num_lists * min(full, num_blocks)
    assert (in_order[:number] == num_blocks).all()
    assert (in_order[number:] < num_blocks).all()
    lists = order[number:] // num_blocks
    assert (np.diff(lists) >= 0).all()


def test_full_masks_keep_the_order_of_blocks():
    counts = np.full((3, 31), 31)
    np.testing.assert_array_equal(order_of(counts), np.arange(93))


@pytest.mark.nightly
@pytest.mark.parametrize(("full", "most", "before"), [(0, 10, 50), (2, 50, 70)])
def test_waves_of_a_list_start_together(full, most, before):
    """Six lists of 7.4 waves each, of blocks with about 100 entries."""
    rng = np.random.default_rng(1)
    others = np.clip(rng.normal(100, 4, (6, 7 * SLOTS + 5)), 90, 110).astype(int)
    num_blocks = others.shape[1] + full
    counts = np.full((6, num_blocks), num_blocks)
    counts[:, full:] = others
    starts, end = start_times(order_of(counts), counts)
    # Longest first, list by list, is the order that this one improves.
    plain_starts, plain_end = start_times(longest_first(counts), counts)
    assert longest_spread(starts[:, full:]) < most
    assert longest_spread(plain_starts[:, full:]) > before
    assert end < 1.01 * plain_end


def test_full_rows_take_the_time_of_as_many_entries():
    """Nine entries run as long as three lists of 3, the mean of the others.

    With those, 3 + 8 lists of the first head leave one place of the third wave of four.
    """
    counts = np.array([[3, 1, 9, 5, 3, 2, 4, 3, 3], [3, 5, 2, 4, 1, 3, 2, 4, 3]])
    order = np.asarray(launch_order(jnp.asarray(counts, jnp.int32), 4))
    first, second = [9, 1, 5, 4, 3, 3, 3, 3, 2], [1, 5, 4, 4, 3, 3, 3, 2, 2]
    np.testing.assert_array_equal(counts.ravel()[order], first + second)


def test_blocks_behind_the_lists_count_as_entries():
    """The same times as above, where two entries of each other list are means."""
    counts = np.array([[1, -1, 9, 3, 1, 0, 2, 1, 1], [1, 3, 0, 2, -1, 1, 0, 2, 1]])
    order = np.asarray(launch_order(jnp.asarray(counts, jnp.int32), 4, 2))
    first, second = [9, -1, 3, 2, 1, 1, 1, 1, 0], [-1, 3, 2, 2, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(counts.ravel()[order], first + second)
