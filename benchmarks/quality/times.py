"""Times of one attention layer by method and density, on a GPU at a full-size shape.

A layer is everything from q, k and v to the output: draft, selection, means and the
block-sparse kernel, in tiled order. Its density is an argument of the program, as in a
schedule, so a method is compiled once. Programs take turns over densities and methods
within a round; figures are medians of rounds.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.inputs import smooth_inputs
from benchmarks.common.records import environment
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.quality.methods import METHODS, sparsity_of
from benchmarks.quality.trials import (
    FRONT_DENSITIES,
    FRONT_FRAMES,
    FRONT_SUB_TILES,
    front_name,
)
from draft_jax import (
    Compensation,
    DraftConfig,
    VideoGrid,
    compute_mask,
    constant_step,
    scheduled_attention,
)
from draft_jax.config import static_budget
from pallas_kernels import dense_attention

TINY = Shape(
    grid=VideoGrid(2, 16, 24, tile=(4, 8)), num_heads=2, head_dim=64, dtype="float32"
)
TIME_SHAPES = {"tiny": TINY, **SHAPES}
ROUNDS = 5
MIN_SAMPLE_S = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A layer to time.

    Attributes:
      name: The method, or the variant of one.
      density: Share of block pairs to keep; 1 for dense attention.
      config: What is computed; None for dense attention.
    """

    name: str
    density: float
    config: DraftConfig | None


def layers_to_time(
    names: Sequence[str], densities: Sequence[float], *, with_front: bool
) -> list[Timed]:
    """Returns methods at densities, dense attention, and splits of a budget.

    "top_p" is left out: at a density it is "row_topk" with another selection, and its
    density on inputs that are not a model's would say nothing.

    Args:
      names: Methods of `benchmarks.quality.methods.METHODS`.
      densities: Shares of block pairs to keep.
      with_front: Whether to add the sizes of means of the part "front".
    """
    found = [Timed(name="dense", density=1.0, config=None)]
    for name in names:
        method = METHODS[name]
        if method.is_bound or name == "top_p":
            continue
        config = dataclasses.replace(
            method.config, sparsity=sparsity_of(max(densities))
        )
        found += [Timed(name=name, density=d, config=config) for d in densities]
    for size in FRONT_SUB_TILES if with_front else ():
        for frames in FRONT_FRAMES:
            config = DraftConfig.compensated(
                sparsity=sparsity_of(max(FRONT_DENSITIES)),
                compensation=Compensation(sub_tile=size, frames=frames),
            )
            name = front_name(*size, frames)
            found += [
                Timed(name=name, density=d, config=config) for d in FRONT_DENSITIES
            ]
    return found


def measure_times(
    shape_name: str, layers: Sequence[Timed], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Times layers on the device, with inputs whose attention is local.

    Args:
      shape_name: A key of `TIME_SHAPES`.
      layers: What to time.
      report: Called with each row.

    Returns:
      The record: environment, shape, and a row for each layer.

    Raises:
      ValueError: The device is no GPU. Times of a CPU say nothing of methods.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"times are of a GPU; this process has {jax.devices()[0].device_kind}: "
            "run this part on one, and give its file to --times elsewhere"
        )
    shape = TIME_SHAPES[shape_name]
    record: dict[str, Any] = {
        "environment": environment(),
        "shape": {"name": shape_name, "qkv": list(shape.qkv_shape)},
        "rows": time_layers(shape, layers),
    }
    for row in record["rows"]:
        report(row)
    return record


def time_layers(shape: Shape, layers: Sequence[Timed]) -> list[dict[str, Any]]:
    """Returns a row for each layer, with an "error" where one does not run."""
    qkv = smooth_inputs(shape)
    programs = _compile({layer.config for layer in layers}, shape, qkv)
    calls, rows = {}, []
    for layer in layers:
        program = programs[layer.config]
        row: dict[str, Any] = {"name": layer.name, "density": layer.density}
        rows.append(row)
        if isinstance(program, Exception):
            row["error"] = f"{type(program).__name__}: {program}"[:300]
            continue
        budget = jnp.int32(0)
        if layer.config is not None:
            found = static_budget(sparsity_of(layer.density), shape.grid, layer.config)
            budget = jnp.int32(found)
            mask = _mask(layer.config, shape.grid, *qkv, budget)
            row["kept_density"] = round(float(mask), 5)
        calls[len(rows) - 1] = functools.partial(program, *qkv, budget)
    for place, samples in _samples(calls).items():
        rows[place]["median_ms"] = round(statistics.median(samples), 4)
        rows[place]["samples_ms"] = [round(value, 4) for value in samples]
    return rows


def _layer(config: DraftConfig | None, grid: VideoGrid, q, k, v, budget):
    if config is None:
        return dense_attention(q, k, v, grid=grid)
    step = dataclasses.replace(constant_step(grid, config), budget=budget)
    return scheduled_attention(
        q, k, v, grid=grid, config=config, step=step, mask=None, order="tiled"
    )[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mask(config: DraftConfig, grid: VideoGrid, q, k, v, budget):
    mask = compute_mask(
        q, k, grid=grid, config=config, budget=budget, order="tiled", v=v
    )
    return mask.density.mean()


def _compile(configs, shape: Shape, qkv) -> dict[Any, Any]:
    """Returns a compiled layer for each configuration, or the error it raised."""

    def build(config):
        layer = jax.jit(functools.partial(_layer, config, shape.grid))
        try:
            return layer.lower(*qkv, jnp.int32(0)).compile()
        except Exception as error:  # recorded: other layers still run
            return error

    configs = list(configs)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(configs, pool.map(build, configs), strict=True))


def _samples(calls: Mapping[int, Callable[[], Any]]) -> dict[int, list[float]]:
    """Returns milliseconds of each call in each round."""
    samples: dict[int, list[float]] = {place: [] for place in calls}
    for _ in range(ROUNDS):
        for place, call in calls.items():
            jax.block_until_ready(call())
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < MIN_SAMPLE_S:
                jax.block_until_ready(call())
                count += 1
            samples[place].append(1e3 * (time.perf_counter() - start) / count)
    return samples


def times_by_name(record: Mapping[str, Any] | None) -> dict[str, dict[float, float]]:
    """Returns milliseconds by method and density; those of "row_topk" serve "top_p".

    The oracle gets them too, as if its masks were to be had for a draft's price.
    """
    found: dict[str, dict[float, float]] = {}
    for row in [] if record is None else record["rows"]:
        if "median_ms" in row:
            found.setdefault(row["name"], {})[row["density"]] = row["median_ms"]
    if "row_topk" in found:
        found["top_p"] = found["oracle"] = found["row_topk"]
    return found
