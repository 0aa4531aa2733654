"""Reads and writes safetensors checkpoints, whole or in shards."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint file is missing, damaged, or not what it should be."""


class SafetensorsReader(Mapping[str, np.ndarray]):
    """Tensors of one checkpoint by key, each read from disk when asked for.

    Args:
      path: A `.safetensors` file, or a directory with one checkpoint: a single
        file, or shards with or without their index.
      stem: In a directory with several checkpoints, the name of the one to read,
        up to ".safetensors" or "-00001-of-...".

    Raises:
      CheckpointError: Nothing is there, several checkpoints are and no stem tells
        which, a shard is missing, or a file is damaged. The file is named.
    """

    def __init__(self, path: str | os.PathLike, *, stem: str | None = None) -> None:
        self.files = find_files(Path(path), stem)
        self._file_of: dict[str, Path] = {}
        self._open = {file: _open(file) for file in self.files}
        for file, handle in self._open.items():
            for key in handle.keys():  # noqa: SIM118  a handle cannot be iterated
                if key in self._file_of:
                    raise CheckpointError(
                        f"key {key} is both in {self._file_of[key]} and in {file}"
                    )
                self._file_of[key] = file

    def __getitem__(self, key: str) -> np.ndarray:
        file = self._file_of[key]
        try:
            return self._open[file].get_tensor(key)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"cannot read {key} from {file}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


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
      directory: Where to write; made if it does not exist.
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
    for number, shard in enumerate(shards, start=1):
        part = "" if count == 1 else f"-{number:05}-of-{count:05}"
        file = directory / f"{stem}{part}.safetensors"
        data = safetensors.numpy.save(
            {key: np.ascontiguousarray(value) for key, value in shard.items()},
            metadata={"format": "pt"},
        )
        _write_whole(file, data)
        files.append(file)
        weight_map |= dict.fromkeys(shard, file.name)
    if count > 1:
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        _write_whole(directory / f"{stem}{INDEX_SUFFIX}", text.encode())
    return files


def find_files(path: Path, stem: str | None = None) -> list[Path]:
    """The files of one checkpoint; see `SafetensorsReader` for the arguments."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    names = sorted(file.name for file in path.iterdir())
    stems = sorted({found for name in names if (found := _stem_of(name)) is not None})
    if stem is None and len(stems) == 1:
        (stem,) = stems
    if stem not in stems:
        raise CheckpointError(
            f"{path} holds the checkpoints {stems}; expected "
            + ("exactly one" if stem is None else f"one called {stem!r}")
        )
    if f"{stem}{INDEX_SUFFIX}" in names:
        wanted = _read_index(path / f"{stem}{INDEX_SUFFIX}")
    else:
        wanted = _names_without_index(names, stem)
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(f"{path} lacks the checkpoint files {missing}")
    return [path / name for name in wanted]


def _stem_of(name: str) -> str | None:
    """Which checkpoint a file belongs to, or None if it is none's."""
    if name.endswith(INDEX_SUFFIX):
        return name.removesuffix(INDEX_SUFFIX)
    if not name.endswith(".safetensors"):
        return None
    shard = _SHARD.fullmatch(name)
    return shard["stem"] if shard else name.removesuffix(".safetensors")


def _read_index(file: Path) -> list[str]:
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors index: {error!r}"
        ) from error


def _names_without_index(names: list[str], stem: str | None) -> list[str]:
    """The single file, or all shards that the first one's name promises."""
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    shards = [
        match
        for name in names
        if (match := _SHARD.fullmatch(name)) and match["stem"] == stem
    ]
    count = int(shards[0]["count"])
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or not a safetensors file: {error}"
        ) from error


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


def _write_whole(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
