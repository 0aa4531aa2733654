"""What methods do to single layers: error of the output, and mass that is kept.

Queries, keys and values are those of dense generations, so that all methods see the
same and no error of an earlier step or layer is in a figure. Padded text counts, too.
Mass is that between tiles of the video; pairs with text are always kept.
"""

import concurrent.futures
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
from benchmarks.quality.generations import TRACING
from benchmarks.quality.methods import first_sparse_step, sparsity_of
from benchmarks.quality.rankings import masses_before, masses_of_tiles
from draft_jax import (
    DraftConfig,
    VideoGrid,
    constant_step,
    draft_scores,
    initial_mask,
    scheduled_attention,
)
from draft_jax.config import static_budget
from models.diffusion.pipeline import DENSE, VideoPipeline
from models.diffusion.sampling import Sampling
from pallas_kernels import dense_attention

SHARES = tuple(np.linspace(0.02, 0.995, 40).round(4).tolist())  # of mass, for top_p


OfLayer = Callable[..., Any]  # of q, k and v, and of what a call adds


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A step of dense generations that is looked at.

    Attributes:
      step: Number of the step.
      structure: Of the step's transformer.
      arguments: Its parameters, and inputs of the step.
      programs: What was compiled or is to be, by name; of all steps.
      threads: Where programs are compiled.
    """

    step: int
    structure: Any
    arguments: tuple[Any, Any]
    programs: dict[str, concurrent.futures.Future[Callable]]
    threads: concurrent.futures.Executor

    def prepare(self, name: str, function: OfLayer, *added: Any) -> None:
        """Begins to compile a function of each layer's q, k and v, if nothing has yet.

        The name tells it: it is compiled once for all steps and all values of what is
        added to q, k and v.
        """
        if name not in self.programs:
            run = functools.partial(_map_layers, self.structure, function)
            arguments = (*self.arguments, *added)
            self.programs[name] = self.threads.submit(_compile, run, arguments)

    def call(self, name: str, function: OfLayer, *added: Any) -> Any:
        """Calls such a function; returns what it returns, stacked over layers."""
        self.prepare(name, function, *added)
        return self.programs[name].result()(*self.arguments, *added)


def _map_layers(
    structure: Any, function: OfLayer, parameters: Any, rows: Any, *added: Any
) -> Any:
    model: Any = nnx.merge(structure, parameters)
    return model.map_qkv(
        lambda q, k, v: function(q, k, v, *added),
        rows,
        attention=DENSE,
        step=None,
        masks=None,
    )[1]


def _compile(run: Callable, arguments: tuple[Any, ...]) -> Callable:
    with TRACING:
        lowered = jax.jit(run).lower(*arguments)
    return lowered.compile()


def looks(
    pipeline: VideoPipeline,
    clips: Clips,
    sampling: Sampling,
    seen: Mapping[int, Float[Array, "B F H W C"]],
    threads: concurrent.futures.Executor,
) -> Iterator[Look]:
    """Looks at steps of dense generations.

    Args:
      pipeline: The model.
      clips: Prompts, as one batch; negative prompts are not looked at.
      sampling: Settings of the videos.
      seen: Latents of the clips before each step to look at, by step.
      threads: Where functions are compiled.
    """
    noise = clips.noise(pipeline.latent_shape(sampling), sampling.seed)
    sampler, _, inputs = pipeline.start(clips.texts, sampling, noise=noise)
    context = jax.tree.map(lambda x: x[: len(clips.prompts)], inputs.context)
    programs: dict[str, concurrent.futures.Future[Callable]] = {}
    for index, latents in sorted(seen.items()):
        structure, parameters = nnx.split(sampler.model_at(index))
        rows = sampler.model.step_inputs(
            latents[: len(clips.prompts)],
            sampler.solver.timesteps[index],
            context,
            inputs.image,
            inputs.embedded_guidance,
        )

        yield Look(
            step=index,
            structure=structure,
            arguments=(parameters, rows),
            programs=programs,
            threads=threads,
        )


def prepare(
    look: Look,
    configs: Mapping[str, DraftConfig],
    grid: VideoGrid,
) -> None:
    """Begins to compile what measures some methods; see `measure_method`."""
    look.prepare("masses", _masses_of(grid))
    for name, config in configs.items():
        look.prepare(name, errors_of_layer(config, grid), jnp.int32(0))


def _masses_of(grid: VideoGrid) -> OfLayer:
    return lambda q, k, _: masses_of_tiles(q, k, grid)


def masses_of_layers(look: Look, grid: VideoGrid) -> Float[np.ndarray, "L B N S S"]:
    """Returns the softmax mass between tiles of each layer, clip and head."""
    return np.asarray(look.call("masses", _masses_of(grid)))


def errors_of_layer(config: DraftConfig, grid: VideoGrid) -> OfLayer:
    """Returns what measures a method in a layer, of q, k, v and a budget.

    A budget is an argument, not one of a loop over all: XLA fails to compile some of
    the methods for a GPU where it varies within a loop over budgets ("Failed to
    evaluate instruction").

    Args:
      config: What the method computes, with room for all budgets.
      grid: Geometry of the sequence.
    """

    def look_at_layer(q, k, v, budget):
        dense = dense_attention(q, k, v, grid=grid)
        return _layer_errors(q, k, v, dense, budget, grid=grid, config=config)

    return look_at_layer


def measure_method(
    look: Look,
    name: str,
    config: DraftConfig,
    densities: Sequence[float],
    *,
    grid: VideoGrid,
    masses: Float[np.ndarray, "L B N S S"],
    map_density: float,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Measures a method in every layer.

    Args:
      look: The step.
      name: A key of `METHODS`.
      config: What the method computes, with room for all densities.
      densities: Shares of block pairs to keep.
      grid: Geometry of the sequence.
      masses: See `masses_of_layers`.
      map_density: Density whose masks are returned.

    Returns:
      One record for each density: of each layer the mean over clips, and of each clip
      the mean over layers. And the kept pairs of the first clip and head,
      [layers, S, S].
    """
    measure = errors_of_layer(config, grid)
    records, maps = [], np.zeros(0)
    for density in densities:
        budget = jnp.int32(static_budget(sparsity_of(density), grid, config))
        found = look.call(name, measure, budget)
        error, share, mask = map(np.asarray, found)  # of each layer
        kept = np.where(mask, masses, 0.0).sum((2, 3, 4)) / masses.sum((2, 3, 4))
        if density == map_density:
            maps = mask[:, 0, 0]
        records.append(
            {
                "name": name,
                "density": density,
                "step": look.step,
                "kept_density": round(float(share.mean()), 5),
                "relative_l2": _rounded(error.mean(1)),
                "kept_mass": _rounded(kept.mean(1)),
                "clips": {
                    "relative_l2": _rounded(error.mean(0)),
                    "kept_mass": _rounded(kept.mean(0)),
                },
            }
        )
    return records, maps


def _rounded(values: np.ndarray) -> list[float]:
    """Returns five decimals, which float32 would write with its own error behind."""
    return values.astype(np.float64).round(5).tolist()


def _layer_errors(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    dense: Float[Array, "B T N D"],
    budget: Int[Array, ""],
    *,
    grid: VideoGrid,
    config: DraftConfig,
) -> tuple[Array, Array, Array]:
    """Returns relative L2 and density of each clip, and the kept pairs of tiles."""
    step = dataclasses.replace(constant_step(grid, config), budget=budget)
    mask = initial_mask(grid, config, batch=q.shape[0], num_heads=q.shape[2])
    out, used = scheduled_attention(
        q, k, v, grid=grid, config=config, step=step, mask=mask, order="tiled"
    )
    assert used is not None, "a mask was given"
    difference = out.astype(jnp.float32) - dense.astype(jnp.float32)
    axes = (1, 2, 3)
    norm = (dense.astype(jnp.float32) ** 2).sum(axes)
    visual = grid.visual_blocks
    kept = used.to_dense()[..., visual, visual]
    error = jnp.sqrt((difference**2).sum(axes) / norm)
    return error, used.density.mean(1), kept


def top_p_of_densities(
    found: Iterator[Look], densities: Sequence[float], grid: VideoGrid
) -> dict[str, float]:
    """Returns the mass of each row at which "top_p" keeps a density, on average.

    Args:
      found: Steps to average over, of tuning prompts.
      densities: Shares of block pairs to keep.
      grid: Geometry of the sequence.
    """
    config = DraftConfig.paper()

    def kept_shares(q, k, _):
        scores = draft_scores(q, k, grid=grid, config=config, order="tiled")
        _, before = masses_before(scores)
        return jax.lax.map(lambda mass: (before < mass).mean(), jnp.asarray(SHARES))

    by_step = [np.asarray(look.call("top_p", kept_shares)).mean(0) for look in found]
    shares = np.mean(by_step, axis=0)
    return {
        str(density): round(float(np.interp(density, shares, SHARES)), 4)
        for density in densities
    }


def looked_at(num_steps: int, count: int) -> tuple[int, ...]:
    """Returns steps to look at, spread over those that are sparse."""
    steps = (
        np.linspace(first_sparse_step(num_steps), num_steps - 1, count)
        .round()
        .astype(int)
    )
    return tuple(np.unique(steps).tolist())
