"""vmap for functions whose arrays have a batch axis first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fold_mapped_axes(run: Callable, num_shared: int = 0) -> Callable:
    """Makes a function of batched arrays mappable: mapped axes join the batch.

    Args:
      run: Takes arrays and returns a tuple of arrays, with the batch first.
      num_shared: How many arrays, the last ones, have no batch axis. If one of them is
        mapped, `run` is called for each value of the mapped axis.

    Returns:
      The same function; under vmap it runs once, with a larger batch.
    """

    @jax.custom_batching.custom_vmap
    def mappable(*arrays):
        return run(*arrays)

    @mappable.def_vmap
    def _(axis_size, in_batched, *arrays):
        def spread(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        call = fold_mapped_axes(run, num_shared)
        num_batched = len(arrays) - num_shared
        if any(in_batched[num_batched:]):
            stacked = tuple(map(spread, arrays, in_batched))
            outs = jax.lax.map(lambda own: call(*own), stacked)
            return outs, (True,) * len(outs)
        folded = (
            spread(x, b).reshape(-1, *x.shape[1 + b :])
            for x, b in zip(arrays[:num_batched], in_batched[:num_batched], strict=True)
        )
        outs = call(*folded, *arrays[num_batched:])
        unfolded = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outs)
        return unfolded, (True,) * len(outs)

    return mappable
