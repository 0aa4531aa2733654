"""Starts `draft-video`, also where another project's folders have our packages' names.

A folder `models` that PYTHONPATH leads to is found before ours. The command has its
process to itself, so it takes our packages from the folder that this file lies in.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder

PACKAGES = ("draft_jax", "models", "pallas_kernels")
_HOME = os.path.dirname(os.path.abspath(__file__))


class NeighbourFinder:
    """Finds our packages beside this file before any other folder is looked into."""

    @staticmethod
    def find_spec(
        fullname: str,
        path: Sequence[str] | None = None,
        target: object = None,
    ) -> ModuleSpec | None:
        """Returns where a package of ours lies; None for all other modules."""
        return PathFinder.find_spec(fullname, [_HOME]) if fullname in PACKAGES else None


def main() -> int:
    """Runs `draft-video` as this process; see `models.cli.run_process`."""
    try:
        sys.meta_path.insert(0, NeighbourFinder)
        from models.cli import run_process

        return run_process()
    except KeyboardInterrupt:  # before it handles Ctrl-C itself
        print("draft-video: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
