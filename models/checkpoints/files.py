"""Files of a folder that count: those that are not hidden."""

import os
from pathlib import Path


def find_visible(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """Returns what a pattern matches below a folder, sorted, without hidden files.

    Names that start with a dot are those of other programs: macOS lays `._x` beside
    each `x` on foreign disks, and downloads keep what is not whole in `.cache`.
    """
    folder = Path(folder)
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
