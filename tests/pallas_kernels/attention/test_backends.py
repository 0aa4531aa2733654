"""One suite for every backend, against float64 NumPy loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels import block_sparse_attention, block_sparse_attention_with_lse
from pallas_kernels.attention.api import BACKENDS
from tests.cases import mostly_nightly
from tests.pallas_kernels.attention.reference import (
    CASES,
    ODD,
    compress,
    numpy_attention,
    random_mask,
    random_qkv,
)
from tests.tolerances import ATTENTION, GRADIENT, HUGE_LOGITS, LSE

# The Hopper kernel's cases are in test_hopper_interpret.py and tests/gpu.
pytestmark = pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"hopper"}))


# One program per case: eager calls would compile every operation for itself.
@functools.partial(jax.jit, static_argnames=("grid", "backend", "scale"))
def attend(q, k, v, mask, grid, backend, scale=None, text_lengths=None):
    return block_sparse_attention_with_lse(
        q,
        k,
        v,
        mask,
        grid=grid,
        order="tiled",
        backend=backend,
        scale=scale,
        text_lengths=text_lengths,
    )


@pytest.mark.parametrize("case", ["divisible", "text-before-ragged"])
def test_raster_order_is_the_same_attention(backend, case):
    """Against NumPy on tiled tokens, permuted here."""
    grid, lengths = CASES[case]
    qkv = random_qkv(grid, dtype="float32")
    dense = random_mask(grid)
    want, want_lse = numpy_attention(*qkv, dense, grid, text_lengths=lengths)
    in_raster = [np.asarray(x)[:, grid.raster_order] for x in qkv]
    out, lse = block_sparse_attention_with_lse(
        *map(jnp.asarray, in_raster),
        compress(dense, grid),
        grid=grid,
        backend=backend,
        text_lengths=as_lengths(lengths),
        order="raster",
    )
    np.testing.assert_allclose(out, want[:, grid.raster_order], **ATTENTION["float32"])
    np.testing.assert_allclose(lse, want_lse[:, :, grid.raster_order], **LSE["float32"])


def as_lengths(lengths):
    return None if lengths is None else jnp.asarray(lengths, jnp.int32)


NUMPY_CASES = [
    *itertools.product(CASES, ["float32"]),
    *itertools.product(
        ["divisible", "text-after-ragged", "text-before-ragged"],
        ["bfloat16", "float16"],
    ),
]
QUICK_CASES = [
    ("edge-tiles", "float32"),
    ("one-token-tiles", "float32"),
    ("text-after-0", "float32"),
    ("text-after-ragged", "bfloat16"),
    ("text-before-ragged", "float16"),
]


@pytest.mark.parametrize("case", mostly_nightly(NUMPY_CASES, QUICK_CASES), ids="-".join)
def test_matches_numpy(backend, case):
    case, dtype = case
    grid, lengths = CASES[case]
    q, k, v = random_qkv(grid, dtype=dtype)
    dense = random_mask(grid)
    out, lse = attend(
        q, k, v, compress(dense, grid), grid, backend, text_lengths=as_lengths(lengths)
    )
    want_out, want_lse = numpy_attention(q, k, v, dense, grid, text_lengths=lengths)
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype("float32"), want_out, **ATTENTION[dtype])
    np.testing.assert_allclose(lse, want_lse, **LSE[dtype])


def test_scale_is_used(backend):
    q, k, v = random_qkv(ODD)
    dense = random_mask(ODD)
    out, lse = attend(q, k, v, compress(dense, ODD), ODD, backend, scale=0.7)
    want_out, want_lse = numpy_attention(q, k, v, dense, ODD, scale=0.7)
    np.testing.assert_allclose(out, want_out, **ATTENTION["float32"])
    np.testing.assert_allclose(lse, want_lse, **LSE["float32"])


def test_rows_without_keys_are_zero(backend):
    grid, lengths = CASES["text-after-0"]
    q, k, v = random_qkv(grid)
    # Head 0 keeps nothing. Head 1 keeps text only, of which item 0 has none.
    dense = np.zeros((2, 2, grid.num_blocks, grid.num_blocks), bool)
    dense[:, 1, :, grid.text_blocks] = True
    mask = compress(dense, grid, capacity=grid.num_blocks)

    def loss(q, k, v):
        out, lse = attend(
            q, k, v, mask, grid, backend, text_lengths=as_lengths(lengths)
        )
        return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum(), (out, lse)

    grads, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert not out[:, :, 0].any()
    assert not out[0].any()
    assert (lse[:, 0] == -jnp.inf).all()
    assert (lse[0] == -jnp.inf).all()
    assert jnp.isfinite(lse[1, 1]).all()
    for grad in grads:
        assert jnp.isfinite(grad).all()
        assert not grad[0].any()


def test_one_kept_block(backend):
    """With a block of one token the output is that token's value."""
    grid = VideoGrid(1, 2, 3, tile=(1, 1))
    q, k, v = random_qkv(grid)
    partner = np.array([3, 1, 5, 0, 2, 4])
    dense = np.broadcast_to(np.eye(6, dtype=bool)[partner], (2, 2, 6, 6))
    out, _ = attend(q, k, v, compress(dense, grid), grid, backend)
    np.testing.assert_array_equal(out, np.asarray(v)[:, partner])


@pytest.mark.nightly
def test_huge_logits(backend):
    q, k, v = random_qkv(ODD)
    q, k = 100 * q, 100 * k  # logits reach 1e5 at scale 1
    dense = random_mask(ODD)
    mask = compress(dense, ODD)
    out, lse = attend(q, k, v, mask, ODD, backend, scale=1.0)
    want_out, want_lse = numpy_attention(q, k, v, dense, ODD, scale=1.0)
    assert jnp.abs(want_lse[np.isfinite(want_lse)]).max() > 1e4
    np.testing.assert_allclose(out, want_out, **HUGE_LOGITS)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)

    def loss(q, k, v):
        return block_sparse_attention(
            q, k, v, mask, grid=ODD, order="tiled", scale=1.0, backend=backend
        ).sum()

    for grad in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert jnp.isfinite(grad).all()


def test_full_mask_equals_jax(backend):
    grid = CASES["text-after"][0]
    q, k, v = random_qkv(grid)
    mask = BlockMask.full(grid=grid, batch=2, num_heads=2)
    out, _ = attend(q, k, v, mask, grid, backend)
    want = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])


def test_batch_items_and_heads_are_independent(backend):
    grid, lengths = CASES["text-after-ragged"]
    q, k, v = random_qkv(grid)
    dense = random_mask(grid)
    together = attend(
        q, k, v, compress(dense, grid), grid, backend, text_lengths=as_lengths(lengths)
    )
    for b in range(2):
        one = slice(b, b + 1)
        alone = attend(
            *(x[one, :, one] for x in (q, k, v)),
            compress(dense[one, one], grid),
            grid,
            backend,
            text_lengths=as_lengths(lengths[one]),
        )
        np.testing.assert_allclose(
            alone[0], together[0][one, :, one], **ATTENTION["float32"]
        )
        np.testing.assert_allclose(alone[1], together[1][one, one], **LSE["float32"])


def test_repeated_runs_are_identical(backend):
    grid, lengths = CASES["text-after-ragged"]
    q, k, v = random_qkv(grid)
    mask = compress(random_mask(grid), grid)

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out, lse = attend(
                q, k, v, mask, grid, backend, text_lengths=as_lengths(lengths)
            )
            return jnp.sin(out).sum(), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    first, second = run(q, k, v), run(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        ["edge-tiles", "text-after-ragged", "text-after-0"], ["text-after-ragged"]
    ),
)
def test_gradients_match_finite_differences(backend, case):
    """Directional derivatives of the NumPy reference, by central differences."""
    grid, lengths = CASES[case]
    rng = np.random.default_rng(1)
    inputs = random_qkv(grid, head_dim=8)
    dense = random_mask(grid)
    mask = compress(dense, grid)
    out_weight = rng.normal(size=inputs[0].shape)
    lse_weight = rng.normal(size=(2, 2, grid.num_tokens))

    def loss(q, k, v):
        out, lse = attend(
            q, k, v, mask, grid, backend, text_lengths=as_lengths(lengths)
        )
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out * out_weight).sum() + (lse * lse_weight).sum()

    def numpy_loss(*inputs):
        out, lse = numpy_attention(*inputs, dense, grid, text_lengths=lengths)
        lse = np.where(np.isfinite(lse), lse, 0.0)
        return (out * out_weight).sum() + (lse * lse_weight).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(*inputs)
    inputs = [np.asarray(x, np.float64) for x in inputs]
    for which, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        direction /= np.linalg.norm(direction)
        plus, minus = (
            numpy_loss(
                *(x + s * direction * (i == which) for i, x in enumerate(inputs))
            )
            for s in (1e-5, -1e-5)
        )
        got = (np.asarray(grad, np.float64) * direction).sum()
        np.testing.assert_allclose(got, (plus - minus) / 2e-5, **GRADIENT["float32"])


def test_vmap_equals_loop(backend):
    grid, _ = CASES["text-after-ragged"]
    masks = [compress(random_mask(grid, seed=s), grid) for s in range(2)]
    inputs = [random_qkv(grid, seed=s) for s in range(2)]
    lengths = jnp.asarray([[9, 3], [11, 0]], jnp.int32)

    def run(qkv, mask, lengths):
        return attend(*qkv, mask, grid, backend, text_lengths=lengths)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def loss(qkv, mask, lengths):
        return jnp.sin(run(qkv, mask, lengths)[0]).sum()

    for function, tolerance in ((run, ATTENTION), (jax.grad(loss), GRADIENT)):
        got = jax.jit(jax.vmap(function))(stack(*inputs), stack(*masks), lengths)
        cases = zip(inputs, masks, lengths, strict=True)
        want = stack(*(function(*args) for args in cases))
        jax.tree.map(
            lambda x, y, t=tolerance: np.testing.assert_allclose(x, y, **t["float32"]),
            got,
            want,
        )


def test_scan_and_remat(backend):
    """Layers are scanned and rematerialised in the models."""
    q, k, v = random_qkv(ODD)
    mask = compress(random_mask(ODD), ODD)

    def layer(x, _):
        out = block_sparse_attention(
            x, k, v, mask, grid=ODD, order="tiled", backend=backend
        )
        return out, None

    def scanned(q):
        return jnp.sin(jax.lax.scan(jax.checkpoint(layer), q, length=2)[0]).sum()

    def unrolled(q):
        return jnp.sin(layer(layer(q, None)[0], None)[0]).sum()

    got, want = jax.jit(jax.grad(scanned))(q), jax.grad(unrolled)(q)
    np.testing.assert_allclose(got, want, **GRADIENT["float32"])


@pytest.mark.nightly
# A few fixed geometries, so that examples share compiled code.
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    grid=st.sampled_from([ODD, CASES["text-before-ragged"][0]]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_random_masks(backend, grid, density, seed):
    q, k, v = random_qkv(grid, batch=1, seed=seed)
    dense = random_mask(grid, batch=1, density=density, seed=seed)
    out, lse = attend(q, k, v, compress(dense, grid), grid, backend)
    want_out, want_lse = numpy_attention(q, k, v, dense, grid)
    np.testing.assert_allclose(out, want_out, **ATTENTION["float32"])
    np.testing.assert_allclose(lse, want_lse, **LSE["float32"])
