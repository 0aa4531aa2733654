"""Values that a program is compiled for: static arguments of jit."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

# Compiles a function once for each shape and each value of its static arguments. A
# public function hands its work to a function of a module that this wraps: a loop body
# made anew in every call outside jit would be compiled in every call, and kept. Under
# an outer jit nothing is changed.
jit_once = functools.partial(jax.jit, inline=True)


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


def split_scale(scale: Any) -> tuple[float | None, jax.Array | None]:
    """Returns a scale that is known, for a static argument, and one that is an array.

    One of the two is None, or both are. A known one is folded into programs.
    """
    if scale is None or isinstance(scale, (int, float)):
        return scale, None
    return None, scale
