"""vmap for functions whose arrays all have a batch axis first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fold_mapped_axes(run: Callable) -> Callable:
    """Makes a function of batched arrays mappable: mapped axes join the batch.

    Args:
      run: Takes arrays and returns a tuple of arrays, all with the batch first.

    Returns:
      The same function; under vmap it runs once, with a larger batch.
    """

    @jax.custom_batching.custom_vmap
    def mappable(*arrays):
        return run(*arrays)

    @mappable.def_vmap
    def _(axis_size, in_batched, *arrays):
        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = (fold(x, b) for x, b in zip(arrays, in_batched, strict=True))
        outs = fold_mapped_axes(run)(*folded)
        unfolded = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outs)
        return unfolded, (True,) * len(outs)

    return mappable
