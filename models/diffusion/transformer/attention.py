"""Self-attention of one layer of a video model, dense or by a draft."""

from jaxtyping import Array, Float, Int

from draft_jax import (
    BlockMask,
    DraftConfig,
    DraftStep,
    PooledTokens,
    VideoGrid,
    scheduled_attention,
)
from pallas_kernels import dense_attention


def self_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    grid: VideoGrid,
    draft: DraftConfig | None,
    step: DraftStep | None,
    mask: BlockMask | None,
    pooled: PooledTokens | None,
    text_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T N D"], BlockMask | None]:
    """Attends within one sequence of video, and of text where the grid has it.

    Args:
      q: Queries, visual tokens in tiled order.
      k: Keys, like q.
      v: Values, like q.
      grid: Geometry of the sequence.
      draft: Options of draft attention; None is dense attention.
      step: This layer's part of the schedule (`dense` is a scalar); None with dense
        attention.
      mask: The layer's mask from the step before; None with a None step.
      pooled: Pooled q and k, where they are known.
      text_lengths: Valid text tokens of each item; None means all. No token attends to
        later ones, and the outputs of these are zero.

    Returns:
      The output, like q, and the mask in use.
    """
    if draft is None:
        out = dense_attention(q, k, v, grid=grid, text_lengths=text_lengths)
        return out, mask
    assert step is not None, "prepare_layer_state makes one"
    return scheduled_attention(
        q,
        k,
        v,
        grid=grid,
        config=draft,
        step=step,
        mask=mask,
        text_lengths=text_lengths,
        order="tiled",
        pooled=pooled,
    )
