"""Modules of a package that are imported when they are first used."""

import importlib
from collections.abc import Callable
from types import ModuleType


def importer(package: str, *names: str) -> Callable[[str], ModuleType]:
    """Makes the `__getattr__` of a package that imports modules on first use.

    Kernels import the compiler of Mosaic GPU, a third of a second or more, which
    programs without a GPU do not need. `package.module.function` imports it only when
    that line runs; `from package.module import function` imports it at once.

    Args:
      package: The package's `__name__`.
      *names: Its modules. Others are not attributes of the package.

    Returns:
      A function for the package to call `__getattr__`.
    """

    def import_module(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return import_module
