"""Times of one attention layer by method and density, on a GPU at a full-size shape.

A layer is everything from q, k and v to the output: draft, selection, means and the
block-sparse kernel, in tiled order. Its density is an argument of the program, as in a
schedule, so a method is compiled once. Programs take turns over densities and methods
within a round; figures are medians of rounds.

A pattern may keep fewer pairs than it is allowed, and on another grid another share.
So a time belongs to the share that was kept, and the time of a trial is read off at the
share that the trial kept.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.inputs import smooth_inputs
from benchmarks.common.records import environment
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.quality.generations import TRACING
from benchmarks.quality.methods import METHODS, sparsity_of
from benchmarks.quality.trials import FRONT_DENSITIES, front_configs
from draft_jax import (
    DraftConfig,
    VideoGrid,
    constant_step,
    initial_mask,
    scheduled_attention,
)
from draft_jax.config import static_budget
from pallas_kernels import dense_attention

TINY = Shape(
    grid=VideoGrid(2, 16, 24, tile=(4, 8)), num_heads=2, head_dim=64, dtype="float32"
)
TIME_SHAPES = {"tiny": TINY, **SHAPES}
ROUNDS = 3
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
            method.timed or method.config, sparsity=sparsity_of(max(densities))
        )
        found += [Timed(name=name, density=d, config=config) for d in densities]
    for name, config in front_configs().items() if with_front else ():
        found += [Timed(name=name, density=d, config=config) for d in FRONT_DENSITIES]
    return found


def measure_times(
    shape_name: str,
    layers: Sequence[Timed],
    save: Callable[[dict[str, Any]], None],
    known: Mapping[str, Any] | None = None,
    limit: float = float("inf"),
) -> dict[str, Any]:
    """Times layers on the device, with inputs whose attention is local.

    Args:
      shape_name: A key of `TIME_SHAPES`.
      layers: What to time.
      save: Called with the record after each round.
      known: A record that this one goes on from: what it has is not timed again.
      limit: Seconds after which no round begins but the first.

    Returns:
      The record: environments, shape, and a row for each layer.

    Raises:
      ValueError: The device is no GPU, as times of a CPU say nothing of methods; or
        the known record is of another device or shape.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"times are of a GPU; this process has {jax.devices()[0].device_kind}: "
            "run this part on one, and give its file to --times elsewhere"
        )
    shape, head = TIME_SHAPES[shape_name], environment()
    described = {"name": shape_name, "qkv": list(shape.qkv_shape)}
    rows: list[dict[str, Any]] = []
    if known is not None:
        before = known["environment"]["device"], known["shape"]
        if before != (head["device"], described):
            raise ValueError(
                f"--output has times of {before}, this run is of "
                f"{(head['device'], described)}: pass another file"
            )
        rows = [row for row in known["rows"] if "median_ms" in row]
    record: dict[str, Any] = {"environment": head, "shape": described, "rows": rows}
    timed = {(row["name"], row["density"]) for row in rows}
    missing = [layer for layer in layers if (layer.name, layer.density) not in timed]
    if missing:
        for found in time_layers(shape, missing, limit):
            record["rows"] = rows + found
            save(record)
    return record


def time_layers(
    shape: Shape, layers: Sequence[Timed], limit: float = float("inf")
) -> Iterator[list[dict[str, Any]]]:
    """Yields a row for each layer after each round; "error" where one does not run."""
    deadline = time.monotonic() + limit
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
        _, density = program(*qkv, budget)
        row["kept_density"] = round(float(density), 5)
        calls[len(rows) - 1] = functools.partial(program, *qkv, budget)
    for samples in _rounds(calls, deadline):
        for place, own in samples.items():
            rows[place]["median_ms"] = round(statistics.median(own), 4)
            rows[place]["samples_ms"] = [round(value, 4) for value in own]
        yield rows


def _layer(config: DraftConfig | None, grid: VideoGrid, q, k, v, budget):
    """Returns the output and the share of block pairs that is kept."""
    if config is None:
        return dense_attention(q, k, v, grid=grid), jnp.float32(1.0)
    step = dataclasses.replace(constant_step(grid, config), budget=budget)
    batch, _, num_heads, _ = q.shape
    mask = initial_mask(grid, config, batch=batch, num_heads=num_heads)
    out, used = scheduled_attention(
        q, k, v, grid=grid, config=config, step=step, mask=mask, order="tiled"
    )
    assert used is not None, "a mask was given"
    return out, used.density.mean()


def _compile(configs, shape: Shape, qkv) -> dict[Any, Any]:
    """Returns a compiled layer for each configuration, or the error it raised."""

    def build(config):
        layer = jax.jit(functools.partial(_layer, config, shape.grid))
        try:
            with TRACING:
                lowered = layer.lower(*qkv, jnp.int32(0))
            return lowered.compile()
        except Exception as error:  # recorded: other layers still run
            return error

    configs = list(configs)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(configs, pool.map(build, configs), strict=True))


def _rounds(
    calls: Mapping[int, Callable[[], Any]], deadline: float
) -> Iterator[dict[int, list[float]]]:
    """Yields milliseconds of each call in all rounds so far, after each round."""
    samples: dict[int, list[float]] = {place: [] for place in calls}
    for number in range(ROUNDS):
        if number and time.monotonic() > deadline:
            break
        for place, call in calls.items():
            jax.block_until_ready(call())
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < MIN_SAMPLE_S:
                jax.block_until_ready(call())
                count += 1
            samples[place].append(1e3 * (time.perf_counter() - start) / count)
        yield samples


class Times:
    """Times of layers by name and kept density."""

    def __init__(self, record: Mapping[str, Any] | None) -> None:
        """Reads a record of `measure_times`, if there is one."""
        self._points: dict[str, list[tuple[float, float]]] = {}
        for row in [] if record is None else record["rows"]:
            if "median_ms" in row:
                point = row["kept_density"], row["median_ms"]
                self._points.setdefault(row["name"], []).append(point)
        self._points = {name: sorted(points) for name, points in self._points.items()}

    def at(self, name: str, kept_density: float) -> float | None:
        """Returns milliseconds of a layer; None if its method was not timed.

        They are read off straight lines between measured points. Beyond the ends the
        last line goes on: the kernel's time is linear in the pairs that it reads.
        "top_p" has the times of equal rows; so has the oracle, as if its masks were to
        be had for a draft's price.
        """
        if name in ("top_p", "oracle"):
            name = "row_topk"
        points = self._points.get(name)
        if points is None:
            return None
        if len(points) == 1:
            return points[0][1]
        places = [place for place, _ in points]
        right = int(np.clip(np.searchsorted(places, kept_density), 1, len(points) - 1))
        (x0, y0), (x1, y1) = points[right - 1 : right + 1]
        return y0 if x1 == x0 else y0 + (kept_density - x0) * (y1 - y0) / (x1 - x0)

    @property
    def dense(self) -> float | None:
        """Milliseconds of dense attention."""
        return self.at("dense", 1.0)
