"""The sparse methods of the field, all through the block-sparse kernel of this package.

A method is a `DraftConfig`, whatever makes its masks; what is measured of one is
measured of all. Each follows its paper as far as blocks of one frame's tile allow; the
makers in `patterns` and `rankings` say where not. One program serves all densities of a
method: the budget is its argument.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from benchmarks.quality.patterns import (
    even_sliding_tiles,
    radial,
    sliding_tiles,
    spatial_temporal_heads,
)
from benchmarks.quality.rankings import MassPerRow, chance, true_masses
from draft_jax import AttentionPlan, Correction, DraftConfig, SparsitySchedule

DENSITIES = (0.45, 0.25, 0.15, 0.1, 0.05)  # shares of block pairs that are kept
DENSE_FRACTION = 0.25  # of the steps, the paper's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of sparse attention.

    Attributes:
      title: Its name in tables.
      source: Where it is published.
      config: What it computes, at any sparsity.
      timed: What a layer computes whose choices were made before, where the method
        makes some once and not in each layer; None for `config`.
      is_bound: Whether it is the oracle, whose masks cost more than dense attention:
        its layer is not timed.
    """

    title: str
    source: str
    config: DraftConfig
    timed: DraftConfig | None = None
    is_bound: bool = False


METHODS: Mapping[str, Method] = {
    "ours": Method(
        title="the default: means and a fitted map",
        source="this package, its default `DraftConfig()`",
        config=DraftConfig(),
    ),
    "means": Method(
        title="the default without the map",
        source="this package, `DraftConfig(correction=None)`",
        config=DraftConfig(correction=None),
    ),
    "paper": Method(
        title="DraftAttention",
        source="arXiv 2505.14708, `DraftConfig.paper()`",
        config=DraftConfig.paper(),
    ),
    "paper_corrected": Method(
        title="DraftAttention with the map",
        source="this package, `DraftConfig.paper(correction=Correction())`",
        config=DraftConfig.paper(correction=Correction()),
    ),
    "row_topk": Method(
        title="draft, equal rows",
        source='this package, `selection="row_topk"`',
        config=DraftConfig.paper(selection="row_topk"),
    ),
    "top_p": Method(
        title="draft, mass per row",
        source='this package, as `selection="top_p"`; others take a share of mass, too',
        config=DraftConfig.paper(selection="top_p"),
    ),
    "mean_max": Method(
        title="draft of means and maxima",
        source='this package, `pooling="mean+max"`',
        config=DraftConfig.paper(pooling="mean+max"),
    ),
    "sliding_tile": Method(
        title="sliding tiles (STA)",
        source="arXiv 2502.04507",
        config=DraftConfig.paper(mask_maker=sliding_tiles),
        timed=DraftConfig.paper(mask_maker=even_sliding_tiles),
    ),
    "spatial_temporal": Method(
        title="spatial and temporal heads (SVG)",
        source="arXiv 2502.01776",
        config=DraftConfig.paper(mask_maker=spatial_temporal_heads),
    ),
    "radial": Method(
        title="radial decay",
        source="arXiv 2506.19852",
        config=DraftConfig.paper(mask_maker=radial),
    ),
    "oracle": Method(
        title="oracle: true masses",
        source="no method: costs more than dense attention",
        config=DraftConfig.paper(selection="row_topk", mask_maker=true_masses),
        is_bound=True,
    ),
    "random": Method(
        title="random blocks",
        source="no method: the least that one has to beat",
        config=DraftConfig.paper(selection="row_topk", mask_maker=chance),
    ),
}


def sparsity_of(density: float) -> float:
    """Returns the sparsity of a density, as the decimal that is meant."""
    return round(1.0 - density, 6)


def first_sparse_step(num_steps: int) -> int:
    """Returns the first step that is not dense."""
    return math.ceil(DENSE_FRACTION * num_steps)


def config_at(
    name: str, densities: Sequence[float], top_p: Mapping[str, float]
) -> DraftConfig:
    """Returns what a method computes, with room for all densities.

    Args:
      name: A key of `METHODS`.
      densities: All that are asked for.
      top_p: For "top_p", the mass of each row at which it keeps each density; its
        masks have room for all pairs.
    """
    config = METHODS[name].config
    if name != "top_p":
        return dataclasses.replace(config, sparsity=sparsity_of(max(densities)))
    ascending = tuple(sorted(densities))
    masses = tuple(top_p[str(density)] for density in ascending)
    maker = MassPerRow(densities=ascending, masses=masses)
    # Rows have a budget each, so that the density of a budget is known.
    return dataclasses.replace(
        config, selection="row_topk", sparsity=0.0, mask_maker=maker
    )


def plan_at(
    config: DraftConfig, density: float, dense_layers: tuple[int, ...] = ()
) -> AttentionPlan:
    """Returns a configuration at a density, after the paper's dense steps."""
    schedule = SparsitySchedule(
        dense_fraction=DENSE_FRACTION,
        dense_layers=dense_layers,
        sparsity=sparsity_of(density),
    )
    return AttentionPlan.draft(config, schedule)
