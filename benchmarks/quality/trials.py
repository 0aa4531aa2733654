"""Trials of the lab: what is measured, one attention at one density at a time."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax

from benchmarks.quality.methods import (
    DENSE_FRACTION,
    DENSITIES,
    config_at,
    first_sparse_step,
    plan_at,
    sparsity_of,
)
from draft_jax import AttentionPlan, Compensation, DraftConfig, SparsitySchedule
from models.diffusion.dtypes import Linears

# What a run measures; each has trials of its own, but for layers.
Part = Literal[
    "floor",
    "methods",
    "first_layer",
    "layers",
    "front",
    "schedules",
    "combinations",
    "presets",
]
PARTS: tuple[Part, ...] = get_args(Part)
DenseKernel = Literal["cudnn", "xla"]
# Something is chosen by them.
ON_TUNING_PROMPTS = ("front", "schedules", "combinations")
WHOLE_RUNS = ("floor", "combinations", "presets")  # their first steps are their own

MeansSize = tuple[int, int, int]  # rows, columns and frames of a mean
# At most an eighth of the keys; None for no means.
FRONT_MEANS: tuple[MeansSize | None, ...] = (
    *((1, 1, 13), (1, 2, 8), (1, 2, 13), (2, 2, 4), (2, 2, 8), (2, 2, 13)),
    *((2, 4, 4), (2, 4, 8), (4, 4, 4), (4, 4, 8), None),
)
FRONT_DENSITIES = (0.25, 0.15, 0.1, 0.05, 0.025)
SCHEDULE_DENSITY = 0.1
CONSTANT = "constant"  # the schedule that others are compared with
WITH_FIRST_LAYER_DENSE = ("ours", "means", "paper")
CACHE_RULES = ("easy:0.05", "mag:0.12,2", "mag:0.24,6")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """An attention whose videos are compared with dense ones.

    Attributes:
      part: What it belongs to.
      name: The method or the variant of one.
      density: Share of block pairs that it is to keep in sparse steps; 1 for all.
      attention: What is computed.
      cache: Rule of a step cache, as on the command line.
      linears: Precision of the linear layers.
      dense_kernel: What dense attention is computed by; None for the fastest.
    """

    part: Part
    name: str
    density: float
    attention: AttentionPlan
    cache: str | None = None
    linears: Linears = "bfloat16"
    dense_kernel: DenseKernel | None = None

    @property
    def key(self) -> tuple[str, str, float]:
        """Tells the trial from all others."""
        return self.part, self.name, self.density

    @property
    def on_tuning_prompts(self) -> bool:
        """Whether its videos are of tuning prompts."""
        return self.part in ON_TUNING_PROMPTS


def floor() -> list[Trial]:
    """Dense attention by other kernels: no sparsity can be told from less than this.

    The block-sparse kernel has all pairs and the first steps, too. On a GPU dense
    attention may be by the same code, so that cuDNN's is beside it.
    """
    plan = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0), SparsitySchedule())
    name = "all pairs by the block-sparse kernel, every step"
    found = [Trial(part="floor", name=name, density=1.0, attention=plan)]
    if jax.default_backend() == "gpu":
        other = Trial(
            part="floor",
            name="dense attention by cuDNN",
            density=1.0,
            attention=AttentionPlan.dense(),
            dense_kernel="cudnn",
        )
        found.append(other)
    return found


def methods(
    names: Sequence[str], densities: Sequence[float], top_p: Mapping[str, float]
) -> list[Trial]:
    """All methods at all densities."""
    return [
        Trial(
            part="methods",
            name=name,
            density=density,
            attention=plan_at(config_at(name, densities, top_p), density),
        )
        for name, density in itertools.product(names, densities)
    ]


def first_layer(densities: Sequence[float]) -> list[Trial]:
    """Some methods with the first layer dense, as published code of Wan has it.

    Density is that of the other layers.
    """
    return [
        Trial(
            part="first_layer",
            name=name,
            density=density,
            attention=plan_at(
                config_at(name, densities, {}), density, dense_layers=(0,)
            ),
        )
        for name, density in itertools.product(WITH_FIRST_LAYER_DENSE, densities)
    ]


def split_name(means: Compensation) -> str:
    """Returns the name of a split with means of a size."""
    rows, columns = means.sub_tile
    return f"means of {rows}x{columns}x{means.frames}"


DEFAULT_SPLIT = split_name(Compensation())


def front_configs(
    means_sizes: Sequence[MeansSize | None] = FRONT_MEANS,
) -> dict[str, DraftConfig]:
    """Returns the splits by name, with room for the densities of methods, too."""
    found = {}
    for size in means_sizes:
        changes: dict[str, Any] = {"compensation": None, "ranking": "mass"}
        name = "no means"
        if size is not None:
            rows, columns, frames = size
            means = Compensation(sub_tile=(rows, columns), frames=frames)
            changes, name = {"compensation": means}, split_name(means)
        least = sparsity_of(max(*FRONT_DENSITIES, *DENSITIES))
        found[name] = DraftConfig(sparsity=least, **changes)
    return found


def schedules(num_steps: int) -> list[Trial]:
    """Reused masks, and densities that fall or rise at a fixed mean."""
    sparse = num_steps - first_sparse_step(num_steps)
    half = 0.5 * SCHEDULE_DENSITY
    ramp = [
        SCHEDULE_DENSITY - half + 2 * half * place / max(sparse - 1, 1)
        for place in range(sparse)
    ]
    rising = (SCHEDULE_DENSITY,) * (num_steps - sparse) + tuple(ramp)
    falling = (SCHEDULE_DENSITY,) * (num_steps - sparse) + tuple(ramp[::-1])

    def per_step(densities: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(sparsity_of, densities))

    variants: dict[str, dict[str, Any]] = {
        CONSTANT: {"sparsity": sparsity_of(SCHEDULE_DENSITY)},
        "masks of 2 steps": {
            "sparsity": sparsity_of(SCHEDULE_DENSITY),
            "mask_refresh": 2,
        },
        "masks of 4 steps": {
            "sparsity": sparsity_of(SCHEDULE_DENSITY),
            "mask_refresh": 4,
        },
        "rising density": {"sparsity": per_step(rising)},
        "falling density": {"sparsity": per_step(falling)},
    }
    config = DraftConfig.compensated(sparsity=sparsity_of(SCHEDULE_DENSITY + half))
    return [
        Trial(
            part="schedules",
            name=name,
            density=SCHEDULE_DENSITY,
            attention=AttentionPlan.draft(
                config, SparsitySchedule(dense_fraction=DENSE_FRACTION, **fields)
            ),
        )
        for name, fields in variants.items()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """Sparse attention, a step cache and a precision, as the command line names them.

    Attributes:
      method: Preset of `DraftConfig`; None for dense attention.
      sparsity: Share of block pairs that are skipped; None for dense attention.
      dense_fraction: Share of the steps that is dense at first.
      cache: Rule of a step cache, or None.
      linears: Precision of the linear layers.
    """

    method: Literal["compensated", "paper"] | None = None
    sparsity: float | None = None
    dense_fraction: float = DENSE_FRACTION
    cache: str | None = None
    linears: Linears = "bfloat16"

    @property
    def attention_name(self) -> str:
        """Tells its attention from others."""
        if self.method is None:
            return "dense"
        name = f"{self.method} {self.sparsity:g}"
        if self.dense_fraction != DENSE_FRACTION:
            name += f" after {self.dense_fraction:g}"
        return name

    @property
    def name(self) -> str:
        """Tells it from all others."""
        cache = [self.cache] if self.cache else []
        return " + ".join((self.attention_name, *cache, self.linears))

    def trial(self, part: Part) -> Trial:
        """Returns the trial that measures it."""
        attention, density = AttentionPlan.dense(), 1.0
        if self.method is not None:
            assert self.sparsity is not None, "a method has one"
            density = round(1.0 - self.sparsity, 6)
            # Sparsities share a program, of the least of them.
            config = getattr(DraftConfig, self.method)(sparsity=COMBINED_SPARSITIES[0])
            schedule = SparsitySchedule(
                dense_fraction=self.dense_fraction, sparsity=self.sparsity
            )
            attention = AttentionPlan.draft(config, schedule)
        return Trial(
            part=part,
            name=self.name,
            density=density,
            attention=attention,
            cache=self.cache,
            linears=self.linears,
        )


COMBINED_SPARSITIES = (0.9, 0.95)
PAPER_90 = Combination(method="paper", sparsity=0.9)
DEFAULT_90 = Combination(method="compensated", sparsity=0.9)
ATTENTIONS = (
    Combination(),
    PAPER_90,
    DEFAULT_90,
    Combination(method="compensated", sparsity=0.95),
    Combination(method="compensated", sparsity=0.9, dense_fraction=0.1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured of the parts that something is chosen by.

    Attributes:
      means: Sizes of the part "front"; None for no means.
      front_densities: Its densities.
      first_layer_densities: Those of the part "first_layer".
      attentions: What is combined with caches and precisions.
      cache_rules: Rules of step caches that are combined with attention.
    """

    means: tuple[MeansSize | None, ...] = FRONT_MEANS
    front_densities: tuple[float, ...] = FRONT_DENSITIES
    first_layer_densities: tuple[float, ...] = (0.25, 0.1, 0.05)
    attentions: tuple[Combination, ...] = ATTENTIONS
    cache_rules: tuple[str, ...] = CACHE_RULES


WHOLE = Extent()
# Sizes that differ in a video of four latent frames, and one of each other kind.
SMALL = Extent(
    means=((1, 2, 8), (2, 2, 8), (4, 4, 8), None),
    front_densities=(0.25, 0.1),
    first_layer_densities=(0.1,),
    attentions=(Combination(), PAPER_90, DEFAULT_90),
    cache_rules=("easy:0.2,2",),  # which skips two of six steps
)


def front(extent: Extent = WHOLE) -> list[Trial]:
    """Splits of a budget between exact blocks and means of several sizes."""
    return [
        Trial(
            part="front",
            name=name,
            density=density,
            attention=plan_at(config, density),
        )
        for name, config in front_configs(extent.means).items()
        for density in extent.front_densities
    ]


def combinations(extent: Extent = WHOLE) -> list[Combination]:
    """Sparse attention, step caches and FP8 linears: each alone, in pairs, and all.

    The paper's selection is what others are compared with, so it has no cache.
    """
    precisions: tuple[Linears, ...] = ("bfloat16", "float8")
    found = [
        dataclasses.replace(attention, cache=cache, linears=linears)
        for attention in extent.attentions
        for cache in (None, *(extent.cache_rules if attention != PAPER_90 else ()))
        for linears in precisions
    ]
    return [each for each in found if each != Combination()]  # the reference


def make_trials(
    part: Part,
    *,
    names: Sequence[str],
    densities: Sequence[float],
    top_p: Mapping[str, float],
    num_steps: int,
    presets: Sequence[Combination] = (),
    extent: Extent = WHOLE,
) -> list[Trial]:
    """Returns the trials of a part; none for "layers", which has no videos.

    Args:
      part: Which part.
      names: Methods of `METHODS`.
      densities: Densities of the methods.
      top_p: See `methods.config_at`.
      num_steps: Steps of the videos.
      presets: What was chosen of the combinations.
      extent: How much of the parts "front" and "combinations".
    """
    makers: dict[str, Callable[[], list[Trial]]] = {
        "floor": floor,
        "methods": lambda: methods(names, densities, top_p),
        "first_layer": lambda: first_layer(extent.first_layer_densities),
        "front": lambda: front(extent),
        "schedules": lambda: schedules(num_steps),
        "combinations": lambda: [
            each.trial("combinations") for each in combinations(extent)
        ],
        "presets": lambda: [
            each.trial("presets") for each in dict.fromkeys((PAPER_90, *presets))
        ],
        "layers": list,
    }
    return makers[part]()
