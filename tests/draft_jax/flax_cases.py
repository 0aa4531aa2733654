"""Flax layers of one small size, and the NumPy layer they are held against."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from draft_jax import DraftAttention, DraftConfig, VideoGrid
from tests.draft_jax import naive_draft

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=6)  # S = 12, 1 text block
CONFIG = DraftConfig.paper(sparsity=0.6)
FEATURES, HEADS, DIM = 12, 2, 8

# Largest error measured: 5e-7.
F32 = {"rtol": 1e-5, "atol": 5e-6}

make_layer = functools.partial(
    DraftAttention,
    num_heads=HEADS,
    in_features=FEATURES,
    qkv_features=HEADS * DIM,
    config=CONFIG,
    bias_init=nnx.initializers.normal(0.3),
)


def random_x(batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, GRID.num_tokens, FEATURES))
    return jnp.asarray(x, jnp.float32)


def numpy_parameters(layer):
    """Kernel and bias of each projection in float64."""
    return {
        name: [
            np.asarray(getattr(layer, name).kernel[...], np.float64),
            np.asarray(getattr(layer, name).bias[...], np.float64),
        ]
        for name in ("query", "key", "value", "out")
    }


def numpy_layer(parameters, x, *, sparsity=0.6, text_lengths=None, qk=lambda x, _: x):
    """Project, draft, attend, project; `qk(tokens, name)` follows the projection."""
    x = np.asarray(x, np.float64)
    q, k, v = (
        np.einsum("btc,cnd->btnd", x, parameters[name][0]) + parameters[name][1]
        for name in ("query", "key", "value")
    )
    q, k = qk(q, "query"), qk(k, "key")
    kept = naive_draft.percentile_mask(q, k, GRID, sparsity)
    out = naive_draft.attention(q, k, v, kept, GRID, text_lengths)
    return np.einsum("btnd,ndc->btc", out, parameters["out"][0]) + parameters["out"][1]
