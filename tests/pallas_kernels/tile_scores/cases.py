"""Parts whose logits the kernel must follow."""

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile_scores import Parts


def growing_logits():
    """Returns q, k, parts and a scale: logits grow by 0, 62, 66 and 64 powers of two.

    That is from block to block of 128 keys, times 1, 4, 0 or -1 for a query, plus some
    that are random. All products are exact in bfloat16.
    """
    rng = np.random.default_rng(0)
    per_tile, num, head_dim = 8, 512, 64
    of_key = np.repeat([0.0, 7.75, 8.25, 8.0], 128)[:, None]
    of_query = np.array([1.0, 4.0, 0.0, -1.0])[np.arange(num) % 4][:, None]
    noise = rng.integers(-1, 2, (2, num, head_dim))
    q, k = of_query + 0.125 * noise[0], of_key + 0.25 * noise[1]
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))
    ones = (1.0,) * num
    weights = (1 / per_tile,) * num
    parts = Parts(per_tile=per_tile, query_weights=weights, key_weights=ones)
    return q, k, parts, math.log(2) / 8
