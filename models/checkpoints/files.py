"""Files: written whole or not at all, and found unless they are hidden."""

import os
import secrets
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


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it, which is atomic.

    Several processes may write the same file: each has a partial file of its own.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
