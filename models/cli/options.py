"""The objects that the options of several commands stand for."""

import argparse
import dataclasses
from typing import Any

from draft_jax.config import Compensation, Correction, DraftConfig
from draft_jax.schedule import SparsitySchedule
from models.cli.choices import GRIDS_OF_SOLVERS
from models.cli.pair_options import LOW_NOISE
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


def draft_from(
    arguments: argparse.Namespace, published: SparsitySchedule | None = None
) -> tuple[DraftConfig, SparsitySchedule]:
    """Returns the draft's settings and the schedule that the options describe.

    Args:
      arguments: The parsed command line.
      published: The rule of the published code for the model; of None, while the
        model is not known, the paper's is taken.

    Raises:
      ValueError: A value is out of range, or options contradict the preset.
    """
    rule = SparsitySchedule.paper()
    if arguments.preset == "published":
        if "dense_fraction" in arguments:
            raise ValueError(
                f"--dense-fraction {arguments.dense_fraction} is given with --preset "
                "published, whose dense steps are those above a noise level: leave one "
                "of the two out"
            )
        rule = rule if published is None else published
    config = _config_from(arguments)
    if isinstance(rule.sparsity, float) and "sparsity" not in arguments:
        config = dataclasses.replace(config, sparsity=rule.sparsity)
    given = {
        name: getattr(arguments, name)
        for name in ("dense_fraction", "dense_layers")
        if name in arguments
    }
    schedule = dataclasses.replace(
        rule, sparsity=None, mask_refresh=arguments.mask_refresh, **given
    )
    return _with_low_noise(arguments, config, schedule)


def _with_low_noise(
    arguments: argparse.Namespace, config: DraftConfig, schedule: SparsitySchedule
) -> tuple[DraftConfig, SparsitySchedule]:
    """Adds what the options say of a second transformer, or what the preset does."""
    low: dict[str, Any] = {
        ours: getattr(arguments, n) for n, ours in LOW_NOISE.items() if n in arguments
    }
    if not low and schedule.low_noise is None:
        return config, schedule
    low.setdefault("dense_layers", schedule.dense_layers)
    low.setdefault("sparsity", config.sparsity)
    base = schedule.low_noise or SparsitySchedule()
    rules = dataclasses.replace(base, mask_refresh=schedule.mask_refresh, **low)
    sparsities = config.sparsity, low["sparsity"]
    # The lesser sparsity has the longer lists, for which there is to be room.
    return (
        dataclasses.replace(config, sparsity=min(sparsities)),
        dataclasses.replace(schedule, sparsity=sparsities[0], low_noise=rules),
    )


def _config_from(arguments: argparse.Namespace) -> DraftConfig:
    """Returns the method's preset with the options that are given.

    Raises:
      ValueError: A value is out of range, or an option needs --means.
    """
    is_paper = arguments.method == "paper"
    base = DraftConfig.paper() if is_paper else DraftConfig.compensated()
    names = ("sparsity", "selection", "draft_tile", "ranking")
    changes = {name: getattr(arguments, name) for name in names if name in arguments}
    compensation = _compensation_from(arguments, base.compensation)
    if compensation is None and changes.get("ranking", "mass") != "mass":
        raise ValueError(
            f"--ranking {arguments.ranking} asks how badly means stand for a block: "
            "pass --means 2x2, too"
        )
    return dataclasses.replace(
        base,
        pooling=arguments.pooling,
        edge_tiles=arguments.edge_tiles,
        top_p=arguments.top_p,
        compensation=compensation,
        correction=_correction_from(arguments, base.correction),
        **changes,
    )


def _compensation_from(
    arguments: argparse.Namespace, default: Compensation | None
) -> Compensation | None:
    """Returns the means that the options describe, or None without them."""
    changes: dict[str, Any] = {}
    if "means" in arguments:
        default = default or Compensation()
        changes["sub_tile"] = arguments.means
    if "mean_frames" in arguments:
        changes["frames"] = arguments.mean_frames
        if default is None:
            raise ValueError(
                f"--mean-frames {arguments.mean_frames} is given without --means: pass "
                "--means 2x2, or leave it out"
            )
    return None if default is None else dataclasses.replace(default, **changes)


def _correction_from(
    arguments: argparse.Namespace, default: Correction | None
) -> Correction | None:
    """Returns the correction that the options describe, or None without one."""
    if "correction" not in arguments:
        return default
    if arguments.correction == 0:
        return None
    return dataclasses.replace(default or Correction(), samples=arguments.correction)


def check_preset(
    arguments: argparse.Namespace, published: SparsitySchedule | None
) -> None:
    """Checks that there is a published rule for the model, if it is asked for.

    Raises:
      ValueError: There is none.
    """
    if arguments.preset == "published" and published is None:
        raise ValueError(
            "--preset published: there is no published rule for this model; expected "
            "paper"
        )
