"""Scores as integers of the same order: ranking is then exact on every device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

FIRST = np.uint32(0xFFFFFFFF)  # ranks before every score
LAST = np.uint32(0x007FFFFF)  # key of minus infinity and of NaN
SIGN = np.uint32(0x80000000)
INFINITY = np.uint32(0x7F800000)
# Units of a probability of 1. Probabilities are added as integers, in any order alike;
# sums stop at 1.
MASS_UNITS = 1 << 30


def rank_keys(
    scores: Float[Array, "B N R C"], forced: Bool[np.ndarray, "R C"]
) -> UInt32[Array, "B N R C"]:
    """Returns integers in the order of the scores.

    -0 and 0 are one value; numbers too small to be normal differ from 0. NaN ranks
    with minus infinity. No key is 0.

    Args:
      scores: Larger is better.
      forced: Scores that rank before all others, the same in each map.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    keys = jnp.where(bits > SIGN, ~bits, bits | SIGN)
    is_nan = (bits & ~SIGN) > INFINITY
    keys = jnp.where(is_nan, LAST, keys)
    return jnp.where(forced, FIRST, keys) if forced.any() else keys
