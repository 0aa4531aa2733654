"""Arrays that callers hand in: jax's and NumPy's."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

# What public functions take and `to_jax` converts. A type checker would want another
# name for the converted array.
if TYPE_CHECKING:
    type AnyArray = Any
else:
    AnyArray = jax.Array | np.ndarray

# A factor on the logits: a number, which programs hold as a constant, or a scalar.
Scale = float | np.floating | Float[AnyArray, ""]


def to_jax(*arrays: Any) -> tuple[Any, ...]:
    """Returns NumPy's arrays as jax's: once, not in each program that reads them.

    Like in functions of jax, float64 becomes float32 unless `jax_enable_x64` is set.
    Other values are returned as they are, for checks to judge.
    """
    return tuple(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays)
