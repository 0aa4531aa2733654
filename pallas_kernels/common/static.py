"""Values that a program is compiled for: static arguments of jit."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles a function once for each shape and each value of its static arguments.

    A public function hands its work to a function of a module that this wraps: a loop
    body made anew in every call outside jit would be compiled in every call, and kept.
    Under an outer jit the function becomes part of that program.

    It is traced under jax's defaults of promotion. Settings that forbid promotion look
    for faults in a user's own lines.

    Args:
      function: Computes on arrays. A function of a module, not one made in a call.
      **options: Those of `jax.jit`.

    Returns:
      The function as jit makes it.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with default_promotion():
            return function(*args, **kwargs)

    return jax.jit(traced, inline=True, **options)


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Traces under jax's defaults of promotion, whatever the user has set."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class StaticArray:
    """A NumPy array that is equal to, and hashes like, others of the same contents.

    Attributes:
      values: The array. It must not be written to.
    """

    values: np.ndarray

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.values.shape, self.values.dtype.str, self.values.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticArray) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def fold_scale(q: Any, scale: Any) -> tuple[Any, float]:
    """Multiplies q by a scale that is no constant, for kernels that take one.

    The product is rounded to q's dtype: with bfloat16, logits have a relative error of
    2^-9 that a constant scale does not have. A power of two is exact.
    """
    if isinstance(scale, float):
        return q, scale
    return (q.astype(jnp.float32) * scale).astype(q.dtype), 1.0


def split_scale(scale: Any) -> tuple[float | None, jax.Array | None]:
    """Returns a scale that is known, for a static argument, and one that is an array.

    One of the two is None, or both are. A known one is folded into programs.
    """
    if scale is None or isinstance(scale, (int, float)):
        return scale, None
    return None, scale
