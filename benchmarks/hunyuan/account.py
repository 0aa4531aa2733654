"""Arithmetic of a step of a HunyuanVideo transformer."""

from models.hunyuan.config import HunyuanConfig


def flops_outside_attention(
    config: HunyuanConfig, num_video_tokens: int
) -> dict[str, float]:
    """Arithmetic of one call on one item, without self-attention's products.

    Matrix products only, two operations for each multiplication and addition: norms,
    gates and rotations do not count.

    Args:
      config: Sizes of the model.
      num_video_tokens: Tokens of the video; text has `config.text_length`.

    Returns:
      By part; their sum is the whole.
    """
    dim, hidden, text = config.dim, config.mlp_dim, config.text_length
    tokens = num_video_tokens + text
    double, single = config.num_double_blocks, config.num_single_blocks
    patch = dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    return {
        "double blocks": double * tokens * (8.0 * dim**2 + 4.0 * dim * hidden),
        # linear1 makes q, k, v and the hidden layer, linear2 takes it and attention.
        "single blocks": single * tokens * (8.0 * dim**2 + 4.0 * dim * hidden),
        "refiner": _refiner(config),
        "patches and head": 2.0
        * num_video_tokens
        * patch
        * (config.in_channels + config.out_channels),
        "modulation": _modulation(config),
    }


def _refiner(config: HunyuanConfig) -> float:
    """Of the text's own layers and what they are told of the time."""
    dim, text = config.dim, config.text_length
    hidden = 4 * dim  # whatever the blocks have
    block = (
        text * (8.0 * dim**2 + 4.0 * dim * hidden)  # projections, feed-forward
        + 4.0 * text**2 * dim  # attention
        + 2.0 * dim * 2 * dim  # two gates
    )
    embedded = 2.0 * text * config.text_dim * dim
    conditions = 2.0 * dim * (config.freq_dim + config.text_dim + 2 * dim)
    return config.num_refiner_blocks * block + embedded + conditions


def _modulation(config: HunyuanConfig) -> float:
    """Of the vector of time, pooled text and guidance, and of what blocks make of it.

    It is one row: two streams of six vectors, one of three, and two in the end.
    """
    dim = config.dim
    embedded = config.freq_dim * (2 if config.guidance_embeds else 1)
    second = dim * (3 if config.guidance_embeds else 2)
    vectors = 12 * config.num_double_blocks + 3 * config.num_single_blocks + 2
    return 2.0 * dim * (embedded + config.pooled_dim + second + vectors * dim)
