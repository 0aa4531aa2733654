"""Reads and writes safetensors checkpoints, whole or in shards.

Tensors are mapped into memory one by one: opening a checkpoint reads its headers.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from models.checkpoints.files import find_visible
from models.checkpoints.listing import list_names
from models.checkpoints.memory_map import CheckpointError, map_array
from models.files import write_whole

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}


class _Entry(NamedTuple):
    """The place of a tensor in a file, its dtype and shape."""

    file: Path
    offset: int  # bytes, from the start of the file
    dtype: str  # as the format calls it
    shape: tuple[int, ...]


class SafetensorsReader(Mapping[str, np.ndarray]):
    """Tensors of one checkpoint by key, each read from disk when it is used.

    A tensor is a read-only view of its file. Shape and dtype cost no reading, and only
    tensors that are held take memory.

    Args:
      path: A `.safetensors` file, or a directory with one checkpoint: a single
        file, or shards with or without their index.
      stem: In a directory with several checkpoints, the name of the one to read,
        up to ".safetensors" or "-00001-of-...".

    Attributes:
      files: The files that were opened, in order.
      metadata: Texts by name, which the files carry beside their tensors.

    Raises:
      CheckpointError: Nothing is there, several checkpoints are and no stem tells
        which, a shard is missing or lacks a key that the index promises, or a file
        is damaged. The file is named, and the key where one is concerned.
    """

    def __init__(self, path: str | os.PathLike, *, stem: str | None = None) -> None:
        self.files = find_files(Path(path), stem)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        for file in self.files:
            entries, metadata = _read_header(file)
            self.metadata |= metadata
            for key, entry in entries.items():
                if key in self._entries:
                    raise CheckpointError(
                        f"key {key} is both in {self._entries[key].file} and in {file}"
                    )
                self._entries[key] = entry
        if Path(path).is_dir():
            _check_against_index(self.files[0], self._entries)

    def __getitem__(self, key: str) -> np.ndarray:
        file, offset, dtype, shape = self._entries[key]
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"cannot read {key} from {file}: {dtype=} is none of {list(_DTYPES)}"
            )
        try:
            return map_array(file, offset=offset, dtype=_DTYPES[dtype], shape=shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {key} from {file}: {error}") from error

    def file_of(self, key: str) -> Path:
        """Returns the file that holds a key."""
        return self._entries[key].file

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_safetensors(
    path: str | os.PathLike, *, stem: str | None = None
) -> SafetensorsReader:
    """Opens a checkpoint; see `SafetensorsReader`."""
    return SafetensorsReader(path, stem=stem)


def save_safetensors(
    tensors: Mapping[str, np.ndarray],
    directory: str | os.PathLike,
    *,
    stem: str,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes a checkpoint as `stem.safetensors`, or as shards with an index.

    Each file appears under its name only when it is complete, the index last.

    Args:
      tensors: Arrays by key.
      directory: Folder to write to, made if it does not exist.
      stem: Start of the file names.
      max_shard_bytes: Most bytes of tensors in one file; None for a single file.

    Returns:
      The tensor files, in order.

    Raises:
      ValueError: A single tensor is larger than `max_shard_bytes`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    for file in directory.iterdir():  # a run with other shard sizes leaves others
        if file.is_file() and _stem_of(file.name) == stem:
            file.unlink()
    count = len(shards)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        part = "" if count == 1 else f"-{i:05}-of-{count:05}"
        file = directory / f"{stem}{part}.safetensors"
        data = safetensors.numpy.save(
            {key: np.ascontiguousarray(value) for key, value in shard.items()},
            metadata={"format": "pt"},
        )
        write_whole(file, data)
        files.append(file)
        weight_map |= dict.fromkeys(shard, file.name)
    if count > 1:
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_whole(directory / f"{stem}{INDEX_SUFFIX}", text.encode())
    return files


def find_files(path: Path, stem: str | None = None) -> list[Path]:
    """Returns the files of one checkpoint; see `SafetensorsReader`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    names = [file.name for file in find_visible(path, "*")]
    stems = sorted({found for name in names if (found := _stem_of(name)) is not None})
    if stem is None and len(stems) == 1:
        (stem,) = stems
    if stem not in stems:
        raise CheckpointError(
            f"{path} holds the checkpoints {stems}; expected "
            + ("exactly one" if stem is None else f"one called {stem!r}")
        )
    if f"{stem}{INDEX_SUFFIX}" in names:
        weight_map = _read_index(path / f"{stem}{INDEX_SUFFIX}")
        wanted = sorted(set(weight_map.values()))
    else:
        wanted = _names_without_index(names, stem)
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(
            f"{path} lacks the checkpoint files {list_names(map(repr, missing))}"
        )
    return [path / name for name in wanted]


def _stem_of(name: str) -> str | None:
    """Returns the checkpoint that a file belongs to; None if it is none's."""
    if name.endswith(INDEX_SUFFIX):
        return name.removesuffix(INDEX_SUFFIX)
    if not name.endswith(".safetensors"):
        return None
    shard = _SHARD.fullmatch(name)
    return shard["stem"] if shard else name.removesuffix(".safetensors")


def _read_index(file: Path) -> dict[str, str]:
    """Returns the name of each key's file."""
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map must hold file names")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors index: {error!r}"
        ) from error


def _check_against_index(first: Path, entries: Mapping[str, _Entry]) -> None:
    """Finds keys that are not in the shard which the index names."""
    file = first.with_name(f"{_stem_of(first.name)}{INDEX_SUFFIX}")
    if not file.is_file():
        return
    wrong = [
        f"{key} ({name})"
        for key, name in _read_index(file).items()
        if key not in entries or entries[key].file.name != name
    ]
    if wrong:
        raise CheckpointError(
            f"{file} promises {len(wrong)} keys that are not in their files: "
            + list_names(sorted(wrong))
        )


def _names_without_index(names: list[str], stem: str | None) -> list[str]:
    """Returns the single file, or all shards that the first one's name promises."""
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    shards = [
        match
        for name in names
        if (match := _SHARD.fullmatch(name)) and match["stem"] == stem
    ]
    count = int(shards[0]["count"])
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _read_header(file: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Returns the entries by key, and the metadata."""
    try:
        # Checks the header: every offset, and that the file ends with the last one.
        with safetensors.safe_open(file, framework="np"):
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged or not a safetensors file: {error}"
        ) from error
    metadata = header.pop("__metadata__", {})
    entries = {
        key: _Entry(
            file,
            8 + size + value["data_offsets"][0],
            value["dtype"],
            (*value["shape"],),
        )
        for key, value in header.items()
    }
    # In the order of the file, so that reading all of them reads it front to back.
    return dict(sorted(entries.items(), key=lambda item: item[1].offset)), metadata


def _split(
    tensors: Mapping[str, np.ndarray], max_shard_bytes: int | None
) -> list[dict[str, np.ndarray]]:
    """Cuts the tensors, in order, into groups of at most `max_shard_bytes`."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, value in tensors.items():
        if max_shard_bytes is not None and value.nbytes > max_shard_bytes:
            raise ValueError(
                f"{key} has {value.nbytes} bytes; {max_shard_bytes=} must be at least "
                "that"
            )
        if max_shard_bytes is not None and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    return shards
