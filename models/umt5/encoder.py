"""The UMT5 encoder.

Layers share one traced block: their parameters are stacked along a leading layer axis
and scanned. So the program and its compile time do not grow with depth.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.umt5.config import UMT5Config
from models.umt5.layers import UMT5Block, relative_position_buckets, rms_norm


class UMT5Encoder(nnx.Module):
    """Turns token ids into one vector for each token.

    Source: Wan2.1 `T5Encoder` and transformers `UMT5EncoderModel`.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs) -> None:
        """Builds the encoder with random parameters.

        Args:
          config: Sizes and dtypes.
          rngs: Source of the initial parameters, stream `params`.
        """
        self.config = config
        # Rows are looked up in the table's own dtype: a cast would copy the table.
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.dim,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.blocks = _stack_blocks(config, rngs)
        self.norm = rms_norm(config, rngs)

    def __call__(
        self, ids: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B T E"]:
        """Runs the encoder.

        Args:
          ids: Tokens, 0 <= id < `config.vocab_size`; one outside gives NaN.
          lengths: Tokens of each item, 1 to T. Later ones are padding, which no
            token attends to, so neither their ids nor their count matter.

        Returns:
          float32; rows past an item's length are zero.

        Raises:
          ValueError: `ids` and `lengths` do not fit each other.
        """
        if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
            raise ValueError(
                f"ids of shape {ids.shape} and lengths of shape {lengths.shape} must "
                "be [batch, tokens] and [batch]"
            )
        config = self.config
        num_tokens = ids.shape[1]
        buckets = jnp.asarray(
            relative_position_buckets(
                num_tokens, config.num_buckets, config.max_distance
            )
        )
        structure, parameters = nnx.split(self.blocks)

        def run_block(x, layer_parameters):
            block = nnx.merge(structure, layer_parameters)
            return block(x, buckets, lengths), None

        x = self.token_embedding(ids).astype(jnp.float32)
        x, _ = jax.lax.scan(run_block, x, parameters)
        inside = jnp.arange(num_tokens) < lengths[:, None]
        return jnp.where(inside[..., None], self.norm(x), 0.0)


def _stack_blocks(config: UMT5Config, rngs: nnx.Rngs) -> UMT5Block:
    """Makes one block module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> UMT5Block:
        return UMT5Block(config, rngs=rngs)

    return make(rngs)
