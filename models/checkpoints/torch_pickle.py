"""Unpickles the description of a PyTorch checkpoint, without code and in bounded time.

A pickle can name any function of any module to be called. The unpickler here knows a
handful of names and refuses the rest. It maps them to functions of its own, which only
note down where a tensor lies. It is Python's own in Python: that in C allocates as much
memory as a file asks for. A few bytes can also ask for endless work, by building on
what they have built; whatever does not grow with the file's size is counted.
"""

import io
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from models.checkpoints.memory_map import CheckpointError

# The largest published models have some thousand tensors, of 40 opcodes and 300 bytes.
MAX_PICKLE_BYTES = 2**26
MAX_WORK = 2 * 10**7  # opcodes, and elements of what they are applied to
MAX_VALUES = 10**6
MAX_DEPTH = 500  # of dictionaries and lists within each other
MAX_KEY_CHARACTERS = 2**27  # of all keys together
_LARGEST_SIZE = 2**63 - 1  # of a tensor's sizes and strides, as in PyTorch

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


class Tensor(NamedTuple):
    """Where the file says that a tensor's elements are."""

    storage: _Storage
    dtype: _Dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Unpickler(pickle._Unpickler):
    """Builds dictionaries, lists, numbers, texts and `Tensor`s, and nothing else."""

    stack: list[Any]

    def __init__(self, file: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._from = file
        self._work = 0
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Rebuild("OrderedDict"),
            ("torch", "Size"): _Rebuild("Size"),
            ("torch.storage", "UntypedStorage"): _Dtype("UntypedStorage"),
            **{("torch", name): _Dtype(name) for name in (*_STORAGES, *_DTYPES)},
            **{("torch._utils", name): _Rebuild(name) for name in _TENSORS},
        }

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands here for a name; raises for all but a handful."""
        if (module, name) not in self._known:
            raise CheckpointError(
                f"{self._from} asks for {module}.{name}, which is refused: only "
                "tensors, numbers and texts in dictionaries and lists are read, and no "
                "code is run"
            )
        return self._known[module, name]

    def persistent_load(self, identifier: Any) -> _Storage:
        """Returns the storage that an identifier names."""
        match identifier:
            case ("storage", _Dtype() as dtype, str(record), str(), int(size)):
                if _is_size(size):
                    return _Storage(record, dtype, size)
        raise CheckpointError(
            f"{self._from} has an unknown storage: {reprlib.repr(identifier)}"
        )

    def _count(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise CheckpointError(
                f"{self._from}: data.pkl asks for more work than {MAX_WORK} steps, "
                "which no checkpoint needs"
            )


def _count_one(unpickler: _Unpickler) -> None:
    unpickler._count(1)


def _count_arguments(unpickler: _Unpickler) -> None:
    argument = unpickler.stack[-1]
    parts = argument if isinstance(argument, tuple) else (argument,)
    unpickler._count(1 + len(parts) + sum(map(_length, parts)))


def _count_state(unpickler: _Unpickler) -> None:
    if not isinstance(unpickler.stack[-2], OrderedDict):
        raise TypeError("a state is given to something other than a dictionary")
    _count_arguments(unpickler)


def _check_one_key(unpickler: _Unpickler) -> None:
    unpickler._count(1)
    _check_keys(unpickler.stack[-2:-1])


def _check_every_second(unpickler: _Unpickler) -> None:
    unpickler._count(1)
    _check_keys(unpickler.stack[::2])


def _check_all(unpickler: _Unpickler) -> None:
    unpickler._count(1)
    _check_keys(unpickler.stack)


def _check_number(unpickler: _Unpickler) -> None:
    if unpickler.stack[-1].bit_length() > 128:
        raise ValueError("a whole number of more than 128 bits")


_Check = Callable[[Any], None]  # of an unpickler
# Most opcodes take from the stack what others have put there, so their number bounds
# the work. These go through objects that are used again, or hash keys.
_BEFORE: dict[bytes, _Check] = {
    pickle.REDUCE: _count_arguments,
    pickle.NEWOBJ: _count_arguments,
    pickle.NEWOBJ_EX: _count_arguments,
    pickle.BUILD: _count_state,
    pickle.SETITEM: _check_one_key,
    pickle.SETITEMS: _check_every_second,
    pickle.DICT: _check_every_second,
    pickle.ADDITEMS: _check_all,
    pickle.FROZENSET: _check_all,
}
# Whole numbers may have any length.
_AFTER: dict[bytes, _Check] = dict.fromkeys(
    (pickle.INT, pickle.LONG, pickle.LONG1, pickle.LONG4), _check_number
)


def _limited(opcode: bytes, run: _Check) -> _Check:
    """Returns an opcode's function with what it does counted and checked."""
    before, after = _BEFORE.get(opcode, _count_one), _AFTER.get(opcode)

    def run_checked(unpickler: _Unpickler) -> None:
        before(unpickler)
        run(unpickler)
        if after is not None:
            after(unpickler)

    return run_checked


_Unpickler.dispatch = {
    number: _limited(bytes([number]), run)
    for number, run in pickle._Unpickler.dispatch.items()
}


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (dict, list, tuple, str, bytes)) else 0


def _check_keys(keys: Any) -> None:
    """Raises unless keys are plain: a tuple's hash may take for ever."""
    for key in keys:
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise TypeError(f"a key is a {type(key).__name__}; expected a text")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


class _Rebuild(NamedTuple):
    """A function that a file may call, by name."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return _FUNCTIONS[self.name](*arguments)


def _ordered_dict(items: Any = ()) -> OrderedDict:
    _check_keys(key for key, _ in items)
    return OrderedDict(items)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
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
) -> Tensor:
    sizes = (offset, *shape, *strides)
    if (
        metadata  # that the numbers are to be negated or conjugated
        or not isinstance(storage, _Storage)
        or not isinstance(dtype, _Dtype)
        or len(shape) != len(strides)
        or not all(map(_is_size, sizes))
    ):
        found = reprlib.repr((storage, *sizes, dtype, metadata))
        raise TypeError(f"not a plain tensor: {found}")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a parameter must be a tensor, not {reprlib.repr(tensor)}")
    return tensor


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _rebuild_parameter,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "OrderedDict": _ordered_dict,
    "Size": tuple,
}


def load_pickle(file: Path, data: bytes) -> Any:
    """Builds what a pickle describes: dictionaries, lists, numbers, texts, `Tensor`s.

    Args:
      file: Where it is from, for messages.
      data: The pickle.

    Raises:
      CheckpointError: It is damaged, asks for anything else, or for too much work.
    """
    try:
        return _Unpickler(file, data).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(f"{file}: data.pkl is damaged: {error!r}") from error


def flatten(file: Path, root: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dictionaries and lists, keys joined by dots.

    Raises:
      CheckpointError: The root is no dictionary, or it holds itself, nests too deeply,
        or has too many values or too long keys. A file of a few bytes can: lists may
        hold the same list twice.
    """
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{file} holds a {type(root).__name__.lstrip('_').lower()}; expected a "
            "dictionary of tensors"
        )
    num_values = num_characters = 0
    # Those that are open, each within the last.
    containers = [("", root, iter(dict.items(root)))]
    while containers:
        prefix, _, items = containers[-1]
        for name, value in items:
            key = f"{prefix}.{name}" if prefix else str(name)
            num_values += 1
            num_characters += len(key)
            if num_values > MAX_VALUES or num_characters > MAX_KEY_CHARACTERS:
                raise CheckpointError(
                    f"{file} has more than {MAX_VALUES} values, or keys of more than "
                    f"{MAX_KEY_CHARACTERS} characters together"
                )
            if (inner := _items(value)) is None:
                yield key, value
                continue
            if any(value is container for _, container, _ in containers):
                raise CheckpointError(f"{file}: {prefix or 'the root'} contains itself")
            if len(containers) == MAX_DEPTH:
                raise CheckpointError(f"{file} is nested too deeply")
            containers.append((key, value, inner))
            break
        else:
            containers.pop()


def _items(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """Returns names and values of a container; None of anything else."""
    if isinstance(value, dict):
        return iter(dict.items(value))
    return iter(enumerate(value)) if type(value) in (list, tuple) else None
