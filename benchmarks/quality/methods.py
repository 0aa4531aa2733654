"""The sparse methods of the field, all through the block-sparse kernel of this package.

A method is a `DraftConfig`, whatever makes its masks; what is measured of one is
measured of all. Each follows its paper as far as blocks of one frame's tile allow; the
classes in `patterns` and `rankings` say where not.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.quality.patterns import Radial, SlidingTiles, SpatialTemporalHeads
from benchmarks.quality.rankings import Chance, TrueMasses
from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule

DENSITIES = (0.45, 0.25, 0.15, 0.1, 0.05)  # shares of block pairs that are kept
DENSE_FRACTION = 0.25  # of the steps, the paper's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of sparse attention.

    Attributes:
      title: Its name in tables.
      source: Where it is published.
      config: What it computes, at any sparsity.
      is_bound: Whether it is the oracle, whose masks cost more than dense attention:
        its layer is not timed.
    """

    title: str
    source: str
    config: DraftConfig
    is_bound: bool = False


METHODS: Mapping[str, Method] = {
    "ours": Method(
        title="sub-tile draft, means for the dropped",
        source="this package, its default `DraftConfig()`",
        config=DraftConfig.compensated(),
    ),
    "paper": Method(
        title="DraftAttention",
        source="arXiv 2505.14708, `DraftConfig.paper()`",
        config=DraftConfig.paper(),
    ),
    "row_topk": Method(
        title="draft, equal rows",
        source='this package, `selection="row_topk"`',
        config=DraftConfig.paper(selection="row_topk"),
    ),
    "top_p": Method(
        title="draft, mass per row",
        source='this package, `selection="top_p"`, as others take a share of mass',
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
        config=DraftConfig.paper(mask_maker=SlidingTiles()),
    ),
    "spatial_temporal": Method(
        title="spatial and temporal heads (SVG)",
        source="arXiv 2502.01776",
        config=DraftConfig.paper(mask_maker=SpatialTemporalHeads()),
    ),
    "radial": Method(
        title="radial decay",
        source="arXiv 2506.19852",
        config=DraftConfig.paper(mask_maker=Radial()),
    ),
    "oracle": Method(
        title="oracle: true masses",
        source="no method: costs more than dense attention",
        config=DraftConfig.paper(selection="row_topk", mask_maker=TrueMasses()),
        is_bound=True,
    ),
    "random": Method(
        title="random blocks",
        source="no method: the least that one has to beat",
        config=DraftConfig.paper(selection="row_topk", mask_maker=Chance()),
    ),
}


def sparsity_of(density: float) -> float:
    """Returns the sparsity of a density, as the decimal that is meant."""
    return round(1.0 - density, 6)


def config_at(
    name: str,
    density: float,
    *,
    densities: Sequence[float],
    top_p: Mapping[str, float],
) -> DraftConfig:
    """Returns what a method computes, with room for all densities where it can be.

    Programs of a method then serve all its densities; the schedule tells them apart.

    Args:
      name: A key of `METHODS`.
      density: Share of block pairs to keep.
      densities: All that are asked for.
      top_p: For "top_p", the mass of each row at which it keeps a density; its masks
        have room for all pairs.
    """
    config = METHODS[name].config
    if name == "top_p":
        return dataclasses.replace(config, sparsity=0.0, top_p=top_p[str(density)])
    return dataclasses.replace(config, sparsity=sparsity_of(max(densities)))


def plan_at(
    name: str,
    density: float,
    *,
    densities: Sequence[float],
    top_p: Mapping[str, float],
) -> AttentionPlan:
    """Returns a method at a density, after the paper's dense steps; see `config_at`."""
    config = config_at(name, density, densities=densities, top_p=top_p)
    sparsity = config.sparsity if name == "top_p" else sparsity_of(density)
    schedule = SparsitySchedule(dense_fraction=DENSE_FRACTION, sparsity=sparsity)
    return AttentionPlan.draft(config, schedule)
