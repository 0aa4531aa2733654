"""The product of the kernel (wgmma, sm_90), which interpret mode does not have.

`emulated.py` has the same in plain JAX.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def add_product(offset, rows, matrix):
    """Returns offset + rows @ matrix in float32, waited for."""

    def product(total_ref):
        plgpu.wgmma(total_ref, rows, matrix)
        return total_ref[...]

    shape = (rows.shape[0], matrix.shape[1])
    total = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    return total + lax.broadcast_in_dim(offset, shape, [1])
