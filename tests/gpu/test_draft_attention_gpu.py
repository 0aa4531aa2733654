"""The whole method on an NVIDIA GPU: masks exactly, outputs within tolerance."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    SparsitySchedule,
    VideoGrid,
    compute_mask,
    draft_attention,
    initial_mask,
    scheduled_attention,
)
from pallas_kernels import SlowBackendWarning, block_sparse_attention
from pallas_kernels.attention import api as dispatch
from tests.draft_jax import naive_draft
from tests.pallas_kernels.attention.reference import (
    compress,
    matrix_attention,
    random_qkv,
)
from tests.tolerances import GPU_ATTENTION
from tests.warnings_once import forget_warnings

# The package's attribute of this name is the function, not the module.

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning"),
]

CONFIG = DraftConfig.paper(sparsity=0.75)
GRIDS = {
    "divisible": VideoGrid(4, 16, 32),
    "edges-and-text": VideoGrid(3, 15, 26, text_length=40),
}


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32, the default on a GPU, would hide errors of float32."""
    with jax.default_matmul_precision("highest"):
        yield


def expected(q, k, v, grid, sparsity):
    """The mask by loops, and float64 attention with it, both in raster order."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    kept = naive_draft.percentile_mask(q, k, grid, sparsity)
    tiled = (x[:, grid.tile_order] for x in (q, k, v))
    out, _ = matrix_attention(*tiled, kept, grid)
    return kept, out[:, grid.raster_order]


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", GRIDS)
def test_draft_attention_matches_numpy(case, dtype, backend, assert_close):
    grid = GRIDS[case]
    q, k, v = random_qkv(grid, head_dim=64, dtype=dtype)

    @jax.jit
    def run(q, k, v):
        out = draft_attention(q, k, v, grid=grid, config=CONFIG, backend=backend)
        return out, compute_mask(q, k, grid=grid, config=CONFIG)

    out, mask = run(q, k, v)
    want_mask, want = expected(q, k, v, grid, 0.75)
    np.testing.assert_array_equal(mask.to_dense(), want_mask)
    assert_close(f"GPU_ATTENTION {dtype}", out, want, GPU_ATTENTION[dtype])
    again, _ = run(q, k, v)
    np.testing.assert_array_equal(out, again)


def test_schedule_switches_in_one_program(assert_close):
    grid = GRIDS["edges-and-text"]
    plan = SparsitySchedule(dense_fraction=0.5).plan(
        np.asarray([1000.0, 500.0]), num_layers=1, grid=grid, config=CONFIG
    )
    q, k, v = random_qkv(grid, head_dim=64, dtype="bfloat16")

    @jax.jit
    def run(step, mask):
        return scheduled_attention(
            q, k, v, grid=grid, config=CONFIG, step=step, mask=mask
        )

    mask = initial_mask(grid, CONFIG, batch=2, num_heads=2)
    for step, sparsity in zip(plan, (0.0, 0.75), strict=True):
        out, mask = run(step.for_layer(0), mask)
        _, want = expected(q, k, v, grid, sparsity)
        tolerance = GPU_ATTENTION["bfloat16"]
        assert_close("GPU_ATTENTION bfloat16", out, want, tolerance)
    assert run._cache_size() == 1


def test_a_gpu_without_a_fused_kernel_is_told_once(monkeypatch):
    monkeypatch.setitem(dispatch.PREFERENCE, "gpu", ("xla",))
    grid = VideoGrid(1, 8, 16)
    q, k, v = random_qkv(grid, head_dim=64)
    mask = compress(np.ones((2, 2, 1, 1), bool), grid)
    forget_warnings()
    kind = re.escape(jax.devices()[0].device_kind)
    with pytest.warns(
        SlowBackendWarning, match=rf"'xla': .*through the memory of {kind}"
    ):
        block_sparse_attention(q, k, v, mask, grid=grid, order="tiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(q, k, v, mask, grid=grid, order="tiled")
