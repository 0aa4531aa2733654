"""Tells which folder hides ours when a module of our packages is not found.

The distribution installs packages of common names, `models` and `pallas_kernels`. A
project's own folder `models` is found first, and `import models.wan` fails with a text
that says nothing of it. Having such a folder is no mistake, so nothing is checked
before an import has failed. The finder stands last in `sys.meta_path`: Python asks it
only for modules that all others did not find.

This holds in both directions: a folder without `__init__.py` is found after ours.
A single file `models.py` is not seen; Python itself then says that it is no package.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGES = ("benchmarks", "draft_jax", "models", "pallas_kernels")
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class ShadowingFinder:
    """Finds nothing; raises where a folder of the same name has the module."""

    @staticmethod
    def find_spec(
        fullname: str,
        path: Any = None,
        target: Any = None,
    ) -> ModuleSpec | None:
        """Returns None, for a module that is in no folder of its package's name.

        Raises:
          ModuleNotFoundError: Another folder has the module; says which of the two
            was found first, and what helps.
        """
        root, *parts = fullname.split(".")
        if root not in PACKAGES or not parts or root not in sys.modules:
            return None
        found = _folders_of(sys.modules[root])
        for parent in (_HOME, *sys.path):
            folder = os.path.join(parent or os.getcwd(), root)
            if not found or os.path.realpath(folder) in map(os.path.realpath, found):
                continue
            # `fullname`'s own package, which may lie deeper than `root`
            if PathFinder.find_spec(fullname, [os.path.join(folder, *parts[:-1])]):
                raise ModuleNotFoundError(
                    f"No module named {fullname!r} in {found[0]}, which hides "
                    f"{folder}, where it is. {_remedy(folder, found[0])}",
                    name=root,
                )
        return None


def install() -> None:
    """Puts the finder last, once."""
    if ShadowingFinder not in sys.meta_path:
        sys.meta_path.append(ShadowingFinder)


def _folders_of(package: ModuleType) -> list[str]:
    return [os.path.abspath(folder) for folder in getattr(package, "__path__", ())]


def _remedy(hidden: str, found: str) -> str:
    ours = os.path.join(_HOME, os.path.basename(hidden))
    if os.path.realpath(found) == os.path.realpath(ours):
        return f"Rename {hidden}: draft_jax installs a package of this name."
    parent = os.path.dirname(found)
    return (
        f"Rename {found}, or leave {parent} out of sys.path: start Python in another "
        "folder or with -P, and look at PYTHONPATH."
    )


install()
