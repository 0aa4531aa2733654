"""Arithmetic of a step of a Wan transformer."""

from models.wan.config import WanConfig


def flops_outside_attention(config: WanConfig, num_tokens: int) -> dict[str, float]:
    """Arithmetic of one model call on one item, without self-attention's products.

    Matrix products only, two operations for each multiplication and addition: norms,
    gates and rotations do not count, nor the time embedding, which has one row.

    Args:
      config: Sizes of a text-to-video model.
      num_tokens: Video tokens.

    Returns:
      By part; their sum is the whole.
    """
    dim, text = config.dim, config.text_length
    patch = dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    layers = config.num_layers
    return {
        "self-attention's projections": layers * 8.0 * num_tokens * dim**2,
        "cross-attention's projections": layers
        * (4.0 * num_tokens * dim**2 + 4.0 * text * dim**2),
        "cross-attention": layers * 4.0 * num_tokens * text * dim,
        "feed-forward": layers * 4.0 * num_tokens * dim * config.ffn_dim,
        "patches, head and text": 2.0
        * (
            num_tokens * patch * (config.in_channels + config.out_channels)
            + text * dim * (config.text_dim + dim)
        ),
    }
