"""Dense attention in fused kernels, whose derivatives are more than theirs.

Reverse mode is cuDNN's, also where the Hopper kernel runs forward. Neither kernel has
forward mode or second derivatives: those are XLA's, of the same function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from pallas_kernels.attention import sm90
from pallas_kernels.attention.dense_xla import AXES, chunk_size, chunked_attention
from pallas_kernels.attention.derivatives import RESIDUAL_NAMES
from pallas_kernels.common.device import Device
from pallas_kernels.common.interfaces import (
    BlockGrid,
    valid_prefix,
    valid_tokens,
)
from pallas_kernels.common.linear_maps import LinearMap, sealed
from pallas_kernels.common.slow_paths import warn_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedAttention:
    """Dense attention by a fused kernel; arrays are q, k, v and, with text, lengths.

    Attributes:
      path: The kernel of the forward pass: "hopper" or "cudnn".
      grid: Where the text of the lengths stands; None where there are no lengths.
      scale: Factor on the logits.
      device: What the call is compiled for.
    """

    path: str
    grid: BlockGrid | None
    scale: float
    device: Device

    def forward(self, q: Array, k: Array, v: Array, *lengths: Array) -> Array:
        """Computes the output by the kernel of the path."""
        if self.path == "cudnn":
            return self.by_cudnn(q, k, v, *lengths)
        keys = None
        if self.grid is not None:
            keys = valid_prefix(self.grid, lengths[0])
        return sm90.dense_backend.hopper_dense_attention(
            q, k, v, scale=self.scale, lengths=keys
        )

    def by_cudnn(self, q: Array, k: Array, v: Array, *lengths: Array) -> Array:
        """Computes the output by cuDNN.

        It takes the length of a valid prefix of keys: text goes last. The order of keys
        does not change attention, so rolling K and V is enough.
        """
        keys = None
        if self.grid is not None:
            keys = valid_prefix(self.grid, lengths[0])
            if self.grid.text_tokens.start == 0:
                k, v = (jnp.roll(x, -self.grid.text_length, axis=1) for x in (k, v))
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=self.scale,
            key_value_seq_lengths=keys,
            implementation="cudnn",
        )
        return self._cleared(out, *lengths)

    def by_xla(self, q: Array, k: Array, v: Array, *lengths: Array) -> Array:
        """Computes the output by XLA, which can differentiate it in every mode."""
        valid = None
        if self.grid is not None:
            valid = valid_tokens(self.grid, lengths[0])
        out = chunked_attention(
            q,
            k,
            v,
            valid,
            scale=self.scale,
            chunk=chunk_size(q.shape, self.device),
            one_head_at_a_time=self.device.platform == "cpu",
        )
        return self._cleared(out, *lengths)

    def _cleared(self, out: Array, *lengths: Array) -> Array:
        if self.grid is None:
            return out
        valid = valid_tokens(self.grid, lengths[0])
        return jnp.where(valid[:, :, None, None], out, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(attention: FusedAttention, *arrays: Array) -> Float[Array, "B T N D"]:
    """Computes attention by a fused kernel, differentiable in every mode and order."""
    axes = dataclasses.replace(AXES, operands=AXES.operands[: len(arrays)])
    (out,) = sealed(lambda *arrays: (attention.forward(*arrays),), *arrays, axes=axes)
    return out


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _differentiate(attention, arrays, tangents):
    out, *kept = _for_gradients(attention, *arrays)
    # Policies of `jax.checkpoint` may keep them; q, k and v are named by their makers.
    out = checkpoint_name(out, RESIDUAL_NAMES[0])
    kept = [checkpoint_name(x, RESIDUAL_NAMES[1]) for x in kept]
    return out, _tangent(attention, arrays, tangents, kept)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _for_gradients(attention: FusedAttention, *arrays: Array) -> tuple[Array, ...]:
    """Returns cuDNN's output and what its backward pass keeps beside the inputs."""

    def run(*arrays):
        out, pullback = _by_cudnn_with_pullback(attention, *arrays)
        return out, *jax.tree.leaves(pullback)

    # XLA knows how cuDNN's attention is sharded.
    return tuple(sealed(run, *arrays))


@functools.partial(_for_gradients.defjvp, symbolic_zeros=True)
def _differentiate_again(attention, arrays, tangents):
    """Second derivatives: nobody differentiates along what cuDNN keeps."""
    out, *kept = _for_gradients(attention, *arrays)
    moved = (_tangent(attention, arrays, tangents, kept), *map(_zero_tangent, kept))
    return (out, *kept), moved


def _zero_tangent(x: Array) -> Array | np.ndarray:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _tangent(attention, arrays, tangents, kept) -> Array:
    count = len(arrays)

    def by_cudnn(residuals, cotangents):
        arrays, kept = residuals[:count], residuals[count:]
        like = jax.eval_shape(
            functools.partial(_by_cudnn_with_pullback, attention), *arrays
        )
        pullback = jax.tree.unflatten(jax.tree.structure(like[1]), kept)
        return pullback(*cotangents)

    by_xla = _derivatives_by_xla(attention, count)
    program = LinearMap(
        apply=by_xla.apply,
        transpose=by_cudnn,
        differentiable=by_xla,
        notice=functools.partial(_warn, attention),
    )
    moved = tuple(None if isinstance(x, SymbolicZero) else x for x in tangents[:3])
    (tangent,) = program((*arrays, *kept), moved)
    return tangent


def _warn(attention: FusedAttention) -> None:
    warn_once(
        f"dense_attention runs on backend {attention.path!r}, which has neither "
        "forward mode nor second derivatives: they run on backend 'xla'"
    )


def _by_cudnn_with_pullback(attention: FusedAttention, *arrays: Array):
    q, k, v, *lengths = arrays
    return jax.vjp(lambda q, k, v: attention.by_cudnn(q, k, v, *lengths), q, k, v)


def _derivatives_by_xla(attention: FusedAttention, count: int) -> LinearMap:
    """Returns the tangent of attention and its transpose, of the first arrays."""

    def along(residuals, chosen):
        qkv, lengths = residuals[:3], residuals[3:count]

        def of_chosen(*values):
            rest = iter(values)
            pairs = zip(qkv, chosen, strict=True)
            arrays = [next(rest) if is_chosen else x for x, is_chosen in pairs]
            return attention.by_xla(*arrays, *lengths)

        pairs = zip(qkv, chosen, strict=True)
        return of_chosen, [x for x, is_chosen in pairs if is_chosen]

    def tangents(residuals, moved):
        function, primals = along(residuals, [x is not None for x in moved])
        moving = [x for x in moved if x is not None]
        return (jax.jvp(function, primals, moving)[1],)

    def cotangents(residuals, cotangents):
        _warn(attention)  # a second derivative: the first is cuDNN's
        function, primals = along(residuals, [True] * 3)
        return jax.vjp(function, *primals)[1](*cotangents)

    return LinearMap(apply=tangents, transpose=cotangents)
