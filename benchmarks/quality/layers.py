"""What methods do to single layers: error of the output, and mass that is kept.

Queries, keys and values are those of dense generations, so that all methods see the
same and no error of an earlier step or layer is in a figure. Padded text counts, too.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.quality.clips import Clips
from benchmarks.quality.methods import config_at, sparsity_of
from draft_jax import DraftConfig, VideoGrid, compute_mask, draft_scores, make_means
from draft_jax.config import static_budget
from models.diffusion.inspection import block_masses, mass_shares
from models.diffusion.pipeline import DENSE, VideoPipeline
from models.diffusion.sampling import Sampling
from pallas_kernels import block_sparse_attention, dense_attention

SHARES = tuple(np.linspace(0.02, 0.995, 40).round(4).tolist())  # of mass, for top_p


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A step of dense generations that is looked at.

    Attributes:
      step: Number of the step.
      call: Calls a function of every layer's q, k and v, and returns what it returns,
        stacked over layers. The first argument names it: it is compiled once for all
        steps.
    """

    step: int
    call: Callable[[str, Callable[[Array, Array, Array], Any]], Any]


def looks(
    pipeline: VideoPipeline, clips: Clips, sampling: Sampling, steps: Sequence[int]
) -> Iterator[Look]:
    """Runs dense steps and stops at those asked for.

    Args:
      pipeline: The model.
      clips: Prompts, sampled as one batch; negative prompts are not looked at.
      sampling: Settings of the videos.
      steps: Steps to look at.
    """
    places = range(len(clips.prompts))
    noise = clips.noise(places, pipeline.latent_shape(sampling), sampling.seed)
    sampler, state, inputs = pipeline.start(
        [prompt.text for prompt in clips.prompts], sampling, noise=noise
    )
    programs, _ = pipeline.compile(sampler, state, inputs)
    structure, parameters = nnx.split(sampler.model)
    context = jax.tree.map(lambda x: x[: len(clips.prompts)], inputs.context)
    compiled: dict[str, Callable] = {}
    for index in range(max(steps) + 1):
        if index in steps:
            rows = sampler.model.step_inputs(
                state.latents,
                sampler.solver.timesteps[index],
                context,
                inputs.image,
                inputs.embedded_guidance,
            )

            def call(name, function, rows=rows):
                def run(parameters, rows):
                    model: Any = nnx.merge(structure, parameters)
                    return model.map_qkv(
                        function, rows, attention=DENSE, step=None, masks=None
                    )[1]

                if name not in compiled:
                    compiled[name] = jax.jit(run)
                return compiled[name](parameters, rows)

            yield Look(step=index, call=call)
        state, _ = sampler.run_step(programs, state, inputs, index)


def measure_method(
    look: Look,
    name: str,
    densities: Sequence[float],
    *,
    grid: VideoGrid,
    top_p: Mapping[str, float],
    map_density: float,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Measures a method in every layer.

    Args:
      look: The step.
      name: A key of `METHODS`.
      densities: Shares of block pairs to keep.
      grid: Geometry of the sequence.
      top_p: See `methods.config_at`.
      map_density: Density whose masks are returned.

    Returns:
      One record for each density: of each layer the mean over clips, and of each clip
      the mean over layers. And the kept pairs of the first clip and head,
      [layers, S, S].
    """
    configs = {
        density: config_at(name, density, densities=densities, top_p=top_p)
        for density in densities
    }
    # Densities that share a configuration are looped over inside one program.
    groups: dict[DraftConfig, list[float]] = {}
    for density, config in configs.items():
        groups.setdefault(config, []).append(density)

    def look_at_layer(q, k, v):
        return [
            jax.lax.map(
                functools.partial(_layer_errors, q, k, v, grid=grid, config=config),
                jnp.asarray([_budget(grid, config, name, d) for d in group], jnp.int32),
            )
            for config, group in groups.items()
        ]

    found = look.call(name, look_at_layer)
    records, maps = [], np.zeros(0)
    for arrays, group in zip(found, groups.values(), strict=True):
        for row, density in enumerate(group):
            error, kept, share, mask = (np.asarray(x[:, row]) for x in arrays)
            if density == map_density:
                maps = mask
            records.append(
                {
                    "name": name,
                    "density": density,
                    "step": look.step,
                    "kept_density": round(float(share.mean()), 5),
                    "relative_l2": error.mean(1).round(5).tolist(),
                    "kept_mass": kept.mean(1).round(5).tolist(),
                    "clips": {
                        "relative_l2": error.mean(0).round(5).tolist(),
                        "kept_mass": kept.mean(0).round(5).tolist(),
                    },
                }
            )
    return records, maps


def _budget(grid: VideoGrid, config: DraftConfig, name: str, density: float) -> int:
    sparsity = config.sparsity if name == "top_p" else sparsity_of(density)
    return static_budget(sparsity, grid, config)


def _layer_errors(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    budget: Int[Array, ""],
    *,
    grid: VideoGrid,
    config: DraftConfig,
) -> tuple[Array, Array, Array, Array]:
    """Returns relative L2, kept mass and density of each clip, and the first's mask."""
    mask = compute_mask(
        q, k, grid=grid, config=config, budget=budget, order="tiled", v=v
    )
    means = None
    if config.compensation is not None:
        compensation = config.compensation
        means = make_means(k, v, mask, compensation=compensation, order="tiled")
    out = block_sparse_attention(q, k, v, mask, grid=grid, order="tiled", means=means)
    dense = dense_attention(q, k, v, grid=grid)
    difference, dense = (x.astype(jnp.float32) for x in (out - dense, dense))
    axes = (1, 2, 3)
    error = jnp.sqrt((difference**2).sum(axes) / (dense**2).sum(axes))
    kept = mask.to_dense()
    masses = block_masses(q, k, grid)
    share = mass_shares(masses, kept, grid)["kept_mass"].mean(1)
    visual = grid.visual_blocks
    return error, share, mask.density.mean(1), kept[0, 0, visual, visual]


def top_p_of_densities(
    found: Iterator[Look], densities: Sequence[float], grid: VideoGrid
) -> dict[str, float]:
    """Returns the mass of each row at which "top_p" keeps a density, on average.

    Args:
      found: Steps to average over, of tuning prompts.
      densities: Shares of block pairs to keep.
      grid: Geometry of the sequence.
    """
    config = DraftConfig.paper(selection="top_p", sparsity=0.0)

    def kept_shares(q, k, _):
        scores = draft_scores(q, k, grid=grid, config=config, order="tiled")
        before = jnp.cumsum(-jnp.sort(-scores, axis=-1), axis=-1)
        before = jnp.pad(before[..., :-1], [(0, 0)] * 3 + [(1, 0)])
        # A block is kept if those before it do not reach the mass.
        return jax.lax.map(lambda mass: (before < mass).mean(), jnp.asarray(SHARES))

    by_step = [np.asarray(look.call("top_p", kept_shares)).mean(0) for look in found]
    shares = np.mean(by_step, axis=0)
    return {
        str(density): round(float(np.interp(density, shares, SHARES)), 4)
        for density in densities
    }


def looked_at(num_steps: int, count: int, dense_fraction: float) -> tuple[int, ...]:
    """Returns steps to look at, spread over those that are sparse."""
    first = int(np.ceil(dense_fraction * num_steps))
    steps = np.linspace(first, num_steps - 1, count).round().astype(int)
    return tuple(np.unique(steps).tolist())
