"""A model of how often key blocks are found in L2, by the order of query blocks.

    python -m benchmarks.attention.wave_model --blocks 992 --density 0.25

A model, not a measurement, and it needs no GPU: each of 132 CTAs takes one entry of
its list per tick, two ticks go by at the start of a list, and L2 holds the key blocks
(K and V, 64 KiB) that were used last. Lists are random. An H100's L2 of 50 MB has room
for 760, but its two halves keep copies of what the other holds, so fewer count.
"""

import argparse
import collections
import json
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.sm90.schedule import launch_order
from pallas_kernels.common.device import NUM_MULTIPROCESSORS

SLOTS = NUM_MULTIPROCESSORS  # CTAs at a time
START_TICKS = 2

Lists = list[list[np.ndarray]]  # [heads][blocks], kept key blocks in ascending order


def random_lists(num_heads: int, num_blocks: int, density: float, full: int) -> Lists:
    """Lists that keep each block with this probability; the last `full` keep all."""
    rng = np.random.default_rng(0)
    kept = rng.random((num_heads, num_blocks, num_blocks), np.float32) < density
    kept[:, num_blocks - full :] = True
    return [[np.flatnonzero(row) for row in head] for head in kept]


def as_numbered(counts: np.ndarray) -> np.ndarray:
    """Query blocks in the order of their numbers."""
    return np.arange(counts.size)


def longest_first(counts: np.ndarray) -> np.ndarray:
    """Head by head."""
    rows = np.argsort(-counts, axis=1, kind="stable")
    return (rows + counts.shape[1] * np.arange(len(counts))[:, None]).ravel()


def waves(counts: np.ndarray) -> np.ndarray:
    """The kernel's order."""
    return np.asarray(launch_order(jnp.asarray(counts, jnp.int32), SLOTS))


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as numbered": as_numbered,
    "longest first": longest_first,
    "waves": waves,
}


def simulate(lists: Lists, order: np.ndarray, capacity: int, slots: int = SLOTS):
    """The share of hits, and ticks until the last CTA ends."""
    num_blocks = len(lists[0])
    waiting = collections.deque(int(tile) for tile in order)
    running: list[tuple[int, np.ndarray, int]] = []  # head, list, next entry
    held: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
    hits = accesses = ticks = 0
    while waiting or running:
        while waiting and len(running) < slots:
            head, block = divmod(waiting.popleft(), num_blocks)
            running.append((head, lists[head][block], -START_TICKS))
        still = []
        for head, entries, at in running:
            if 0 <= at < len(entries):
                key = (head, int(entries[at]))
                accesses += 1
                hits += key in held
                held[key] = None
                held.move_to_end(key)
                if len(held) > capacity:
                    held.popitem(last=False)
            if at + 1 < len(entries):
                still.append((head, entries, at + 1))
        running = still
        ticks += 1
    return hits / max(accesses, 1), ticks


def main() -> None:
    """Prints hits and ticks of each order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=990)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--full", type=int, default=0, help="rows that keep all (text)")
    parser.add_argument("--capacity", type=int, default=250, help="key blocks in L2")
    options = parser.parse_args()
    lists = random_lists(options.heads, options.blocks, options.density, options.full)
    counts = np.array([[len(row) for row in head] for head in lists])
    for name, order in ORDERS.items():
        hits, ticks = simulate(lists, order(counts), options.capacity)
        record = {"order": name, "hits": round(hits, 3), "ticks": ticks}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
