"""The objects that the options of several commands stand for."""

import argparse
import dataclasses

from draft_jax.config import DraftConfig
from draft_jax.schedule import SparsitySchedule
from models.cli.choices import GRIDS_OF_SOLVERS
from models.diffusion.sampling import Sampling, check_seed

_SHIPPED = Sampling()


def sampling_from(
    arguments: argparse.Namespace, default: Sampling | None = None
) -> Sampling:
    """Returns the sampling that the options describe.

    Args:
      arguments: The parsed command line.
      default: Settings of the checkpoint, taken where the options are silent. None
        while it is not known: those of the shipped model are taken then, and a grid
        without a solver is not looked at.

    Raises:
      ValueError: A value is out of range, or the solver has no such grid.
    """
    fields = {field.name for field in dataclasses.fields(Sampling)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    for seed in getattr(arguments, "seeds", ()):
        check_seed("seed", seed)
        given.setdefault("seed", seed)  # the first of several
    if "size" in arguments:
        given["width"], given["height"] = arguments.size
    if default is None and "solver" not in given:
        given.pop("grid", None)
    default = _SHIPPED if default is None else default
    solver = given.get("solver", default.solver)
    if solver != default.solver:
        given.setdefault("grid", None)
    grid = given.get("grid")
    if grid is not None and grid not in GRIDS_OF_SOLVERS[solver]:
        raise ValueError(
            f"--grid {grid} is none of the solver {solver}, which has "
            f"{' and '.join(GRIDS_OF_SOLVERS[solver])}"
        )
    return dataclasses.replace(default, **given)


def draft_from(arguments: argparse.Namespace) -> tuple[DraftConfig, SparsitySchedule]:
    """Returns the draft's settings and the schedule that the options describe."""
    config = DraftConfig(
        pooling=arguments.pooling,
        edge_tiles=arguments.edge_tiles,
        selection=arguments.selection,
        sparsity=arguments.sparsity,
        top_p=arguments.top_p,
    )
    schedule = SparsitySchedule(
        dense_fraction=arguments.dense_fraction,
        dense_layers=arguments.dense_layers,
        mask_refresh=arguments.mask_refresh,
    )
    return config, schedule
