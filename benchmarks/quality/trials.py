"""Trials of the lab: what is measured, one attention at one density at a time."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from benchmarks.quality.methods import DENSE_FRACTION, plan_at, sparsity_of
from draft_jax import AttentionPlan, Compensation, DraftConfig, SparsitySchedule
from models.diffusion.dtypes import Linears

# What a run measures; each has trials of its own, but for layers.
Part = Literal["floor", "methods", "layers", "front", "schedules", "combinations"]
PARTS: tuple[Part, ...] = get_args(Part)
ON_TUNING_PROMPTS = ("front", "schedules")  # something is chosen by them

FRONT_SUB_TILES = ((1, 2), (2, 2), (2, 4), (4, 4))
FRONT_FRAMES = (1, 4, 8)
FRONT_DENSITIES = (0.15, 0.1, 0.05, 0.025)
SCHEDULE_DENSITY = 0.1
CACHE_RULES = ("easy:0.05,4", "mag:0.12,2")


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
    """

    part: Part
    name: str
    density: float
    attention: AttentionPlan
    cache: str | None = None
    linears: Linears = "bfloat16"

    @property
    def key(self) -> tuple[str, str, float]:
        """Tells the trial from all others."""
        return self.part, self.name, self.density

    @property
    def on_tuning_prompts(self) -> bool:
        """Whether its videos are of tuning prompts."""
        return self.part in ON_TUNING_PROMPTS


def floor() -> list[Trial]:
    """Dense attention by two kernels: no sparsity can be told from less than this.

    The block-sparse kernel has all pairs and the first steps, too; it computes what the
    dense one does in another order.
    """
    plan = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0), SparsitySchedule())
    name = "all pairs by the block-sparse kernel, every step"
    return [Trial(part="floor", name=name, density=1.0, attention=plan)]


def methods(
    names: Sequence[str], densities: Sequence[float], top_p: Mapping[str, float]
) -> list[Trial]:
    """All methods at all densities."""
    return [
        Trial(
            part="methods",
            name=name,
            density=density,
            attention=plan_at(name, density, densities=densities, top_p=top_p),
        )
        for name, density in itertools.product(names, densities)
    ]


def front() -> list[Trial]:
    """Splits of a budget between exact blocks and means of several sizes."""
    least = sparsity_of(max(FRONT_DENSITIES))
    return [
        Trial(
            part="front",
            name=front_name(*size, frames),
            density=density,
            attention=AttentionPlan.draft(
                DraftConfig.compensated(
                    sparsity=least,
                    compensation=Compensation(sub_tile=size, frames=frames),
                ),
                SparsitySchedule(
                    dense_fraction=DENSE_FRACTION, sparsity=sparsity_of(density)
                ),
            ),
        )
        for size, frames, density in itertools.product(
            FRONT_SUB_TILES, FRONT_FRAMES, FRONT_DENSITIES
        )
    ]


def front_name(rows: int, columns: int, frames: int) -> str:
    """Returns the name of a size of means."""
    return f"means of {rows}x{columns}x{frames}"


def schedules(num_steps: int) -> list[Trial]:
    """Reused masks, and densities that fall or rise at a fixed mean."""
    sparse = num_steps - math.ceil(DENSE_FRACTION * num_steps)
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
        "constant": {"sparsity": sparsity_of(SCHEDULE_DENSITY)},
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


def combinations(rules: Sequence[str] = CACHE_RULES) -> list[Trial]:
    """Sparse attention, step caches and FP8 linears: each alone, in pairs, and all."""
    schedule = SparsitySchedule(dense_fraction=DENSE_FRACTION)
    attentions = {
        "dense": (1.0, AttentionPlan.dense()),
        "paper": (0.1, AttentionPlan.draft(DraftConfig.paper(sparsity=0.9), schedule)),
        "ours": (0.1, AttentionPlan.draft(DraftConfig.compensated(), schedule)),
    }
    precisions: tuple[Linears, ...] = ("bfloat16", "float8")
    found = []
    for (name, (density, attention)), rule, linears in itertools.product(
        attentions.items(), (None, *rules), precisions
    ):
        parts = [name, *([rule] if rule else []), linears]
        found.append(
            Trial(
                part="combinations",
                name=" + ".join(parts),
                density=density,
                attention=attention,
                cache=rule,
                linears=linears,
            )
        )
    return found


def make_trials(
    part: Part,
    *,
    names: Sequence[str],
    densities: Sequence[float],
    top_p: Mapping[str, float],
    num_steps: int,
) -> list[Trial]:
    """Returns the trials of a part; none for "layers", which has no videos.

    Args:
      part: Which part.
      names: Methods of `METHODS`.
      densities: Densities of the methods.
      top_p: See `methods.config_at`.
      num_steps: Steps of the videos.
    """
    makers: dict[str, Callable[[], list[Trial]]] = {
        "floor": floor,
        "methods": lambda: methods(names, densities, top_p),
        "front": front,
        "schedules": lambda: schedules(num_steps),
        "combinations": combinations,
        "layers": list,
    }
    return makers[part]()
