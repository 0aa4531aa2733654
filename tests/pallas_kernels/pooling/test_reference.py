"""The reference of pooling, norm and rotation, and the XLA path, against loops."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pooling import Tiling, reduce_tiles, reference, xla
from tests import tolerances
from tests.cases import mostly_nightly
from tests.pallas_kernels.pooling import naive_norm_rope
from tests.pallas_kernels.pooling.cases import (
    NORMS,
    TILINGS,
    naive_pool,
    naive_table,
    random_case,
)


@pytest.mark.parametrize("name", TILINGS)
def test_tables(name):
    tiling = TILINGS[name]
    expected = naive_table(tiling)
    np.testing.assert_array_equal(tiling.table, expected)
    np.testing.assert_array_equal(tiling.lengths, expected[:, 2] * expected[:, 3])
    assert tiling.num_tiles == len(expected)
    assert tiling.has_edges == (tiling.lengths < tiling.tile_size).any()


@pytest.mark.usefixtures("without_jaxtyping")
def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="order='columns' must be one of"):
        Tiling(frames=1, height=1, width=1, tile=(1, 1), order="columns")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("name", TILINGS)
def test_pooling(name, reduction, dtype):
    tiling = TILINGS[name]
    x = random_case(tiling, None, dtype)[0]
    expected = naive_pool(x, tiling, reduction)
    for got in (
        reference.pool_tiles(x, tiling.table, reduction=reduction),
        reduce_tiles(x, tiling, reduction=reduction),
    ):
        chex.assert_shape(got, (2, tiling.num_tiles, *x.shape[2:]))
        chex.assert_type(got, jnp.float32)
        if reduction == "max":
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, **tolerances.POOLED)


@pytest.mark.parametrize("has_rope", [True, False], ids=["rope", "no-rope"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", mostly_nightly(["tiled", "whole"], ["whole"]))
def test_norm_and_rotation(name, norm, has_rope):
    tiling, norm = TILINGS[name], NORMS[norm]
    q, k, scales, rope = random_case(tiling, norm)
    rope = rope if has_rope else None
    cos, sin = rope or (None, None)
    visual = tiling.tokens
    both = xla.norm_rope(q, k, scales, None, rope, visual_tokens=visual, norm=norm)
    for i, x in enumerate((q, k)):
        scale = None if scales is None else scales[i]
        expected = naive_norm_rope.norm_rope(
            np.asarray(x, np.float64),
            over=None if norm is None else norm.over,
            eps=0.0 if norm is None else norm.eps,
            scale=scale,
            cos=cos,
            sin=sin,
            visual=visual,
        )
        got = reference.norm_rope(
            x, norm=norm, scale=scale, rope=rope, visual_tokens=visual
        )
        for y in (got, both[i]):
            np.testing.assert_allclose(y, expected, **tolerances.NORM_ROPE["float32"])
