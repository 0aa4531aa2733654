"""Derivatives of dense attention around cuDNN, which a function stands for here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import VideoGrid
from pallas_kernels import RESIDUAL_NAMES, SlowBackendWarning
from pallas_kernels.attention.dense_fused import FusedAttention, attend
from pallas_kernels.common.device import Device
from tests.pallas_kernels.attention import test_derivatives as sparse
from tests.pallas_kernels.attention.reference import matrix_attention, random_qkv
from tests.pallas_kernels.attention.test_checkpoint_names import count
from tests.tolerances import SECOND_DERIVATIVE
from tests.warnings_once import forget_warnings

GRID = VideoGrid(1, 3, 5, tile=(2, 2), text_length=5, text_side="before")
FULL = np.ones((2, 2, GRID.num_blocks, GRID.num_blocks), bool)
LENGTHS = (4, 0)


def softmax_parts(q, k, keys):
    logits = 0.5 * jnp.einsum("btnd,bsnd->bnts", q, k)
    is_key = jnp.arange(k.shape[1]) < keys[:, None]
    logits = jnp.where(is_key[:, None, None], logits, -jnp.inf)
    top = logits.max(-1)
    return logits, top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))


@jax.custom_vjp
def cudnn(q, k, v, keys):
    return cudnn_forward(q, k, v, keys)[0]


def cudnn_forward(q, k, v, keys):
    logits, lse = softmax_parts(q, k, keys)
    out = jnp.einsum("bnts,bsnd->btnd", jnp.exp(logits - lse[..., None]), v)
    return out, (q, k, v, keys, out, lse)


def cudnn_backward(residuals, d_out):
    q, k, v, keys, out, lse = residuals
    logits = 0.5 * jnp.einsum("btnd,bsnd->bnts", q, k)
    is_key = (jnp.arange(k.shape[1]) < keys[:, None])[:, None, None]
    weights = jnp.where(is_key, jnp.exp(logits - lse[..., None]), 0)
    delta = jnp.einsum("btnd,btnd->bnt", out, d_out)
    d_logits = jnp.einsum("btnd,bsnd->bnts", d_out, v) - delta[..., None]
    d_logits = 0.5 * weights * d_logits
    return (
        jnp.einsum("bnts,bsnd->btnd", d_logits, k),
        jnp.einsum("bnts,btnd->bsnd", d_logits, q),
        jnp.einsum("bnts,btnd->bsnd", weights, d_out),
        None,
    )


cudnn.defvjp(cudnn_forward, cudnn_backward)


@pytest.fixture(autouse=True)
def cudnn_is_a_function(monkeypatch):
    """Like cuDNN's, it has neither forward mode nor second derivatives."""

    def run(q, k, v, *, scale, key_value_seq_lengths, implementation):
        assert (scale, implementation) == (0.5, "cudnn")
        return cudnn(q, k, v, key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)


def dense(qkv):
    device = Device(platform="cpu", kind="cpu", compute_capability=None)
    fused = FusedAttention(path="cudnn", grid=GRID, scale=0.5, device=device)
    return attend(fused, *qkv, jnp.asarray(LENGTHS)), jnp.zeros(())


def matrices(qkv):
    out, _ = matrix_attention(*qkv, FULL, GRID, text_lengths=LENGTHS, xp=jnp)
    return out, jnp.zeros(())


DERIVATIVES = [
    pytest.param(sparse.jvp, marks=pytest.mark.nightly),
    pytest.param(sparse.jvp_of_one, marks=pytest.mark.nightly),
    pytest.param(sparse.jvp_of_grad, marks=pytest.mark.nightly),
    pytest.param(sparse.mapped, marks=pytest.mark.nightly),
    sparse.grad_of_grad,
]


@pytest.mark.filterwarnings("ignore::pallas_kernels.SlowBackendWarning")
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_are_those_of_matrices(derivative, assert_close):
    qkv = random_qkv(GRID, head_dim=4)
    u, w = sparse.directions(1), sparse.directions(2)

    def run(attend):
        return jax.jit(functools.partial(derivative, attend))(qkv, u, w)

    for x, y in zip(*map(jax.tree.leaves, map(run, (dense, matrices))), strict=True):
        assert_close("derivatives", x, y, SECOND_DERIVATIVE)


def test_reverse_mode_is_that_of_cudnn_and_forward_mode_warns(recwarn):
    """A wrong backward pass of cuDNN's shows in the gradient."""
    forget_warnings()
    qkv = random_qkv(GRID, head_dim=4)
    gradient = jax.grad(lambda qkv: jnp.sin(dense(qkv)[0]).sum())
    jaxpr = jax.make_jaxpr(gradient)(qkv).jaxpr
    assert count(jaxpr, "log") == 1
    assert count(jaxpr, "while") + count(jaxpr, "scan") == 0  # XLA's goes in chunks
    assert not recwarn
    with pytest.warns(SlowBackendWarning, match="forward mode .* run on backend 'xla'"):
        jax.jvp(dense, (qkv,), (qkv,))


def test_checkpoint_names_keep_the_forward_pass():
    named = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)

    def layer(x):
        return jnp.sin(dense([jnp.tanh(x * scale) for scale in (1.0, 2.0, 3.0)])[0])

    x = jnp.ones((2, GRID.num_tokens, 2, 4))
    for policy, runs in ((named, 1), (None, 2)):
        remat = jax.checkpoint(layer, policy=policy)
        gradient = jax.value_and_grad(lambda x, remat=remat: remat(x).sum())
        assert count(jax.make_jaxpr(gradient)(x).jaxpr, "log") == runs
