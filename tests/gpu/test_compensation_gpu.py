"""Means for what is skipped and drafts of sub-tiles on a GPU, against float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    Compensation,
    DraftConfig,
    VideoGrid,
    compute_mask,
    draft_scores,
    make_means,
)
from pallas_kernels import block_sparse_attention
from tests.tolerances import (
    GPU_ATTENTION,
    GPU_DRAFT,
    GPU_DRAFT_OF_SUB_TILES,
    GPU_SPREAD,
)

pytestmark = pytest.mark.gpu

GRID = VideoGrid(5, 18, 40, tile=(8, 16), text_length=40)  # edge tiles, ragged groups
CONFIG = DraftConfig.paper(
    selection="row_topk",
    sparsity=0.8,
    draft_tile=(4, 4),
    compensation=Compensation(sub_tile=(2, 2), frames=4),
    ranking="spread",
)


def random_qkv(dtype):
    rng = np.random.default_rng(0)
    shape = (3, 2, GRID.num_tokens, 2, 128)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype))


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_attention_with_means_is_the_oracles(order, backend):
    """bfloat16 inputs; the oracle reads the same ones and computes in float32."""
    q, k, v = random_qkv("bfloat16")
    lengths = jnp.array([40, 7])
    mask = compute_mask(q, k, grid=GRID, config=CONFIG, order=order)
    means = make_means(k, v, mask, compensation=CONFIG.compensation, order=order)
    attend = functools.partial(
        block_sparse_attention, grid=GRID, order=order, text_lengths=lengths
    )
    got = attend(q, k, v, mask, means=means, backend=backend)
    as_float32 = means._replace(
        k=means.k.astype(jnp.float32), v=means.v.astype(jnp.float32)
    )
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = attend(*wide, mask, means=as_float32, backend="oracle")
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, **GPU_ATTENTION["bfloat16"]
    )


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"draft_tile": None, "ranking": "exact_spread"}, GPU_DRAFT),
        # 32 parts of a tile: XLA.
        ({"draft_tile": (2, 2), "ranking": "exact_spread"}, GPU_DRAFT),
        ({"draft_tile": None}, GPU_SPREAD),
        ({}, GPU_DRAFT_OF_SUB_TILES),
    ],
    ids=["float32", "float32-sub-tiles", "spread", "kernel"],
)
def test_scores_are_those_of_the_cpu(changes, tolerance):
    """Products are float32 but for the spread's and those of the Hopper kernel."""
    q, k, _ = random_qkv("float32")
    config = dataclasses.replace(CONFIG, **changes)
    got = draft_scores(q, k, grid=GRID, config=config)
    with jax.default_device(jax.devices("cpu")[0]):
        want = draft_scores(np.asarray(q), np.asarray(k), grid=GRID, config=config)
    np.testing.assert_allclose(got, want, **tolerance)
