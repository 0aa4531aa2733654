"""Sums over the kept pairs of blocks, differentiable to any order in either mode.

A sum over pairs adds `step(own, others, pairs)` over the blocks that a row keeps. Its
tangent is a sum over the same pairs. The cotangent of what is read at the row is one
too, and that of what is read at the kept blocks is one over the transposed lists. So
every derivative walks lists, in memory linear in tokens and without atomics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.blocks import ChunkConfig, Lists, transpose, walk
from pallas_kernels.common.linear_maps import LinearMap

Arrays = tuple[Array, ...]


# `step(own, others, pairs)` returns float32 arrays [G, P, ...], sums over the S tokens
# of `others`. It is hashable. `own` are arrays [G, P, ...] of the rows themselves,
# `others` [G, S, ...] of blocks that they keep. `pairs` [G, P, S] are the tokens that
# count; all others must add nothing.
Step = Callable[[Arrays, Arrays, Array], Arrays]


class Walked(NamedTuple):
    """How pairs are walked: static."""

    num_blocks: int
    config: ChunkConfig


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def sum_over_pairs(
    step: Step,
    walked: Walked,
    lists: Lists,
    lengths: Int[Array, " L"],
    own: Arrays,
    others: Arrays,
) -> Arrays:
    """Adds a step over the kept pairs of blocks.

    Args:
      step: What is added.
      walked: How pairs are walked.
      lists: Blocks that each row keeps.
      lengths: Valid tokens of each block.
      own: Arrays [L, P, ...] that are read at the row.
      others: Arrays [L, P, ...] that are read at the kept blocks.

    Returns:
      float32 arrays [L, P, ...].
    """
    size = own[0].shape[1]
    shapes = jax.eval_shape(step, own, others, jnp.ones((1, size, size), bool))

    def init(own):
        count = own[0].shape[0]
        return tuple(jnp.zeros((count, *x.shape[1:]), jnp.float32) for x in shapes)

    def advance(own, others, valid, carry):
        *own, own_lengths = own
        is_own = jnp.arange(size) < own_lengths[:, None]
        pairs = is_own[:, :, None] & valid[:, None]
        added = step(tuple(own), others, pairs)
        return tuple(x + y for x, y in zip(carry, added, strict=True))

    return walk(
        lists,
        own=(*own, lengths),
        others=(*others, lengths),
        init=init,
        step=advance,
        finish=lambda own, carry: carry,
        num_blocks=walked.num_blocks,
        config=walked.config,
    )


@functools.partial(sum_over_pairs.defjvp, symbolic_zeros=True)
def _differentiate(step, walked, primals, tangents):
    lists, lengths, own, others = primals
    moved = (*tangents[2], *tangents[3])
    program = _Derivatives(step, walked, len(own))
    tangent_sums = LinearMap(apply=program.tangents, transpose=program.cotangents)(
        (*lists, lengths, *own, *others),
        tuple(None if isinstance(x, SymbolicZero) else x for x in moved),
    )
    return sum_over_pairs(step, walked, *primals), tangent_sums


@dataclasses.dataclass(frozen=True)
class _Derivatives:
    """The tangents of a sum and their transpose, as a `LinearMap` takes them."""

    step: Step
    walked: Walked
    num_own: int

    def _split(self, residuals: Arrays) -> tuple[Lists, Array, Arrays, Arrays]:
        *lists, lengths = residuals[:4]
        arrays = residuals[4:]
        return Lists(*lists), lengths, arrays[: self.num_own], arrays[self.num_own :]

    def tangents(self, residuals: Arrays, moved: tuple[Array | None, ...]) -> Arrays:
        lists, lengths, own, others = self._split(residuals)
        moves = tuple(x is not None for x in moved)
        step = _Tangent(self.step, moves[: self.num_own], moves[self.num_own :])
        own = (*own, *(x for x in moved[: self.num_own] if x is not None))
        others = (*others, *(x for x in moved[self.num_own :] if x is not None))
        return sum_over_pairs(step, self.walked, lists, lengths, own, others)

    def cotangents(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        lists, lengths, own, others = self._split(residuals)
        of_own = sum_over_pairs(
            _OwnCotangents(self.step, len(own)),
            self.walked,
            lists,
            lengths,
            (*own, *cotangents),
            others,
        )
        of_others = sum_over_pairs(
            _OthersCotangents(self.step, len(own)),
            self.walked,
            transpose(lists, self.walked.num_blocks),
            lengths,
            others,
            (*own, *cotangents),
        )
        pairs = zip((*of_own, *of_others), (*own, *others), strict=True)
        return tuple(x.astype(like.dtype) for x, like in pairs)


# Derivatives of steps multiply in float32: then casts within a step change nothing, and
# no product of a tangent is rounded.


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """Derivative of a step along some of its arrays, whose tangents come after all."""

    step: Step
    own_moves: tuple[bool, ...]
    others_move: tuple[bool, ...]

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        own, others = _as_float32(own), _as_float32(others)
        num_own, moves = len(self.own_moves), (*self.own_moves, *self.others_move)
        num_others = len(self.others_move)
        primals = (*own[:num_own], *others[:num_others])
        tangents = (*own[num_own:], *others[num_others:])
        moving = [x for x, is_moved in zip(primals, moves, strict=True) if is_moved]

        def of_moving(*values: Array) -> Arrays:
            rest = iter(values)
            pairs_of = zip(primals, moves, strict=True)
            arrays = tuple(next(rest) if moved else x for x, moved in pairs_of)
            return self.step(arrays[:num_own], arrays[num_own:], pairs)

        return jax.jvp(of_moving, moving, list(tangents))[1]


@dataclasses.dataclass(frozen=True)
class _OwnCotangents:
    """Cotangents of what a step reads at the row; those of results come after it."""

    step: Step
    num_own: int

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        own, others = _as_float32(own), _as_float32(others)
        own, cotangents = own[: self.num_own], own[self.num_own :]
        _, pull_back = jax.vjp(lambda *own: self.step(own, others, pairs), *own)
        return pull_back(cotangents)


@dataclasses.dataclass(frozen=True)
class _OthersCotangents:
    """Cotangents of what a step reads at kept blocks: own and others change places."""

    step: Step
    num_own: int

    def __call__(self, own: Arrays, others: Arrays, pairs: Array) -> Arrays:
        own, others = _as_float32(own), _as_float32(others)
        rows, cotangents = others[: self.num_own], others[self.num_own :]
        pairs = pairs.swapaxes(1, 2)
        _, pull_back = jax.vjp(lambda *own: self.step(rows, own, pairs), *own)
        return pull_back(cotangents)


def _as_float32(arrays: Arrays) -> Arrays:
    return tuple(x.astype(jnp.float32) for x in arrays)


def dot(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    """Multiplies in the dtype of a and b and adds in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
