"""Loops over layers of one structure: those that do the same share a loop."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from draft_jax import DraftStep


def runs_of_layers(
    step: DraftStep | None, num_layers: int
) -> list[tuple[range, bool | None]]:
    """Returns layers that follow each other and do the same, and if that is dense.

    One run of all layers, and None, where that is not known before the program runs.
    """
    if step is None or isinstance(step.dense, jax.core.Tracer):
        return [(range(num_layers), None)]
    dense = np.asarray(step.dense)
    changes = 1 + np.flatnonzero(np.diff(dense))
    bounds = [0, *changes.tolist(), num_layers]
    return [
        (range(first, last), bool(dense[first]))
        for first, last in itertools.pairwise(bounds)
    ]


def scan_layers(body: Callable, carry: Any, stacked: Any, layers: range):
    """Scans over some layers of stacked arrays; `body` also gets their indices."""
    indices = jnp.arange(layers.start, layers.stop)
    if all(len(leaf) == len(layers) for leaf in jax.tree.leaves(stacked)):
        return jax.lax.scan(body, carry, (indices, stacked))

    # Each is looked up: a slice of some layers would be a copy of their weights.
    def look_up(carry, index):
        return body(carry, (index, jax.tree.map(lambda leaf: leaf[index], stacked)))

    return jax.lax.scan(look_up, carry, indices)
