"""A look at self-attention at one step of a generation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from draft_jax import (
    AttentionPlan,
    BlockMask,
    DraftConfig,
    DraftStep,
    VideoGrid,
    compute_mask,
    draft_scores,
)
from models.diffusion.interfaces import ImageCondition, Images, VideoModel
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import StepReport, StopGeneration
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import MAX_TIMESTEP
from models.float8.product import compiler_options
from pallas_kernels.common import valid_tokens

TOP_SHARE = 0.1  # of block pairs, in `AttentionView.top_mass`


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """Every layer and head of the prompt's own pass (not the negative prompt's).

    Masses are those of full attention, summed between blocks; pairs with text are
    always kept and count as such. Padded text takes no part.

    Attributes:
      draft_maps: Softmax probabilities between tiles.
      masks: Tile pairs that the configuration keeps at this step.
      top_mass: Share of the true softmax mass in the strongest 10 % of tile pairs and
        in the pairs with text.
      kept_mass: Share of the true softmax mass in the kept pairs.
      text_share: Share of each tile's mass that lies on the text; 0 without text.
      text_masses: Mass of each text block on every block of the sequence.
      grid: Geometry of the tokens; says which of them a tile holds.
      estimate: The clean latents as the prompt's own pass predicts them at this step.
      timestep: Timestep of the step that was looked at.
      is_dense: Whether the schedule runs each layer dense at this step, so that its
        mask would not be used.
    """

    draft_maps: Float[np.ndarray, "layers N S S"]
    masks: Bool[np.ndarray, "layers N S S"]
    top_mass: Float[np.ndarray, "layers N"]
    kept_mass: Float[np.ndarray, "layers N"]
    text_share: Float[np.ndarray, "layers N S"]
    text_masses: Float[np.ndarray, "layers N X R"]
    grid: VideoGrid
    estimate: Float[np.ndarray, "F H W C"]
    timestep: float
    is_dense: Bool[np.ndarray, " layers"]


def inspect_attention(
    pipeline: VideoPipeline,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    step: int,
    image: Images | ImageCondition | None = None,
    attention: AttentionPlan | None = None,
    callback: Callable[[StepReport], None] | None = None,
) -> AttentionView:
    """Generates up to a step and looks at the attention there.

    Args:
      pipeline: Model, text encoder and codec.
      prompt: One prompt.
      sampling: Settings of the run; the pipeline's by default.
      step: Step to look at, 0 to num_steps - 1.
      image: As in `VideoPipeline.generate`.
      attention: Draft attention, with defaults if None; its schedule rules the
        steps before this one.
      callback: Called after each step.

    Returns:
      Draft maps, masks and how much of the true attention they cover.

    Raises:
      ValueError: As `VideoPipeline.generate`; or there is no such step, or attention
        is dense, which has no masks.
      StopGeneration: The callback raised it.
    """
    sampling = pipeline.sampling if sampling is None else sampling
    if attention is None:
        attention = AttentionPlan.draft(DraftConfig())
    if attention.config is None:
        raise ValueError(
            "attention=AttentionPlan.dense() has no masks to look at; pass "
            "AttentionPlan.draft(config, schedule)"
        )
    if not 0 <= step < sampling.num_steps:
        raise ValueError(f"{step=} must be in 0 .. {sampling.num_steps - 1}")
    sampler, state, inputs = pipeline.start(
        prompt, sampling, image=image, attention=attention
    )
    if step:
        programs, _ = pipeline.compile(sampler, state, inputs)
        state, reports = sampler.run_steps(programs, state, inputs, step, callback)
        if len(reports) < step:
            raise StopGeneration
    step_plan, timestep = sampler.step_plan(step), sampler.solver.timesteps[step]
    model = sampler.model_at(step)
    grid = model.grid(sampler.latent_shape)
    assert step_plan is not None  # attention is not dense
    look = functools.partial(
        _look,
        budget=step_plan.budget,
        text_lengths=inputs.context.lengths[:1] if grid.text_length else None,
        grid=grid,
        draft=attention.config,
    )
    rows = model.step_inputs(
        state.latents,
        timestep,
        inputs.context,
        inputs.image,
        inputs.embedded_guidance,
    )
    velocity, fields = _look_at_layers(
        model, look, rows, attention=attention, step=step_plan, masks=state.masks
    )
    return AttentionView(
        **{name: np.asarray(value[:, 0]) for name, value in fields.items()},
        grid=grid,
        estimate=np.asarray(state.latents[0] - timestep / MAX_TIMESTEP * velocity[0]),
        timestep=float(timestep),
        is_dense=np.asarray(step_plan.dense),
    )


def _look_at_layers(
    model: VideoModel,
    look: Callable[[Array, Array], dict[str, Array]],
    rows: Any,
    *,
    attention: AttentionPlan,
    step: DraftStep,
    masks: BlockMask | None,
) -> tuple[Array, dict[str, Array]]:
    """Returns what `map_qk` does, by a program that suits the weights."""
    structure, parameters = nnx.split(model)

    def call(parameters, rows, masks):
        looked_at: Any = nnx.merge(structure, parameters)
        return looked_at.map_qk(look, rows, attention=attention, step=step, masks=masks)

    jitted = jax.jit(call, compiler_options=compiler_options(parameters))
    return jitted(parameters, rows, masks)


def _look(
    q: Float[Array, "rows T N D"],
    k: Float[Array, "rows T N D"],
    *,
    budget: Int[Array | np.ndarray, ""],
    text_lengths: Int[Array, " B"] | None,
    grid: VideoGrid,
    draft: DraftConfig,
) -> dict[str, Array]:
    """Returns draft maps, masks and masses of one layer; each with a batch axis."""
    q, k = q[:1], k[:1]  # item 0 is the prompt
    scores = draft_scores(q, k, grid=grid, config=draft, order="tiled")
    mask = compute_mask(
        q, k, grid=grid, config=draft, budget=budget, order="tiled"
    ).to_dense()
    masses = block_masses(q, k, grid, text_lengths)
    visual, text = grid.visual_blocks, grid.text_blocks
    return {
        "draft_maps": scores,
        "masks": mask[:, :, visual, visual],
        **mass_shares(masses, mask, grid),
        "text_masses": masses[:, :, text],
    }


def mass_shares(
    masses: Float[Array, "B N R R"], mask: Bool[Array, "B N R R"], grid: VideoGrid
) -> dict[str, Array]:
    """Returns `top_mass`, `kept_mass` and `text_share` of an `AttentionView`.

    Args:
      masses: Masses between blocks, as `block_masses` returns them.
      mask: Kept pairs of blocks, those with text among them.
      grid: Geometry of the blocks.

    Returns:
      Two shares of each head, [B, N], and one of each tile, [B, N, S].
    """
    visual, text = grid.visual_blocks, grid.text_blocks
    between_tiles = masses[:, :, visual, visual]
    flat = jnp.sort(between_tiles.reshape(*masses.shape[:2], -1), axis=-1)
    num_top = max(1, round(TOP_SHARE * flat.shape[-1]))
    total = masses.sum((-1, -2))
    with_text = total - between_tiles.sum((-1, -2)) if grid.text_length else 0.0
    of_tiles = masses[:, :, visual]
    return {
        "top_mass": (flat[..., -num_top:].sum(-1) + with_text) / total,
        "kept_mass": jnp.where(mask, masses, 0.0).sum((-1, -2)) / total,
        "text_share": of_tiles[..., text].sum(-1) / of_tiles.sum(-1),
    }


def block_masses(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    grid: VideoGrid,
    text_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B N R R"]:
    """Sums the softmax mass of full attention between the blocks of the sequence.

    Args:
      q: Queries in tiled order, with the grid's text.
      k: Keys like q.
      grid: Geometry of the tokens; says which of them a block holds.
      text_lengths: Valid text tokens of each item. The rest is padding: no query sees
        it, and its own rows are not counted. None means all are valid.

    Returns:
      float32; row r sums to the number of valid tokens of block r. One head's T x T
      map exists at a time.
    """
    batch, _, num_heads, head_dim = q.shape
    block_of_token = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    if text_lengths is None:
        text_lengths = jnp.full(batch, grid.text_length, jnp.int32)
    is_valid = jnp.repeat(valid_tokens(grid, text_lengths), num_heads, axis=0)

    def sum_by_block(x):
        return jax.ops.segment_sum(x, block_of_token, num_segments=grid.num_blocks)

    def one_head(arrays):
        q, k, is_valid = arrays
        q, k = (x.astype(jnp.float32) for x in (q, k))
        logits = jnp.where(is_valid, q @ k.T / np.sqrt(head_dim), -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        probabilities = jnp.where(is_valid[:, None], probabilities, 0.0)
        return sum_by_block(sum_by_block(probabilities.T).T)

    flat = (rearrange(part, "B T N D -> (B N) T D") for part in (q, k))
    masses = jax.lax.map(one_head, (*flat, is_valid))
    return rearrange(masses, "(B N) rows columns -> B N rows columns", B=batch)
