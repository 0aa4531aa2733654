"""Products that must not be rounded, as a GPU's TF32 would, ask for highest precision.

No CPU rounds them: their programs are looked at.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import BlockMask, DraftConfig, VideoGrid
from draft_jax.draft.scores import draft_scores
from models.checkpoints.lora import merge_lora
from pallas_kernels import block_sparse_attention
from tests.matrix_products import products

GRID = VideoGrid(1, 4, 8, tile=(2, 4))
X = jnp.ones((1, GRID.num_tokens, 2, 8))


def draft(x):
    """Another rounding ranks pairs otherwise that are close together."""
    return draft_scores(x, x, grid=GRID, config=DraftConfig.paper())


def oracle(x):
    """Backends are measured against it."""
    mask = BlockMask.full(grid=GRID, batch=1, num_heads=2)
    return block_sparse_attention(
        x, x, x, mask, grid=GRID, order="tiled", backend="oracle"
    )


def adapter(x):
    """A merged weight is rounded once, when it is stored."""
    halves = {"x.lora_A.weight": x[0, :4, 0], "x.lora_B.weight": x[0, :, 0, :4]}
    merged = merge_lora({"x.weight": np.zeros((32, 8), np.float32)}, halves, {"x": "x"})
    return jnp.asarray(merged["x.weight"])


@pytest.mark.parametrize(("function", "count"), [(draft, 1), (oracle, 2), (adapter, 1)])
def test_products_at_highest_precision(function, count):
    with jax.default_matmul_precision("tensorfloat32"):
        found = list(products(jax.make_jaxpr(function)(X).jaxpr))
    assert len(found) == count
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(equation.params["precision"] == highest for equation in found)
