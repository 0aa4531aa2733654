"""The measures of concentrated attention, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid
from models.mini.evaluate import attention_shares

GRID = VideoGrid(3, 4, 6, tile=(2, 3))  # 12 tiles of 6 tokens


def naive_tile_masses(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Softmax mass between tiles of one head; tokens are in tiled order."""
    logits = q @ k.T / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    masses = np.zeros((12, 12))
    for row, column in np.ndindex(72, 72):
        masses[row // 6, column // 6] += weights[row, column]
    return masses


@pytest.fixture(scope="module")
def shares_of():
    return jax.jit(lambda q, k: attention_shares((q, k), GRID))


def test_shares_match_loops(shares_of):
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 72, 2, 16)).astype(np.float32) for _ in range(2))
    shares = shares_of(jnp.asarray(2 * q), jnp.asarray(k))
    for item, head in np.ndindex(2, 2):
        queries, keys = 2 * q[item, :, head], k[item, :, head]
        masses = naive_tile_masses(queries, keys)
        strongest = np.sort(masses, axis=None)[::-1]
        top = strongest[:14].sum() / masses.sum()  # 10 % of 144 pairs, rounded
        np.testing.assert_allclose(shares["top_10_percent"][item, head], top, rtol=1e-4)
        # The draft: softmax of the tiles' mean queries and keys, best 25 % kept.
        means = [part.reshape(12, 6, 16).mean(1) for part in (queries, keys)]
        scores = np.exp(means[0] @ means[1].T / 4.0)
        scores /= scores.sum(-1, keepdims=True)
        kept = scores >= np.sort(scores, axis=None)[::-1][35]  # ceil(144 / 4)
        empty = ~kept.any(-1)
        kept[empty, scores[empty].argmax(-1)] = True
        expected = masses[kept].sum() / masses.sum()
        np.testing.assert_allclose(
            shares["kept_at_sparsity_0.75"][item, head], expected, rtol=1e-4
        )


def test_uniform_attention_has_a_tenth_in_a_tenth(shares_of):
    zeros = jnp.zeros((2, 72, 2, 16))
    shares = shares_of(zeros, zeros)
    np.testing.assert_allclose(shares["top_10_percent"], 14 / 144, rtol=1e-5)
    np.testing.assert_allclose(shares["kept_at_sparsity_0.75"], 0.25, rtol=0.4)
