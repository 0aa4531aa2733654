"""Number formats that suit a device."""

from typing import Literal, get_args

import jax

from models.float8.product import has_fast_float8, why_no_float8
from pallas_kernels.common import current_device, warn_once

# Precision of a transformer's linear layers as one asks for it; "auto" takes FP8 where
# the device is faster with it.
Linears = Literal["bfloat16", "float8", "auto"]


class SlowLinearsWarning(UserWarning):
    """`linears="auto"` found no fast FP8, and another precision was taken."""


def default_dtype(device: jax.Device | None = None) -> str:
    """Returns the faster dtype to compute in on a device, the default one if None.

    Without bfloat16 instructions, a CPU runs three full-size layers two to three
    times faster in float32 (measured); weights are widened one layer at a time.
    """
    platform = jax.default_backend() if device is None else device.platform
    return "float32" if platform == "cpu" else "bfloat16"


def choose_linears(linears: Linears) -> str:
    """Returns the precision of linear layers that the default device gets.

    Args:
      linears: The wish. On a CPU, "float8" is a slow reference.

    Returns:
      "bfloat16", which stands for the dtype of the model, or "float8". Where "auto"
      finds no fast FP8, it warns once.

    Raises:
      ValueError: There is no such precision, or the device has no products in FP8.
    """
    if linears not in get_args(Linears):
        raise ValueError(f"{linears=} must be one of {get_args(Linears)}")
    if linears == "bfloat16":
        return linears
    device = current_device()
    reason = why_no_float8(device)
    if linears == "float8":
        if reason is not None:
            raise ValueError(f"{linears=}: {reason}; expected 'bfloat16' or 'auto'")
        return linears
    if has_fast_float8(device):
        return "float8"
    reason = reason or "a CPU multiplies FP8 slower than float32"
    warn_once(
        f"linears='auto' takes {default_dtype()}, not FP8: {reason}",
        SlowLinearsWarning,
    )
    return "bfloat16"
