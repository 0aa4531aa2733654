"""Embeddings at the entrance of a diffusion transformer: patches and timesteps."""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from draft_jax import VideoGrid
from models.diffusion.transformer.layers import XAVIER_UNIFORM
from pallas_kernels.common import reorder_tokens


class PatchEmbedding(nnx.Module):
    """Cuts the latent into patches and maps each to a token: a strided convolution."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        patch_size: tuple[int, int, int],
        dtype: str,
        param_dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (*patch_size, in_channels, dim)
        fan_in = math.prod(shape[:-1])
        kernel = XAVIER_UNIFORM(rngs.params(), (fan_in, dim), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(shape).astype(param_dtype))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.dtype(param_dtype)))
        self.patch_size = patch_size
        self.dtype = dtype

    def __call__(
        self, latents: Float[Array, "B F H W C"], grid: VideoGrid
    ) -> Float[Array, "B T E"]:
        """Returns tokens in tiled order, in `dtype`.

        Args:
          latents: The latents.
          grid: Their tokens, without text.
        """
        return self.project(self.patches(latents, grid))

    def patches(
        self, latents: Float[Array, "B F H W C"], grid: VideoGrid
    ) -> Float[Array, "B T values"]:
        """Returns patches in tiled order, in `dtype`, each as one vector."""
        frames, rows, columns = self.patch_size
        patches = rearrange(
            latents,
            "B (F frames) (H rows) (W columns) C -> B (F H W) (frames rows columns C)",
            frames=frames,
            rows=rows,
            columns=columns,
        ).astype(self.dtype)
        # A token depends on its patch alone, so the narrower patches are permuted.
        return reorder_tokens(patches, grid, to="tiled", axis=1)

    def project(self, patches: Float[Array, "B T values"]) -> Float[Array, "B T E"]:
        """Returns the tokens of patches."""
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(patches.shape[-1], -1)
        return patches @ kernel + self.bias[...].astype(self.dtype)


def timestep_embedding(
    timesteps: Float[Array, " B"], size: int
) -> Float[Array, "B size"]:
    """Returns cosines, then sines, of the timestep at geometric frequencies; float32.

    Angles are rounded where diffusers rounds them: the exponent, its exponential and
    the angle, each to the nearest float32. Wan's own code takes float64 throughout. At
    t = 1000 the two differ by up to 6e-5, a sixtieth of a rounding of bfloat16.

    Source: diffusers `get_timestep_embedding`; Wan2.1 `sinusoidal_embedding_1d`.
    """
    angles = timesteps.astype(jnp.float32)[:, None] * _frequencies(size // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _frequencies(count: int) -> np.ndarray:
    exponents = np.float32(-math.log(10000.0)) * np.arange(count, dtype=np.float32)
    exponents /= np.float32(count)
    # NumPy's float32 exponential misses the nearest number for half the frequencies.
    return np.exp(exponents.astype(np.float64)).astype(np.float32)
