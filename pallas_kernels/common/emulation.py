"""Stand-ins for PTX that several kernels share in interpret mode."""

import jax.numpy as jnp
from jax import lax


def store_each(place, values, out_gmem, capacity: int):
    """Stores a value at each place below the capacity, one after another."""
    is_stored = place < capacity
    order = jnp.argsort(jnp.logical_not(is_stored), stable=True)

    def store(i, _):
        chosen = order[i]
        out_gmem[place[chosen]] = values[chosen]
        return ()

    lax.fori_loop(0, is_stored.sum(dtype=jnp.int32), store, ())
