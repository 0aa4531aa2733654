"""Reads PyTorch checkpoints (`.pth`, `.pt`, `.bin`) without PyTorch and without risk.

Such a file is a zip archive: `data.pkl` is a pickle that describes the tensors, and
`data/<number>` are their storages, not compressed. A pickle can name any function of
any module to be called. The unpickler here knows a handful of names and refuses the
rest. It maps them to functions of its own, which only note down where a tensor lies.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from models.checkpoints.memory_map import CheckpointError, map_array, span_of

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
# Dtypes without a storage class of their own: their tensors name them.
_DTYPES = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra
_LOCAL_SIGNATURE = b"PK\x03\x04"
_OLD_FORMAT_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # before torch 1.6


# What the pickle builds consists of tuples: unlike other objects they have no state
# that a pickle could overwrite.
class _Dtype(NamedTuple):
    name: str

    @property
    def numpy(self) -> np.dtype:
        return np.dtype({**_STORAGES, **_DTYPES, "UntypedStorage": np.uint8}[self.name])


class _Storage(NamedTuple):
    record: str  # name in the archive, behind "data/"
    dtype: _Dtype
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: _Dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


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
        self._tensors: dict[str, _Tensor] = {}
        self._offsets: dict[str, int] = {}  # bytes, where each storage starts
        self.others: dict[str, Any] = {}
        for key, value in _flatten(self.file, _unpickle(self.file, records)):
            if key in self._tensors or key in self.others:
                raise CheckpointError(f"{self.file} holds the key {key} twice")
            if not isinstance(value, _Tensor):
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


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, texts and `_Tensor`s, and nothing else."""

    def __init__(self, file: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._file = file
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch.storage", "UntypedStorage"): _Dtype("UntypedStorage"),
            **{("torch", name): _Dtype(name) for name in (*_STORAGES, *_DTYPES)},
            **{("torch._utils", name): _Rebuild(name) for name in _REBUILD},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise CheckpointError(
                f"{self._file} asks for {module}.{name}, which is refused: only "
                "tensors, numbers and texts in dictionaries and lists are read, and no "
                "code is run"
            )
        return self._known[module, name]

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", _Dtype() as dtype, str(record), str(), int(size)):
                return _Storage(record, dtype, size)
        raise CheckpointError(f"{self._file} has an unknown storage: {identifier!r}")


class _Rebuild(NamedTuple):
    """One of the functions of `torch._utils` that put a tensor together."""

    name: str

    def __call__(self, *arguments: Any) -> _Tensor:
        return _REBUILD[self.name](*arguments)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _Tensor:
    """Serves as `_rebuild_tensor` and as `_rebuild_tensor_v2`."""
    return _rebuild_tensor_v3(
        storage,
        offset,
        shape,
        strides,
        requires_grad,
        hooks,
        storage.dtype,
        metadata,
    )


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Tensor:
    sizes = (offset, *shape, *strides)
    if (
        metadata  # that the numbers are to be negated or conjugated
        or not isinstance(storage, _Storage)
        or not isinstance(dtype, _Dtype)
        or len(shape) != len(strides)
        or not all(type(size) is int and size >= 0 for size in sizes)
    ):
        raise TypeError(f"not a plain tensor: {(storage, *sizes, dtype, metadata)}")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"a parameter must be a tensor, not {tensor!r}")
    return tensor


_REBUILD: dict[str, Callable[..., _Tensor]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _rebuild_parameter,
}


def _unpickle(file: Path, records: Mapping[str, zipfile.ZipInfo]) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(records["data.pkl"])  # checks its checksum too
        return _Unpickler(file, data).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(f"{file}: data.pkl is damaged: {error!r}") from error


def _flatten(file: Path, root: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dictionaries and lists, keys joined by dots."""
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{file} holds a {type(root).__name__.lstrip('_').lower()}; expected a "
            "dictionary of tensors"
        )
    open_containers: set[int] = set()

    def visit(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            items = list(dict.items(value))
        elif type(value) in (list, tuple):
            items = list(enumerate(value))
        else:
            yield prefix, value
            return
        if id(value) in open_containers:
            raise CheckpointError(f"{file}: {prefix or 'the root'} contains itself")
        open_containers.add(id(value))
        for name, item in items:
            yield from visit(f"{prefix}.{name}" if prefix else str(name), item)
        open_containers.remove(id(value))

    try:
        yield from visit("", root)
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested too deeply") from error


def _check_tensor(
    file: Path, key: str, tensor: _Tensor, records: Mapping[str, zipfile.ZipInfo]
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
