"""Images that a caller gives to a pipeline, checked."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Overshoot of an earlier resize is no reason to refuse an image.
_MOST = 1.5


def as_images(
    images: Float[Array | np.ndarray, "..."],
) -> Float[Array, "B height width 3"]:
    """Returns a batch in float32 of one or more images.

    Raises:
      ValueError: They are not colour images, or not in [-1, 1].
    """
    given = jnp.asarray(images)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(
            f"image has dtype {given.dtype}; expected floating-point numbers in [-1, 1]"
        )
    batch = given.astype(jnp.float32)
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] != 3 or 0 in batch.shape:
        raise ValueError(
            f"image has shape {given.shape}; expected [height, width, 3] or [batch, "
            "height, width, 3], none of them 0"
        )
    most = float(jnp.abs(batch).max())
    if not most <= _MOST:
        raise ValueError(f"image has values up to {most:g}; expected [-1, 1]")
    return batch
