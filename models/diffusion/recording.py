"""Draft maps and masks of a run, recorded while it generates.

A recorded step runs the transformer once more, on the prompt's rows alone, in a program
of its own: the program that makes the video is the same with and without a recorder.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from draft_jax import (
    AttentionPlan,
    StepKind,
    StepPlan,
    VideoGrid,
    compute_mask,
    draft_scores,
)
from models.diffusion.inspection import AttentionView
from models.diffusion.sampler import Sampler, SamplerState, StepInputs
from models.float8.product import compiler_options

# A level of a draft map is a share of the map's largest score, on a logarithmic scale.
MAX_LEVEL = 255
DECADES = 4  # from level 255 to level 0
STEPS_FOR_A_LOOK = 16  # a look costs half a guided step, so 3 % of the steps
MOST_LOOKS, MOST_LAYERS, MOST_HEADS = 3, 8, 4
MOST_BYTES = 14_000_000  # of levels and bits; a third more as text


class RecordingWarning(UserWarning):
    """A recording has ended before its run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looks:
    """Steps, layers and heads that are looked at, chosen before the run."""

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRecord:
    """Draft maps and masks of some steps, layers and heads, for the first prompt.

    Attributes:
      looks: What was looked at; the leading axes of the arrays.
      levels: Draft maps as `to_levels` rounds them.
      peaks: Largest score of each map.
      masks: Kept tile pairs, as bits in the order of `numpy.packbits`.
      dense: Whether the schedule ran each layer dense, so that its mask was not used.
      timesteps: Timestep of each step that was looked at.
      grid: Geometry of the tokens; says which of them a tile holds.
      video_frames: Latent frames of the video, the last ones of the grid; a reference
        image may stand before them.
      of_steps: Steps of the run.
      of_layers: Layers of the model.
      of_heads: Heads of a layer.
      time_ms: Time that looking took, compilation included.
    """

    looks: Looks
    levels: UInt8[np.ndarray, "looks layers N S S"]
    peaks: Float[np.ndarray, "looks layers N"]
    masks: UInt8[np.ndarray, "looks layers N S bytes"]
    dense: Bool[np.ndarray, "looks layers"]
    timesteps: tuple[float, ...]
    grid: VideoGrid
    video_frames: int
    of_steps: int
    of_layers: int
    of_heads: int
    time_ms: float


def choose_looks(
    plan: StepPlan,
    *,
    num_heads: int,
    num_tiles: int,
    skippable: Bool[np.ndarray, " steps"] | None = None,
    most_bytes: int = MOST_BYTES,
) -> Looks | None:
    """Chooses what to look at, so that neither time nor memory is spent unduly.

    Steps are those that make new masks, spread evenly, one for each 16 of the run.
    First heads, then layers are left out if the maps would take more than
    `most_bytes`.

    Args:
      plan: The schedule of the run.
      num_heads: Heads of a layer.
      num_tiles: Tiles of the video, S.
      skippable: Steps that a cache may skip; others are taken where there are some.
      most_bytes: Bytes that draft maps and masks may take.

    Returns:
      The looks; None if no step makes a mask, or a single map takes too much.
    """
    dense = np.asarray(plan.dense)
    makes_masks = np.asarray(plan.refresh) & ~dense.all(axis=1)
    if skippable is not None and (makes_masks & ~skippable).any():
        makes_masks &= ~skippable
    refreshed = np.flatnonzero(makes_masks)
    num_maps = _maps_in(most_bytes, num_tiles)
    if not len(refreshed) or not num_maps:
        return None
    steps = min(MOST_LOOKS, max(1, len(plan) // STEPS_FOR_A_LOOK), len(refreshed))
    layers = min(dense.shape[1], MOST_LAYERS)
    heads = min(num_heads, MOST_HEADS)
    while steps * layers * heads > num_maps:
        if heads > 1:
            heads -= 1
        elif layers > min(3, dense.shape[1]):
            layers -= 1
        elif steps > 1:
            steps -= 1
        else:
            layers -= 1
    return Looks(
        # One look lies in the middle of the sparse steps, not at their start.
        steps=tuple(refreshed[_spread(len(refreshed), steps)].tolist()),
        layers=tuple(_spread(dense.shape[1], layers).tolist()),
        heads=tuple(range(heads)),
    )


def _spread(size: int, number: int) -> np.ndarray:
    """Returns indices spread evenly from first to last; the middle one if it is one."""
    if number == 1:
        return np.array([size // 2])
    return np.rint(np.linspace(0, size - 1, number)).astype(int)


class AttentionRecorder:
    """Records draft maps and masks of a run with draft attention.

    Args:
      most_bytes: Bytes that they may take.

    Example:
        ```python
        from draft_jax import AttentionPlan, DraftConfig
        from models.diffusion.recording import AttentionRecorder
        from models.diffusion.sampling import Sampling
        from models.loading import load_pipeline

        recorder = AttentionRecorder()
        result = load_pipeline().generate(
            "a red ball bounces",
            Sampling(num_steps=4),
            attention=AttentionPlan.draft(DraftConfig()),
            recorder=recorder,
        )
        record = recorder.record()
        ```
    """

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._sampler: Sampler | None = None
        self._looks: Looks | None = None
        self._seen: dict[int, dict[str, np.ndarray]] = {}
        self._time_ms = 0.0

    def before_step(
        self, sampler: Sampler, state: SamplerState, inputs: StepInputs, index: int
    ) -> None:
        """Looks at the step if it is one of the chosen ones.

        A look for which the device has no memory ends the recording, not the run.
        """
        if self._sampler is not sampler:  # a run has begun
            self._sampler, self._seen, self._time_ms = sampler, {}, 0.0
            self._looks = self._choose(sampler)
        if self._looks is None or index not in self._looks.steps:
            return
        start = time.perf_counter()
        try:
            seen = look_at_step(sampler, state, inputs, index, self._looks)
        except jax.errors.JaxRuntimeError as error:
            self._looks = dataclasses.replace(self._looks, steps=())
            reason = (str(error).splitlines() or ["no reason given"])[0]
            warnings.warn(
                f"draft maps are recorded up to step {index}, not further: {reason}",
                RecordingWarning,
                stacklevel=2,
            )
            return
        self._seen[index] = seen
        self._time_ms += 1e3 * (time.perf_counter() - start)

    def _choose(self, sampler: Sampler) -> Looks | None:
        model = sampler.model
        if sampler.plan is None:
            return None
        return choose_looks(
            sampler.plan,
            num_heads=model.num_heads,
            num_tiles=model.grid(sampler.latent_shape).num_visual_blocks,
            skippable=sampler.skippable,
            most_bytes=self._most_bytes,
        )

    def record(self) -> AttentionRecord | None:
        """Returns what was seen of the last run; None if nothing was."""
        if not self._seen or self._sampler is None or self._looks is None:
            return None
        sampler, model = self._sampler, self._sampler.model
        looks = dataclasses.replace(self._looks, steps=tuple(self._seen))
        seen = {
            name: np.stack([look[name] for look in self._seen.values()])
            for name in ("levels", "peaks", "masks")
        }
        return AttentionRecord(
            **seen,
            looks=looks,
            dense=sampler.dense[np.ix_(looks.steps, looks.layers)],
            timesteps=tuple(float(sampler.solver.timesteps[i]) for i in looks.steps),
            grid=model.grid(sampler.latent_shape),
            video_frames=sampler.latent_shape[0],
            of_steps=sampler.solver.num_steps,
            of_layers=model.num_layers,
            of_heads=model.num_heads,
            time_ms=self._time_ms,
        )


def record_of_view(
    view: AttentionView,
    *,
    step: int,
    of_steps: int,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    most_bytes: int = MOST_BYTES,
) -> AttentionRecord | None:
    """Returns what a view shows of a step, as a record of one look.

    Args:
      view: The view.
      step: Its step.
      of_steps: Steps of the run.
      layers: Layers to keep if not all of them fit.
      heads: Heads to keep if not all of them fit; the first ones, if still too many.
      most_bytes: Bytes that draft maps and masks may take.

    Returns:
      The record; None if a single map takes too much.
    """
    of_layers, of_heads, num_tiles, _ = view.draft_maps.shape
    num_maps = _maps_in(most_bytes, num_tiles)
    if of_layers * of_heads <= num_maps:
        layers, heads = tuple(range(of_layers)), tuple(range(of_heads))
    heads = heads[: max(1, num_maps // len(layers))]
    layers = layers[: num_maps // len(heads)]
    if not layers:
        return None
    chosen = np.ix_(layers, heads)
    levels, peaks = to_levels(jnp.asarray(view.draft_maps[chosen]))
    return AttentionRecord(
        looks=Looks(steps=(step,), layers=layers, heads=heads),
        levels=np.asarray(levels)[None],
        peaks=np.asarray(peaks)[None],
        masks=np.packbits(view.masks[chosen], axis=-1)[None],
        dense=view.is_dense[list(layers)][None],
        timesteps=(view.timestep,),
        grid=view.grid,
        video_frames=len(view.estimate),
        of_steps=of_steps,
        of_layers=of_layers,
        of_heads=of_heads,
        time_ms=0.0,
    )


def _maps_in(size: int, num_tiles: int) -> int:
    """Returns how many maps and masks between tiles so many bytes hold."""
    return size // (num_tiles * (num_tiles + -(-num_tiles // 8)))


def look_at_step(
    sampler: Sampler, state: SamplerState, inputs: StepInputs, index: int, looks: Looks
) -> dict[str, np.ndarray]:
    """Returns levels, peaks and masks of a step that makes new masks.

    Args:
      sampler: The run.
      state: What the step starts from.
      inputs: As given to the step.
      index: The step.
      looks: Layers and heads to look at.
    """
    kind = sampler.kind(index)
    assert kind is not None, "dense attention has no masks"
    assert kind.refresh, "other masks come from another step"
    assert sampler.plan is not None
    structure, parameters = nnx.split(sampler.model_at(index))
    first = jax.tree.map(lambda rows: rows[:1], (inputs.context, inputs.image))
    look = _jitted_look(tuple(compiler_options(parameters).items()))
    seen = look(
        parameters,
        state.latents[:1],
        jnp.float32(sampler.solver.timesteps[index]),
        *first,
        inputs.embedded_guidance,
        jnp.asarray(sampler.plan.budget[index]),
        structure=structure,
        attention=sampler.attention,
        kind=kind,
        looks=dataclasses.replace(looks, steps=()),  # steps share a program
    )
    return {name: np.asarray(value) for name, value in seen.items()}


@functools.cache
def _jitted_look(options: tuple[tuple[str, bool], ...]) -> Callable[..., Any]:
    """Returns the look, to be compiled with options of XLA."""
    names = ("structure", "attention", "kind", "looks")
    return jax.jit(_look, static_argnames=names, compiler_options=dict(options))


def _look(
    parameters,
    latents,
    timestep,
    context,
    image,
    embedded_guidance,
    budget,
    *,
    structure: nnx.GraphDef,
    attention: AttentionPlan,
    kind: StepKind,
    looks: Looks,
) -> dict[str, Array]:
    model, config = nnx.merge(structure, parameters), attention.config
    assert config is not None, "dense attention has no masks"
    grid = model.grid(latents.shape)

    def look_at_layer(q, k):
        heads = np.asarray(looks.heads)
        q, k = (part[:, :, heads] for part in (q, k))
        mask = compute_mask(
            q, k, grid=grid, config=config, budget=budget, order="tiled"
        ).to_dense()[0, :, grid.visual_blocks, grid.visual_blocks]
        scores = draft_scores(q, k, grid=grid, config=config, order="tiled")[0]
        levels, peaks = to_levels(scores)
        bits = jnp.packbits(mask, axis=-1)
        return {"levels": levels, "peaks": peaks, "masks": bits}

    rows = model.step_inputs(latents, timestep, context, image, embedded_guidance)
    _, seen = model.map_qk(
        look_at_layer, rows, attention=attention, step=kind.step(budget), masks=None
    )
    return jax.tree.map(lambda layers: layers[np.asarray(looks.layers)], seen)


def to_levels(
    scores: Float[Array, "*maps S S"],
) -> tuple[UInt8[Array, "*maps S S"], Float[Array, " *maps"]]:
    """Rounds draft maps to 256 levels, evenly spaced in the logarithm of the score.

    Returns:
      The levels, 255 for a map's largest score and 0 for those 10,000 times smaller or
      more; and the largest score of each map.
    """
    peaks = scores.max((-2, -1))
    tiny = np.finfo(np.float32).tiny
    share = jnp.maximum(scores / jnp.maximum(peaks, tiny)[..., None, None], tiny)
    levels = MAX_LEVEL * (1 + jnp.log10(share) / DECADES)
    return jnp.rint(jnp.clip(levels, 0, MAX_LEVEL)).astype(jnp.uint8), peaks
