"""The changes that adapters make to a weight, computed in float32.

    W + factor * up @ down                    LoRA, with a core between them: LoCon
    W + factor * kron(first, second)          LoKr
    W + factor * first * second               LoHa, entry by entry
    W + strength * (D - W)                    DoRA, where

    D = magnitude * V / norm(V),  V = W + the changes above at their full factors,

and the norm is one for each row of the [out, in] weight, or one for each column,
as `magnitude` has them. So a strength of 0 leaves any weight as it is, and 1 is
what was trained; between the two DoRA is interpolated, as ComfyUI does.

Source: LoRA, arXiv 2106.09685; LoKr and LoHa, LyCORIS, arXiv 2309.14859 (its modules
`locon`, `lokr`, `loha`); DoRA, arXiv 2402.09353, equation 5, of which PEFT has rows
(`lora_magnitude_vector`) and LyCORIS both (`dora_scale`, `wd_on_out`).
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

type Combination = Literal["alone", "kronecker", "hadamard"]


class Factors(NamedTuple):
    """A matrix, whole or in factors.

    Attributes:
      left: The matrix itself; or its left factor.
      right: Its right factor; None if `left` is the whole.
      core: Tucker's core between the two, [rank, rank, *kernel]; None without. The
        factors of LoKr and LoHa are [rank, out] and [rank, in] then; those of LoCon
        [out, rank] and [rank, in] as ever.
    """

    left: Any
    right: Any = None
    core: Any = None


class Sum(NamedTuple):
    """Adds a matrix, or the product of two."""

    factor: float
    matrices: tuple[Factors, ...]  # two, or one if alone
    combination: Combination = "alone"

    def apply(self, weight: jax.Array) -> jax.Array:
        """Returns the weight with the matrix added."""
        return _add(weight, self.matrices, self.factor, self.combination)

    def scaled(self, scale: float) -> "Sum":
        """Returns the sum at another strength."""
        return self._replace(factor=scale * self.factor)


class Rescaled(NamedTuple):
    """Changes a weight and gives its rows or columns trained lengths: DoRA."""

    changes: tuple[Sum, ...]
    magnitude: Any
    by_row: bool
    strength: float = 1.0

    def apply(self, weight: jax.Array) -> jax.Array:
        """Returns the weight on its way to the rescaled one."""
        changed = weight
        for change in self.changes:
            changed = change.apply(changed)
        magnitude = jnp.asarray(self.magnitude)
        return _rescale(weight, changed, magnitude, self.strength, self.by_row)

    def scaled(self, scale: float) -> "Rescaled":
        """Returns it at another strength; the changes within keep theirs."""
        return self._replace(strength=scale * self.strength)


type Change = Sum | Rescaled


@runtime_checkable
class Applicable(Protocol):
    """Changes a weight."""

    def apply(self, weight: jax.Array) -> jax.Array:
        """Returns the changed weight."""


class MergedArray:
    """A weight with its adapters, merged in float32 when it is read.

    Attributes:
      shape: Shape of the weight.
      dtype: float32, whatever the weight's is.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, weight: Any, changes: Sequence[Applicable]) -> None:
        self.shape = tuple(weight.shape)
        self._weight = weight
        self._changes = tuple(changes)

    def __jax_array__(self) -> jax.Array:
        merged = jnp.asarray(self._weight).astype(jnp.float32)
        for change in self._changes:
            merged = change.apply(merged)
        return merged

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.__jax_array__(), dtype)


def _add(
    weight: jax.Array,
    matrices: tuple[Factors, ...],
    factor: float,
    combination: Combination,
) -> jax.Array:
    arrays = jax.tree.map(jnp.asarray, matrices)
    return _add_arrays(weight, arrays, factor, combination)


@functools.partial(jax.jit, static_argnums=3)
def _add_arrays(
    weight: jax.Array,
    matrices: tuple[Factors, ...],
    factor: Any,
    combination: Combination,
) -> jax.Array:
    built = [_build(matrix, combination) for matrix in matrices]
    if combination == "kronecker":
        # Kernels are the last axes of the second matrix, so flat ones stay in order.
        first, second = (matrix.reshape(matrix.shape[0], -1) for matrix in built)
        change = first[:, None, :, None] * second[None, :, None, :]
    elif combination == "hadamard":
        change = built[0].reshape(weight.shape) * built[1].reshape(weight.shape)
    else:
        (change,) = built
    return weight + factor * change.reshape(weight.shape)


def _build(matrix: Factors, combination: Combination) -> jax.Array:
    """Returns a matrix of its factors; kernels stay where the factors have them."""
    left = matrix.left.astype(jnp.float32)
    if matrix.right is None:
        return left
    right = matrix.right.astype(jnp.float32)
    if matrix.core is None:
        # The second of two convolutions has size 1 in every direction.
        left, right = left.reshape(left.shape[:2]), right.reshape(right.shape[0], -1)
        return jnp.matmul(left, right, precision="highest")
    core = matrix.core.astype(jnp.float32)
    left, right = left.reshape(left.shape[:2]), right.reshape(right.shape[:2])
    if combination != "alone":
        left = left.T
    return jnp.einsum("pi,ij...,jr->pr...", left, core, right, precision="highest")


@functools.partial(jax.jit, static_argnums=4)
def _rescale(
    weight: jax.Array,
    changed: jax.Array,
    magnitude: jax.Array,
    strength: Any,
    by_row: bool,
) -> jax.Array:
    kept = 0 if by_row else 1
    others = tuple(axis for axis in range(weight.ndim) if axis != kept)
    norm = jnp.sqrt(jnp.sum(changed * changed, axis=others, keepdims=True))
    # Rows of zeros have no direction; they stay zeros.
    norm = jnp.maximum(norm, jnp.finfo(jnp.float32).eps)
    magnitude = magnitude.astype(jnp.float32).reshape(norm.shape)
    # At a strength of 1 the first product is 0, not a rounding error.
    return (1 - strength) * weight + strength * (changed * (magnitude / norm))
