"""The UMT5 encoder.

Layers share one traced block; see `models.diffusion.transformer.block_stack`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.diffusion.transformer.block_stack import scan_blocks, stack_blocks
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
        self.blocks = stack_blocks(
            lambda rngs: UMT5Block(config, rngs=rngs), config.num_layers, rngs
        )
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
        x = self.token_embedding(ids).astype(jnp.float32)
        x = scan_blocks(self.blocks, x, buckets, lengths)
        inside = jnp.arange(num_tokens) < lengths[:, None]
        return jnp.where(inside[..., None], self.norm(x), 0.0)
