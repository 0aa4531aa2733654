"""Exact rows, maps of queries and the correction on a GPU, against float64 and XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, draft_attention
from pallas_kernels import dense_attention, unchecked_row_attention
from pallas_kernels.query_map import unchecked_add_query_map
from tests.pallas_kernels.attention.reference import attention_of_rows, valid_keys
from tests.tolerances import GPU_ATTENTION

pytestmark = pytest.mark.gpu

SCALE = 128**-0.5
GRIDS = {
    "no text": (VideoGrid(3, 16, 32), None),
    "parts of the keys": (VideoGrid(17, 16, 32), None),
    "parts, ragged": (VideoGrid(16, 16, 32, text_length=128), (128, 7)),
    "after": (VideoGrid(3, 16, 32, text_length=40), (40, 7)),
    "no whole eights, by cuDNN": (VideoGrid(3, 16, 32, text_length=13), (13, 7)),
    "before, by XLA": (
        VideoGrid(3, 16, 32, text_length=40, text_side="before"),
        (0, 33),
    ),
}


def random_qkv(grid, heads=2):
    rng = np.random.default_rng(0)
    shape = (3, 2, grid.num_tokens, heads, 128)
    return tuple(jnp.asarray(rng.normal(size=shape), "bfloat16"))


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("count", [32, 200])
def test_exact_rows_are_softmax_attention(case, count):
    grid, lengths = GRIDS[case]
    q, k, v = random_qkv(grid)
    rows = q[:, :: grid.num_tokens // count][:, :count]
    got = unchecked_row_attention(
        rows,
        k,
        v,
        grid=grid,
        scale=SCALE,
        text_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
    )
    want = attention_of_rows(rows, k, v, valid_keys(grid, lengths), SCALE)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, **GPU_ATTENTION["bfloat16"]
    )


@pytest.mark.parametrize("order", ["raster", "tiled"])
@pytest.mark.parametrize("case", GRIDS)
def test_corrected_attention_is_that_of_xla(case, order):
    """The card's kernels against XLA in float32, whose masks may differ by ties."""
    grid, lengths = GRIDS[case]
    qkv = random_qkv(grid)
    attend = functools.partial(
        draft_attention,
        grid=grid,
        config=DraftConfig(sparsity=0.75),
        text_lengths=None if lengths is None else np.asarray(lengths),
        order=order,
    )
    got = jax.jit(attend)(*qkv).astype(jnp.float32)
    by_xla = jax.jit(functools.partial(attend, backend="xla"))
    want = by_xla(*(x.astype(jnp.float32) for x in qkv))
    assert float(jnp.abs(got - want).mean()) < 0.02 * float(jnp.abs(want).mean())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_tokens", [64, 1096, 8192])
def test_a_map_of_queries_is_added(num_tokens, head_dim, dtype):
    rng = np.random.default_rng(0)
    shape, tokens = (2, num_tokens, 3, head_dim), (5, num_tokens - 3)
    out, q = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    matrix = rng.normal(size=(2, 3, head_dim, head_dim)) / head_dim**0.5
    matrix = np.asarray(jnp.asarray(matrix, dtype).astype(jnp.float32))
    offset = rng.normal(size=(2, 3, head_dim)).astype(np.float32)
    fit = jnp.asarray(matrix), jnp.asarray(offset)
    got = unchecked_add_query_map(out, q, *fit, tokens=tokens)
    want = np.asarray(out, np.float64)
    own = slice(*tokens)
    moved = np.einsum("btnd,bnde->btne", np.asarray(q, np.float64), matrix)
    want[:, own] += (moved + offset[:, None])[:, own]
    # Half a unit of the last place, and float32's sums.
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=1e-5)


def test_the_correction_comes_closer_to_dense_attention():
    """Keys and values that vary together are what means cannot tell."""
    grid = VideoGrid(8, 16, 32)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(2, 1, grid.num_tokens, 2, 128))
    q = jnp.asarray(noise[0], "bfloat16")
    k = jnp.asarray(0.5 * noise[1], "bfloat16")
    v = jnp.asarray(noise[1] @ rng.normal(size=(128, 128)) / 128**0.5, "bfloat16")
    dense = dense_attention(q, k, v).astype(jnp.float32)

    def error(config):
        out = draft_attention(q, k, v, grid=grid, config=config, order="tiled")
        return float(jnp.linalg.norm(out.astype(jnp.float32) - dense))

    assert error(DraftConfig()) < 0.8 * error(DraftConfig(correction=None))
