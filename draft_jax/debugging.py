"""Checks for debugging a model: what an operation cannot see by itself."""

import jax
import numpy as np
from jaxtyping import Array, Float


def check_finite(**arrays: Float[Array | np.ndarray, "..."]) -> None:
    """Raises if an array holds NaN or infinity, and says where the first one is.

    It waits for the arrays, so it is for debugging, and it works outside jit only.

    Args:
      **arrays: Arrays by the names that messages give them.

    Raises:
      ValueError: A value is not finite, or an array is traced.

    Example:

        check_finite(q=q, k=k, v=v)
    """
    for name, array in arrays.items():
        if isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"check_finite cannot look into traced {name}: call outside jit, "
                'or use jax.config.update("jax_debug_nans", True)'
            )
        bad = np.argwhere(~np.isfinite(np.asarray(array, np.float32)))
        if len(bad):
            where = ", ".join(str(index) for index in bad[0])
            raise ValueError(
                f"{name}[{where}] is {array[tuple(bad[0])]}, the first of {len(bad)} "
                f"values of {name} that are not finite; all must be"
            )
