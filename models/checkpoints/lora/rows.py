"""Modules that an adapter joins or splits otherwise than the checkpoint does.

One layout stores queries, keys and values as one linear layer, another apart. An
adapter for one of them is merged into weights in the other, row by row.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints.lora.formulas import Change, Rescaled
from models.checkpoints.rules import Lookup, Rule

_ENDINGS = (".weight", ".bias")


class Rows(NamedTuple):
    """Rows of an adapter's module, and the rows of the checkpoint's that they are.

    Attributes:
      module: Name in the checkpoint.
      start: First of the adapter's rows.
      stop: One past the last of them.
      place: First of the checkpoint's rows.
    """

    module: str
    start: int
    stop: int
    place: int


type Target = str | tuple[Rows, ...]  # a module of the checkpoint, or parts of some


class RowChange(NamedTuple):
    """A change of an adapter's module, made to some rows of a weight.

    Attributes:
      change: The change of all rows of the adapter's module.
      rows: Those that are in the weight.
      total: Rows of the adapter's module.
    """

    change: Change
    rows: Rows
    total: int

    def apply(self, weight: jax.Array) -> jax.Array:
        """Returns the weight with its rows changed."""
        start, stop, place = self.rows[1:]
        there = slice(place, place + stop - start)
        part = weight[there]
        # Changes are row by row: rows that lie elsewhere are zero here.
        whole = jnp.zeros((self.total, *part.shape[1:]), part.dtype)
        whole = whole.at[start:stop].set(part)
        return weight.at[there].set(self.change.apply(whole)[start:stop])

    def scaled(self, scale: float) -> "RowChange":
        """Returns it at another strength."""
        return self._replace(change=self.change.scaled(scale))


class JoinedWeights(Mapping[str, Any]):
    """Shapes of an adapter's module: rows of several weights one after the other."""

    def __init__(self, rows: Sequence[Rows], weights: Mapping[str, Any]) -> None:
        self._shapes: dict[str, Any] = {}
        for ending in _ENDINGS:
            if all(f"{part.module}{ending}" in weights for part in rows):
                first = weights[f"{rows[0].module}{ending}"]
                shape = (total_rows(rows), *first.shape[1:])
                self._shapes[f"{rows}{ending}"] = jax.ShapeDtypeStruct(
                    shape, np.float32
                )

    def __getitem__(self, key: str) -> Any:
        return self._shapes[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def total_rows(rows: Sequence[Rows]) -> int:
    """Returns the rows of an adapter's module."""
    return rows[-1].stop


def split_change(
    key: str, change: Change, rows: Sequence[Rows]
) -> list[tuple[str, RowChange]]:
    """Returns a change of an adapter's module by key of the checkpoint's weights.

    Raises:
      ValueError: The change is not row by row.
    """
    if isinstance(change, Rescaled) and not change.by_row:
        raise ValueError("DoRA by columns needs the layer as the adapter has it")
    ending = key[key.rindex(".") :]
    total = total_rows(rows)
    return [(f"{part.module}{ending}", RowChange(change, part, total)) for part in rows]


def targets_by_spelling(
    keys: Iterable[str],
    rules: Sequence[Rule],
    tables: Iterable[Sequence[Rule]],
    num_rows: Mapping[str, int],
) -> dict[str, Target]:
    """Returns what each layout's name of a module is in a checkpoint.

    Args:
      keys: Keys of the checkpoint.
      rules: Table of its layout.
      tables: Tables of all layouts.
      num_rows: Rows of our parameters that a layout joins, by the attribute that holds
        them, the last but one part of their path.

    Returns:
      Names with dots, and where in the checkpoint their rows are.
    """

    def spans(paths: Sequence[str]) -> list[tuple[str, int, int]]:
        start, found = 0, []
        for path in paths:
            stop = start
            if len(paths) > 1 or path in joined:
                stop += num_rows[path.split(".")[-2]]
            found.append((path, start, stop))
            start = stop
        return found

    lookup = Lookup(rules)
    filled = [(key, paths) for key in keys for paths, _ in lookup.of_key(key)]
    joined = {path for _, paths in filled if len(paths) > 1 for path in paths}
    owners = {
        path: (_module(key), paths, start)
        for key, paths in filled
        for path, start, _ in spans(paths)
    }
    of_all_tables = Lookup(itertools.chain.from_iterable(tables))
    targets: dict[str, Target] = {}
    for path, (base, together, _) in owners.items():
        for spelled, rule in of_all_tables.of_path(path):
            paths = rule.paths_of(spelled)
            if paths == together:
                targets[_module(spelled)] = base
            elif all(part in owners for part in paths):
                targets[_module(spelled)] = tuple(
                    Rows(owners[part][0], start, stop, owners[part][2])
                    for part, start, stop in spans(paths)
                )
    return targets


def _module(key: str) -> str:
    for ending in _ENDINGS:
        key = key.removesuffix(ending)
    return key
