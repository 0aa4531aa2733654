"""The tokens of a video on several devices, within `jax.shard_map`.

Outside attention each device has a part of the tokens and all heads; in attention all
tokens and a part of the heads. An all-to-all leads from one to the other, and another
back (DeepSpeed-Ulysses, arXiv 2309.14509). Text is whole on each device.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.common import register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenShards:
    """The part of a device: neighbouring tokens in tiled order, as many on each.

    The tokens of the last device may end with padding, which no other token sees.

    Attributes:
      axis: Name of the mesh axis.
      count: Devices along it.
      num_tokens: Visual tokens of the whole sequence, without padding.
    """

    axis: str
    count: int
    num_tokens: int

    @property
    def local_tokens(self) -> int:
        """Visual tokens of one device, padding included."""
        return -(-self.num_tokens // self.count)

    @property
    def padded_tokens(self) -> int:
        """Visual tokens of all devices, padding included."""
        return self.local_tokens * self.count

    def own(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """Returns a device's part of the tokens of an array that it has whole."""
        return self._own_part(self._pad(x, axis), axis)

    def gather(self, x: Shaped[Array, "B t C"]) -> Shaped[Array, "B T C"]:
        """Returns the tokens of all devices; for narrow arrays."""
        x = jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return x[:, : self.num_tokens]

    def to_heads(self, x: Shaped[Array, "B t N D"]) -> Shaped[Array, "B T n D"]:
        """Returns all tokens of a device's heads, from its tokens of all heads."""
        batch, tokens, num_heads, dim = x.shape
        x = x.reshape(batch, tokens, self.count, num_heads // self.count, dim)
        # What goes to one device lies together: libraries send nothing else.
        x = self._exchange(jnp.moveaxis(x, 2, 0))
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, self.padded_tokens, -1, dim)[:, : self.num_tokens]

    def to_tokens(self, x: Shaped[Array, "B T n D"]) -> Shaped[Array, "B t N D"]:
        """Returns all heads of a device's tokens, from its heads of all tokens."""
        x = self._pad(x, 1)
        batch, _, heads, dim = x.shape
        x = x.reshape(batch, self.count, self.local_tokens, heads, dim)
        x = self._exchange(jnp.moveaxis(x, 1, 0))
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(batch, self.local_tokens, -1, dim)

    def own_heads(self, text: Shaped[Array, "B L N D"]) -> Shaped[Array, "B L n D"]:
        """Returns a device's heads of text, which it has whole."""
        return self._own_part(text, 2)

    def own_channels(self, factors: Shaped[Array, " C"]) -> Shaped[Array, " c"]:
        """Returns the factors of the channels of a device's heads."""
        return self._own_part(factors, 0)

    def all_heads(self, text: Shaped[Array, "B L n D"]) -> Shaped[Array, "B L N D"]:
        """Returns all heads of text, or of what is as short."""
        return jax.lax.all_gather(text, self.axis, axis=2, tiled=True)

    def _own_part(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        size = x.shape[axis] // self.count
        start = jax.lax.axis_index(self.axis) * size
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    def _exchange(
        self, x: Shaped[Array, "devices ..."]
    ) -> Shaped[Array, "devices ..."]:
        """Sends part i to device i, and returns what came from each."""
        return jax.lax.all_to_all(x, self.axis, split_axis=0, concat_axis=0, tiled=True)

    def _pad(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        missing = self.padded_tokens - self.num_tokens
        if not missing:
            return x
        widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)
