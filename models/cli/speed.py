"""What `--speed` chooses together, as plain data: made without importing jax."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from models.cli import choices
from models.cli.cache_options import parse_cache

# Options with a value where neither the user nor a preset of speed gives one.
_DEFAULTS: dict[str, Any] = {
    "method": choices.METHODS[0],
    "preset": choices.PRESETS[0],
    "linears": choices.LINEARS[0],
    "cache": None,
    "speed": None,
}
_OF_SPARSE_ATTENTION = ("method", "sparsity", "dense_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Sparse attention, a step cache and a precision that were measured together.

    Attributes:
      method: As `--method`.
      sparsity: As `--sparsity`.
      dense_fraction: As `--dense-fraction`.
      cache: As `--cache`; None to compute every step.
      linears: Precision of the linear layers.
    """

    method: Literal["compensated", "paper"]
    sparsity: float
    dense_fraction: float
    cache: str | None
    linears: Literal["bfloat16", "float8"]

    def options(self) -> dict[str, Any]:
        """Returns parsed options by name, FP8 only where a GPU is faster with it."""
        return dataclasses.asdict(self) | {
            "cache": None if self.cache is None else parse_cache(self.cache),
            "linears": "auto" if self.linears == "float8" else self.linears,
        }


# `benchmarks.quality.presets` chooses them by what its lab has measured, on a GPU.
SPEEDS: Mapping[str, Speed] = {
    "balanced": Speed(
        method="compensated",
        sparsity=0.9,
        dense_fraction=0.25,
        cache="mag:0.24,6",
        linears="bfloat16",
    ),
    "fast": Speed(
        method="compensated",
        sparsity=0.9,
        dense_fraction=0.25,
        cache="mag:0.24,6",
        linears="float8",
    ),
    "fastest": Speed(
        method="compensated",
        sparsity=0.9,
        dense_fraction=0.1,
        cache="mag:0.24,6",
        linears="float8",
    ),
}


def add_speed_option(parser: argparse.ArgumentParser) -> None:
    """Adds the presets, with the values that each stands for."""
    presets = "; ".join(
        f"{name}: {' '.join(map(_value, speed.options().values()))}"
        for name, speed in SPEEDS.items()
    )
    parser.add_argument(
        "--speed",
        choices=tuple(SPEEDS),
        help="choose --method, --sparsity, --dense-fraction, --cache and --linears "
        "together, as they were measured, from the nearest to dense attention to the "
        f"fastest ({presets}). What is given beside it wins, such as --cache none; so "
        "do the dense steps of --preset, and the sparsity of --preset published. With "
        "--dense only cache and linears are chosen. With --compare both videos have "
        "the precision, and every step of the dense one is computed",
    )


def settle(arguments: argparse.Namespace) -> None:
    """Gives options that were left out the values of `--speed`, or their defaults.

    Args:
      arguments: The parsed command line. What is missing is added, and `by_speed`: the
        values of the preset that were taken, by the names of their options.
    """
    taken = _taken(arguments)
    for name, value in (_DEFAULTS | taken).items():
        if name not in arguments:
            setattr(arguments, name, value)
    arguments.by_speed = taken


def _taken(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the preset that nothing else decides."""
    speed = getattr(arguments, "speed", None)
    if speed is None:
        return {}
    decided = set(vars(arguments))
    if arguments.dense:
        decided.update(_OF_SPARSE_ATTENTION)
    if "preset" in arguments:
        decided.add("dense_fraction")
        if arguments.preset == "published":
            decided.add("sparsity")
    options = SPEEDS[speed].options()
    return {name: value for name, value in options.items() if name not in decided}


def name_option(arguments: argparse.Namespace, name: str) -> str:
    """Returns an option as one types it, or the preset of speed that asks for it."""
    text = _as_typed({name: getattr(arguments, name)})
    if name in arguments.by_speed:
        return f"--speed {arguments.speed}, which is {text}"
    return text


def describe_speed(arguments: argparse.Namespace) -> list[str]:
    """Returns a line on what the preset has chosen; nothing without one."""
    if arguments.speed is None:
        return []
    chosen = _as_typed(arguments.by_speed) or "nothing, for all is given otherwise"
    return [f"speed: {arguments.speed} chose {chosen}"]


def speed_details(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the preset and what it has chosen, ready for strict JSON."""
    if arguments.speed is None:
        return None
    chosen = {
        name: _value(value) if name == "cache" else value
        for name, value in arguments.by_speed.items()
    }
    return {"preset": arguments.speed} | chosen


def _as_typed(options: Mapping[str, Any]) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {_value(value)}" for name, value in options.items()
    )


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
