"""A look at self-attention at one step of a generation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from draft_jax import (
    AttentionPlan,
    DraftConfig,
    VideoGrid,
    compute_mask,
    draft_scores,
)
from models.diffusion.interfaces import ImageCondition, Images
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import StepReport
from models.diffusion.sampling import Sampling

TOP_SHARE = 0.1  # of block pairs, in `AttentionView.top_mass`


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """Every layer and head of the prompt's own pass (not the negative prompt's).

    Attributes:
      draft_maps: Softmax probabilities between tiles.
      masks: Tile pairs that the configuration keeps at this step.
      top_mass: Share of the true softmax mass in the strongest 10 % of tile pairs,
        for the masses between tiles summed from full attention.
      kept_mass: Share of the true softmax mass in the kept pairs.
      grid: Geometry of the tokens; says which of them a tile holds.
      timestep: Timestep of the step that was looked at.
      is_dense: Whether the schedule runs each layer dense at this step, so that its
        mask would not be used.
    """

    draft_maps: Float[np.ndarray, "layers N S S"]
    masks: Bool[np.ndarray, "layers N S S"]
    top_mass: Float[np.ndarray, "layers N"]
    kept_mass: Float[np.ndarray, "layers N"]
    grid: VideoGrid
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
        state, _ = sampler.run_steps(programs, state, inputs, step, callback)
    step_plan, timestep = sampler.step_plan(step), sampler.solver.timesteps[step]
    model = sampler.model
    captured = model.capture_qk(
        model.step_inputs(
            state.latents,
            timestep,
            inputs.context,
            inputs.image,
            inputs.embedded_guidance,
        ),
        attention=attention,
        step=step_plan,
        masks=state.masks,
    )
    grid = model.grid(sampler.latent_shape)
    q, k = (part[:, :1] for part in captured)  # item 0 is the prompt
    assert step_plan is not None  # attention is not dense
    fields = _look_at_layers(q, k, step_plan.budget, grid=grid, draft=attention.config)
    return AttentionView(
        **{name: np.asarray(value[:, 0]) for name, value in fields.items()},
        grid=grid,
        timestep=float(timestep),
        is_dense=np.asarray(step_plan.dense),
    )


@functools.partial(jax.jit, static_argnames=("grid", "draft"))
def _look_at_layers(q, k, budget, *, grid: VideoGrid, draft: DraftConfig):
    look = functools.partial(_look, budget=budget, grid=grid, draft=draft)
    return jax.lax.map(look, (q, k))


def _look(
    q_and_k: tuple[Float[Array, "B T N D"], Float[Array, "B T N D"]],
    *,
    budget: Int[Array | np.ndarray, ""],
    grid: VideoGrid,
    draft: DraftConfig,
) -> dict[str, Array]:
    """Returns draft maps, masks and masses of one layer; each with a batch axis."""
    q, k = q_and_k
    scores = draft_scores(q, k, grid=grid, config=draft, order="tiled")
    mask = compute_mask(
        q, k, grid=grid, config=draft, budget=budget, order="tiled"
    ).to_dense()
    visual = grid.visual_blocks
    mask = mask[:, :, visual, visual]
    masses = block_masses(q, k, grid)
    flat = jnp.sort(masses.reshape(*masses.shape[:2], -1), axis=-1)
    num_top = max(1, round(TOP_SHARE * flat.shape[-1]))
    total = masses.sum((-1, -2))
    top_mass = flat[..., -num_top:].sum(-1) / total
    kept_mass = jnp.where(mask, masses, 0.0).sum((-1, -2)) / total
    return {
        "draft_maps": scores,
        "masks": mask,
        "top_mass": top_mass,
        "kept_mass": kept_mass,
    }


def block_masses(
    q: Float[Array, "B T N D"], k: Float[Array, "B T N D"], grid: VideoGrid
) -> Float[Array, "B N S S"]:
    """Sums the softmax mass of full attention between the tiles over their tokens.

    Args:
      q: Queries in tiled order, without text.
      k: Keys like q.
      grid: Geometry of the tokens; says which of them a tile holds.

    Returns:
      float32; row r sums to the number of tokens of tile r. One head's T x T map
      exists at a time.

    Raises:
      ValueError: The grid has text.
    """
    if grid.text_length:
        raise ValueError(f"{grid.text_length=} must be 0: only visual tokens are seen")
    tile_of_token = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)

    def one_head(q_and_k):
        q, k = (part.astype(jnp.float32) for part in q_and_k)
        probabilities = jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1]), axis=-1)
        by_key = jax.ops.segment_sum(
            probabilities.T, tile_of_token, num_segments=grid.num_blocks
        )
        return jax.ops.segment_sum(
            by_key.T, tile_of_token, num_segments=grid.num_blocks
        )

    flat = (rearrange(part, "B T N D -> (B N) T D") for part in (q, k))
    masses = jax.lax.map(one_head, tuple(flat))
    return rearrange(masses, "(B N) rows columns -> B N rows columns", B=len(q))
