"""Adapters merged into a checkpoint's weights as they are loaded.

Each weight is merged when it is read, on the device. So a model that is loaded array by
array needs no memory for its adapters.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.conversion import ConversionError, file_of
from models.checkpoints.listing import list_problems, shorten
from models.checkpoints.lora.formulas import Change, MergedArray
from models.checkpoints.lora.keys import sort_by_module
from models.checkpoints.lora.modules import ModuleReader
from models.checkpoints.lora.problems import Problem
from models.checkpoints.lora.rows import (
    JoinedWeights,
    RowChange,
    Target,
    split_change,
)
from models.checkpoints.lora.strengths import Strengths, read_strengths
from models.checkpoints.safetensors_io import SafetensorsReader, load_safetensors


@dataclasses.dataclass(frozen=True)
class MergedWeights(Mapping[str, Any]):
    """A checkpoint's weights with adapters; see `merge_lora`.

    Attributes:
      weights: The weights before the adapters.
      changes: What adapters do to a weight, by key of `weights`.
    """

    weights: Mapping[str, Any]
    changes: Mapping[str, Sequence[Change | RowChange]]

    def __getitem__(self, key: str) -> Any:
        weight = self.weights[key]
        return MergedArray(weight, self.changes[key]) if key in self.changes else weight

    def file_of(self, key: str) -> Path | None:
        """Returns the file of the weight, if `weights` knows it."""
        return file_of(self.weights, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def merge_lora(
    weights: Mapping[str, Any],
    lora: str | os.PathLike | Mapping[str, Any],
    names: Mapping[str, Target],
    *,
    scale: float = 1.0,
    strict: bool = True,
    features: Mapping[str, str] | None = None,
) -> MergedWeights:
    """Adds an adapter to a checkpoint's weights.

    LoRA, LoCon, LoKr, LoHa, DoRA and whole differences are merged exactly; see
    `formulas`. Where the strength of an adapter is found is said in `strengths`.

    Args:
      weights: Arrays by key, as published: linear layers are [out, in]. Another
        `MergedWeights` adds one adapter to others, each to what is before it.
      lora: The adapter's `.safetensors` file, PEFT's folder, or arrays by key.
      names: For each way to spell a module or a parameter, the one in `weights`, up
        to ".weight" and ".bias"; or the rows of some that it is.
      scale: Strength of the adapter; 0 leaves the weights as they are, 1 is what it
        was trained for.
      strict: Whether tensors that mean nothing to this model are refused; else they
        are skipped with a warning.
      features: Names of models' parts that `weights` may lack, by a part of their
        modules' names; they are said of tensors for them.

    Returns:
      The same keys. Weights that the adapter changes are `MergedArray`s.

    Raises:
      CheckpointError: The file is missing or damaged, or its settings are.
      ConversionError: Tensors belong to no weight or are of an unknown kind, have
        another shape, or stand without their other half; or places that say the
        strength disagree. The message counts them, and lists the first of each kind.
      ValueError: `scale` is not finite.

    Warns:
      UserWarning: The strength is not said, or tensors are skipped.
    """
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be a finite number")
    origin = "the adapter"
    if not isinstance(lora, Mapping):
        origin = f"the adapter {os.fspath(lora)}"
        lora = load_safetensors(lora)
    strengths = Strengths()
    if isinstance(lora, SafetensorsReader):
        strengths = read_strengths(lora.metadata, lora.files[0].parent, origin)
    modules, problems = sort_by_module(lora, names, features or {})
    changes: dict[str, list[Change | RowChange]] = {}
    notes: list[str] = []
    num_unknown = 0
    for target, parts in modules.items():
        if isinstance(target, str):
            reader = ModuleReader(target, parts, weights, strengths)
        else:
            whole = JoinedWeights(target, weights)
            reader = ModuleReader(str(target), parts, whole, strengths)
        for key, change in _of_weights(target, reader):
            changes.setdefault(key, []).append(change.scaled(scale))
        problems += reader.problems
        notes += reader.notes
        num_unknown += reader.num_unknown
    _refuse(origin, problems, len(lora), strict=strict, has_changes=bool(changes))
    if problems:
        lines = list_problems([str(problem) for problem in problems])
        notes.append(f"skipped {len(problems)} parts in {len(lora)} keys:{lines}")
    if num_unknown:
        notes.append(
            f"it does not say its alpha ({num_unknown} modules); the rank is taken for "
            "it, a factor of 1, as diffusers and ComfyUI do. PEFT's is in "
            "adapter_config.json, which belongs beside the file"
        )
    _warn(origin, notes)
    return MergedWeights(weights, changes)


def _of_weights(
    target: Target, reader: ModuleReader
) -> Iterator[tuple[str, Change | RowChange]]:
    """Returns the changes of a module by key of the model's weights."""
    for key, change in reader.read():
        if isinstance(target, str):
            yield key, change
            continue
        try:
            yield from split_change(key, change, target)
        except ValueError as error:
            text = f"{next(iter(reader.parts.values())).key}: {error}"
            reader.problems.append(Problem("rows", text))


def _refuse(
    origin: str,
    problems: Sequence[Problem],
    num_tensors: int,
    *,
    strict: bool,
    has_changes: bool,
) -> None:
    """Raises for problems, but for those that may be skipped."""
    refused = [p for p in problems if strict or not p.may_skip]
    remedy = ""
    if not refused and not has_changes:
        refused = list(problems) or [Problem("empty", "it holds nothing")]
    elif strict and all(problem.may_skip for problem in problems):
        remedy = " (strict=False, or --lora-strict no, merges the rest)"
    if refused:
        lines = list_problems([str(problem) for problem in refused])
        raise ConversionError(
            f"{shorten(origin, 120)} does not fit the weights; {len(refused)} problems "
            f"in {num_tensors} keys{remedy}:{lines}",
            map(str, refused),
        )


def _warn(origin: str, notes: Iterable[str]) -> None:
    """Tells each doubt once; those of many modules differ in their names alone."""
    for note in dict.fromkeys(notes):
        warnings.warn(f"{shorten(origin, 120)}: {note}", stacklevel=3)
