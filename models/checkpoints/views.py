"""Views of a checkpoint's arrays: under other keys, or without some of them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.conversion import file_of
from models.checkpoints.listing import list_names
from models.checkpoints.memory_map import CheckpointError


@dataclasses.dataclass(frozen=True)
class Renamed(Mapping[str, Any]):
    """Some arrays of a checkpoint under other keys, read when they are asked for.

    Attributes:
      source: The checkpoint.
      stored: Key in `source` by key here.
    """

    source: Mapping[str, Any]
    stored: Mapping[str, str]

    def __getitem__(self, key: str) -> Any:
        return self.source[self.stored[key]]

    def file_of(self, key: str) -> Path | None:
        """Returns the file of a key, if `source` knows it."""
        return file_of(self.source, self.stored[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def without_keys(source: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Any]:
    """Returns a checkpoint less some keys; itself if it has none of them."""
    if not any(key in source for key in keys):
        return source
    return Renamed(source, {key: key for key in source if key not in keys})


def without_prefix(
    source: Mapping[str, Any], prefixes: Sequence[str]
) -> Mapping[str, Any]:
    """Takes from each key the first of some prefixes that any key has.

    Raises:
      CheckpointError: Other keys lack it: the file holds more than one model.
    """
    for prefix in prefixes:
        stored = {
            key.removeprefix(prefix): key for key in source if key.startswith(prefix)
        }
        others = [key for key in source if not key.startswith(prefix)]
        if stored and others:
            raise CheckpointError(
                f"{name_of(source)} holds {len(stored)} keys that start with "
                f"{prefix!r} and {len(others)} others, {list_names(others)}; expected "
                "a file of one part of a model"
            )
        if stored:
            return Renamed(source, stored)
    return source


def name_of(source: Mapping[str, Any]) -> str:
    """Returns the name of a checkpoint's file for messages."""
    file = next((file_of(source, key) for key in source), None)
    return "the checkpoint" if file is None else str(file)
