"""Shapes and dtypes that no attention function here takes: all refuse them alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    BlockMask,
    DraftAttention,
    DraftConfig,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    draft_attention_fn,
    draft_scores,
    initial_mask,
    norm_rope_pool,
    pool_tokens,
    scheduled_attention,
)
from pallas_kernels import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dense_attention,
)

pytestmark = pytest.mark.usefixtures("without_annotations")

GRID = VideoGrid(1, 4, 6, tile=(2, 3), text_length=5)  # 29 tokens
CONFIG = DraftConfig.paper(sparsity=0.5)
Q = (2, 29, 3, 8)
partial = functools.partial


def scheduled(q, k, v):
    step, mask = constant_step(GRID, CONFIG), initial_mask(GRID, CONFIG, **SIZES)
    return scheduled_attention(q, k, v, grid=GRID, config=CONFIG, step=step, mask=mask)


def given_mask(function, q, k, v):
    mask = BlockMask.full(grid=GRID, **SIZES)
    return function(q, k, v, mask, grid=GRID, order="raster")


def own_fn(q, k, v):
    """As Flax calls it, which says key and value for k and v."""
    return draft_attention_fn(GRID, CONFIG)(query=q, key=k, value=v)


SIZES = {"batch": 2, "num_heads": 3}
OF_QKV = {
    "draft_attention": partial(draft_attention, grid=GRID, config=CONFIG),
    "scheduled_attention": scheduled,
    "block_sparse_attention": partial(given_mask, block_sparse_attention),
    "with_lse": partial(given_mask, block_sparse_attention_with_lse),
    "dense_attention": dense_attention,
    "draft_attention_fn": own_fn,
}
OF_QK = {
    function.__name__: partial(function, grid=GRID, config=CONFIG)
    for function in (compute_mask, draft_scores, norm_rope_pool)
}
FAULTS = {  # shape of k and v, their dtype, error, what its message says
    "grouped heads": (
        (2, 29, 1, 8),
        "float32",
        ValueError,
        r"k has shape \(2, 29, 1, 8\); it must equal q's shape \(2, 29, 3, 8\): "
        r"attention has no grouped heads; .*jnp\.repeat\(k, 3, axis=2\)",
    ),
    "another length": (
        (2, 7, 3, 8),
        "float32",
        ValueError,
        "k has shape .* must equal q's shape .*: this is self-attention only",
    ),
    "another dtype": (
        Q,
        "bfloat16",
        TypeError,
        r"k has dtype bfloat16; it must equal q's dtype float32: .*k\.astype\(q\.dtype",
    ),
}
RUN = {
    "eager": lambda function, *arrays: function(*map(jnp.asarray, arrays)),
    "jit": lambda function, *arrays: jax.jit(function)(*arrays),
    "numpy": lambda function, *arrays: function(*arrays),
}


@pytest.mark.parametrize("mode", RUN)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", OF_QKV | OF_QK)
def test_keys_unlike_queries(name, fault, mode):
    shape, dtype, error, message = FAULTS[fault]
    q = np.ones(Q, np.float32)
    k = np.ones(shape, jnp.dtype(dtype))
    arrays = (q, k, k) if name in OF_QKV else (q, k)
    with pytest.raises(error, match=message):
        RUN[mode]((OF_QKV | OF_QK)[name], *arrays)


@pytest.mark.parametrize("mode", RUN)
@pytest.mark.parametrize("name", OF_QKV | OF_QK)
def test_no_batch(name, mode):
    """Flax's functions take any number of batch axes, so ours for Flax does."""
    q = np.ones(Q[1:], np.float32)
    arrays = (q, q, q) if name in OF_QKV else (q, q)
    call = partial(RUN[mode], (OF_QKV | OF_QK)[name], *arrays)
    if name == "draft_attention_fn":
        assert jax.eval_shape(own_fn, q, q, q).shape == q.shape
        return
    with pytest.raises(
        ValueError, match=r"q has shape \(29, 3, 8\); expected \[batch, .*pass q\[None"
    ):
        call()


def test_no_batch_of_what_is_pooled():
    with pytest.raises(ValueError, match=r"x has shape \(24, 3, 8\).*pass x\[None\]"):
        pool_tokens(jnp.ones((24, 3, 8)), GRID)


def test_no_batch_of_the_layer():
    layer = DraftAttention(3, 12, config=CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has shape \(29, 12\).*pass x\[None\] and"):
        layer(jnp.ones((29, 12)), grid=GRID)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 29, 3, 4), "v has shape .*: pad the channels of the narrower"),
        ((1, 29, 3, 8), r"v has shape .*jnp\.broadcast_to\(v, q\.shape\)"),
        ((2, 29, 2, 8), r"v has shape \(2, 29, 2, 8\); it must equal q's shape .*\)$"),
    ],
    ids=["channels", "one item", "heads that divide nothing"],
)
def test_values_unlike_queries(shape, message):
    q = jnp.ones(Q)
    with pytest.raises(ValueError, match=message):
        draft_attention(q, q, jnp.ones(shape), grid=GRID, config=CONFIG)


def test_the_remedies_work():
    """Repeated heads and an added batch axis are taken, and say what they should."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, *Q[1:])).astype(np.float32)
    k, v = k[:, :, :1], v[:, :, :1]  # one head of keys and values for three of queries
    repeated = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    dense = DraftConfig.paper(sparsity=0.0)
    got = draft_attention(jnp.asarray(q[0])[None], *repeated, grid=GRID, config=dense)
    logits = np.einsum("btnd,bsmd->bnts", q, k).astype(np.float64) / 8**0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bnts,bsmd->btnd", weights, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)
