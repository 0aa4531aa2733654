"""Writes what `torch.save` does, without torch: a pickle in a zip, arrays beside it."""

import contextlib
import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np


class _Storage:
    """Stands for the memory of one array."""

    def __init__(self, array: np.ndarray):
        self.array = array


@contextlib.contextmanager
def _named_torch():
    """Modules with the two names that such a pickle has; read, it needs neither."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage:
        __module__, __qualname__ = "torch", "FloatStorage"

    def _rebuild_tensor_v2(*arguments):
        raise NotImplementedError

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2
    kept = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield torch, utils
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """Writes nested dictionaries of float32 arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storages: list[np.ndarray] = []
    with _named_torch() as (torch, utils), io.BytesIO() as stream:

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if not isinstance(value, _Storage):
                    return None
                storages.append(value.array)
                name = str(len(storages) - 1)
                return "storage", torch.FloatStorage, name, "cpu", value.array.size

            def reducer_override(self, value):
                if not isinstance(value, np.ndarray):
                    return NotImplemented
                value = np.ascontiguousarray(value, np.float32)
                strides = tuple(step // 4 for step in value.strides)
                arguments = (
                    *(_Storage(value), 0, value.shape, strides),
                    *(False, OrderedDict()),
                )
                return utils._rebuild_tensor_v2, arguments

        Pickler(stream, protocol=2).dump(content)
        data = stream.getvalue()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for index, array in enumerate(storages):
            file.writestr(f"archive/data/{index}", array.tobytes())
        file.writestr("archive/version", "3\n")
