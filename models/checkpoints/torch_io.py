"""Reads PyTorch checkpoints (`.pth`, `.pt`, `.bin`) without PyTorch and without risk.

Such a file is a zip archive: `data.pkl` is a pickle that describes the tensors, and
`data/<number>` are their storages, not compressed. A pickle can name any function of
any module to be called; `torch_pickle` reads it without running any.
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints.memory_map import CheckpointError, map_array, span_of
from models.checkpoints.torch_pickle import (
    MAX_PICKLE_BYTES,
    Tensor,
    flatten,
    load_pickle,
)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra
_LOCAL_SIGNATURE = b"PK\x03\x04"
_OLD_FORMAT_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # before torch 1.6


class TorchReader(Mapping[str, np.ndarray]):
    """Tensors of a PyTorch checkpoint by key, each read from disk when it is used.

    A tensor is a read-only view of the file, with PyTorch's strides. Dictionaries
    and lists within each other give keys with dots between: `module.blocks.0.weight`.
    No code of the file is run; see the module's docstring. Nothing tells whether the
    numbers themselves are damaged, as in PyTorch.

    Args:
      path: A file that `torch.save` of PyTorch 1.6 or newer wrote.

    Attributes:
      file: The file.
      others: Values in the file that are no tensors (numbers, texts), by key.

    Raises:
      CheckpointError: The file is missing, truncated, damaged, of another format, or
        asks for something other than tensors. File and key, or what the file asks
        for, are named.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.file = Path(path)
        records = _read_records(self.file)
        self._tensors: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}  # bytes, where each storage starts
        self.others: dict[str, Any] = {}
        for key, value in flatten(self.file, _unpickle(self.file, records)):
            if key in self._tensors or key in self.others:
                raise CheckpointError(f"{self.file} holds the key {key} twice")
            if not isinstance(value, Tensor):
                self.others[key] = value
                continue
            self._tensors[key] = value
            _check_tensor(self.file, key, value, records)
        with self.file.open("rb") as stream:
            for key, tensor in self._tensors.items():
                record = tensor.storage.record
                if record not in self._offsets:
                    info = records[f"data/{record}"]
                    self._offsets[record] = _start_of(self.file, key, stream, info)

    def __getitem__(self, key: str) -> np.ndarray:
        tensor = self._tensors[key]
        dtype = tensor.dtype.numpy
        start = self._offsets[tensor.storage.record] + tensor.offset * dtype.itemsize
        try:
            return map_array(
                self.file,
                offset=start,
                dtype=dtype,
                shape=tensor.shape,
                strides=tensor.strides,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {key} from {self.file}: {error}"
            ) from error

    def file_of(self, key: str) -> Path:
        """Returns the file, whatever the key."""
        return self.file

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_torch(path: str | os.PathLike) -> TorchReader:
    """Opens a PyTorch checkpoint; see `TorchReader`."""
    return TorchReader(path)


def _read_records(file: Path) -> dict[str, zipfile.ZipInfo]:
    """Returns the archive's contents by name, without the folder around everything."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_OLD_FORMAT_START))
        if start == _OLD_FORMAT_START:
            raise CheckpointError(
                f"{file} is in PyTorch's format from before version 1.6, which is not "
                "read; load it with PyTorch and save it again"
            )
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            records = {info.filename.partition("/")[2]: info for info in infos}
            _check_records(file, records)
            if "byteorder" in records:
                byteorder = archive.read(records["byteorder"])
                if byteorder != b"little":
                    raise CheckpointError(
                        f"{file} has byte order {byteorder!r}; expected b'little'"
                    )
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is missing, truncated or not a PyTorch checkpoint: {error}"
        ) from error
    return records


def _check_records(file: Path, records: Mapping[str, zipfile.ZipInfo]) -> None:
    if "data.pkl" not in records or "constants.pkl" in records:
        raise CheckpointError(
            f"{file} is a zip archive, but not one of torch.save: it holds "
            f"{sorted(records)[:8]}; expected data.pkl, and no TorchScript"
        )
    for name, info in records.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{file}: {name} is compressed or encrypted; torch.save does neither"
            )


def _unpickle(file: Path, records: Mapping[str, zipfile.ZipInfo]) -> Any:
    info = records["data.pkl"]
    if info.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file}: data.pkl has {info.file_size} bytes, more than the "
            f"{MAX_PICKLE_BYTES} that are read: it describes tensors, and holds none"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(info)  # checks its checksum too
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{file}: data.pkl is damaged: {error!r}") from error
    return load_pickle(file, data)


def _check_tensor(
    file: Path, key: str, tensor: Tensor, records: Mapping[str, zipfile.ZipInfo]
) -> None:
    """Raises if a tensor is not, or not all, in the file."""
    storage = tensor.storage
    info = records.get(f"data/{storage.record}")
    if info is None:
        raise CheckpointError(f"{file} lacks data/{storage.record}, which holds {key}")
    expected = storage.size * storage.dtype.numpy.itemsize
    if info.file_size != expected or info.compress_size != expected:
        raise CheckpointError(
            f"{file}: data/{storage.record}, which holds {key}, has {info.file_size} "
            f"bytes; expected {expected}"
        )
    span = span_of(tensor.shape, tensor.strides)
    if span and (tensor.offset + span) * tensor.dtype.numpy.itemsize > expected:
        raise CheckpointError(
            f"{file}: {key} of shape {tensor.shape}, strides {tensor.strides} and "
            f"offset {tensor.offset} does not fit in its storage of {storage.size} "
            "elements"
        )


def _start_of(file: Path, key: str, stream: Any, info: zipfile.ZipInfo) -> int:
    """Returns the bytes before a record's data; raises if it is not in the file."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size:
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = stream.read(name_length)
        start = info.header_offset + len(header) + name_length + extra_length
        end = start + info.compress_size
        if (
            signature == _LOCAL_SIGNATURE
            and name == info.orig_filename.encode()
            and end <= os.fstat(stream.fileno()).st_size
        ):
            return start
    raise CheckpointError(
        f"{file} is damaged or truncated: {info.filename}, which holds {key}, is not "
        "where the table of contents says"
    )
