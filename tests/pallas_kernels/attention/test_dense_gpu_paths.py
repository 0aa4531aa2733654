"""What dense attention asks of a GPU's kernels: functions of XLA stand in for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax.grid import VideoGrid
from pallas_kernels import dense_attention
from pallas_kernels.attention import dense_api, sm90
from pallas_kernels.attention.api import BackendChoice
from tests.pallas_kernels.attention.reference import (
    matrix_attention,
    numpy_attention,
    random_qkv,
)
from tests.tolerances import ATTENTION, GRADIENT

AFTER = VideoGrid(1, 4, 8, tile=(2, 4), text_length=11)
BEFORE = VideoGrid(1, 4, 8, tile=(2, 4), text_length=11, text_side="before")
RAGGED = (9, 0)
CASES = {  # path, grid, text lengths
    "hopper": ("hopper", AFTER, None),
    "hopper-ragged": ("hopper", AFTER, RAGGED),
    "cudnn": ("cudnn", BEFORE, None),
    "cudnn-ragged": ("cudnn", AFTER, RAGGED),
    "cudnn-text-first": ("cudnn", BEFORE, RAGGED),
}
XLA = jax.nn.dot_product_attention


def cudnn(q, k, v, *, scale, key_value_seq_lengths, implementation):
    """Takes a valid prefix of the keys, as cuDNN does."""
    assert implementation == "cudnn"
    return XLA(q, k, v, scale=scale, key_value_seq_lengths=key_value_seq_lengths)


def hopper(q, k, v, *, scale, lengths):
    """Takes a valid prefix of the sequence; the other queries get zeros."""
    out = XLA(q, k, v, scale=scale, key_value_seq_lengths=lengths)
    if lengths is None:
        return out
    valid = jnp.arange(q.shape[1]) < lengths[:, None]
    return jnp.where(valid[:, :, None, None], out, 0)


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    path, grid, lengths = CASES[request.param]
    choice = BackendChoice(name=path, reason="a stand-in")
    monkeypatch.setattr(dense_api, "choose", lambda *shape, **options: choice)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    monkeypatch.setattr(sm90.dense_backend, "hopper_dense_attention", hopper)
    return grid, lengths


def attend(q, k, v, grid, lengths, scale):
    text_lengths = None if lengths is None else jnp.asarray(lengths)
    return dense_attention(q, k, v, grid=grid, scale=scale, text_lengths=text_lengths)


@pytest.mark.parametrize("is_traced", [False, True], ids=["known", "traced"])
def test_output(case, is_traced):
    grid, lengths = case
    q, k, v = random_qkv(grid)
    run = functools.partial(attend, q, k, v, grid, lengths)
    out = jax.jit(run)(0.3) if is_traced else run(0.3)
    every_pair = np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool)
    want, _ = numpy_attention(
        q, k, v, every_pair, grid, scale=0.3, text_lengths=lengths
    )
    np.testing.assert_allclose(out, want, **ATTENTION["float32"])


def test_gradients(case):
    grid, lengths = case
    qkv = random_qkv(grid)
    weights = np.random.default_rng(1).normal(size=qkv[0].shape)
    every_pair = np.ones((2, 2, grid.num_blocks, grid.num_blocks), bool)

    def loss(q, k, v):
        return (attend(q, k, v, grid, lengths, None) * weights).sum()

    def expected_loss(q, k, v):
        options = {"text_lengths": lengths, "xp": jnp}
        return (
            matrix_attention(q, k, v, every_pair, grid, **options)[0] * weights
        ).sum()

    got = jax.grad(loss, (0, 1, 2))(*qkv)
    want = jax.jit(jax.grad(expected_loss, (0, 1, 2)))(*qkv)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, **GRADIENT["float32"])
