"""The functions of `registers` in plain JAX, which GPU interpret mode runs instead."""

import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.pooling.sm90.plan import NormRopePoolPlan


def store(ref, x, plan: NormRopePoolPlan):
    """Emulates `registers.store`."""
    del plan
    ref[...] = x


def round_halves(halves, dtype, plan: NormRopePoolPlan):
    """Emulates `registers.round_halves`."""
    return join(halves, plan).astype(dtype)


def keep_order():
    """Emulates `registers.keep_order`."""


def split(x, plan: NormRopePoolPlan):
    """Emulates `registers.split`."""
    del plan
    pairs = rearrange(x, "heads (half pair) -> heads half pair", pair=2)
    return pairs[..., 0], pairs[..., 1]


def multiply_add(a, b, c, plan: NormRopePoolPlan):
    """Emulates `registers.multiply_add`, which rounds once."""
    del plan
    return a * b + c


def join(halves, plan: NormRopePoolPlan):
    """Emulates `registers.join`."""
    del plan
    pairs = jnp.stack(halves, axis=-1)
    return rearrange(pairs, "heads half pair -> heads (half pair)")
