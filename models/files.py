"""Writes files that other processes see whole or not at all."""

import argparse
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

# A full disk, a full quota, and a file larger than the system or a limit allows.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FullDiskError(OSError):
    """There is no space left for a file."""

    def __init__(self, message: str, code: int | None):
        super().__init__(message)
        self.errno = code  # given to OSError, it would stand before the message


class MissingFilesError(OSError):
    """Some files of a run could not be written; the others are whole.

    Attributes:
      reasons: What went wrong with each of the missing files.
    """

    def __init__(self, reasons: Mapping[Path, Exception]):
        self.reasons = dict(reasons)
        parts = [f"{path} ({_reason(error)})" for path, error in reasons.items()]
        verb = "is" if len(parts) == 1 else "are"
        super().__init__(f"{' and '.join(parts)} {verb} missing")


def output_folder(text: str) -> Path:
    """Reads a folder to write to: an argument's type, which finds errors at once.

    Raises:
      ArgumentTypeError: It is a file, or cannot be made or written to.
    """
    path = Path(text)
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path} cannot be a folder to write to: {above} is a file. Name another"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{path} cannot be written to: {above} may not be changed. Name another"
        )
    return path


def output_file(text: str) -> Path:
    """Reads a file to write: an argument's type, as `output_folder`.

    Raises:
      ArgumentTypeError: It is a folder, or lies where nothing can be written.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path} is a folder. Name a file, such as {path / 'report.json'}"
        )
    output_folder(str(path.parent))
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path that becomes `path` when the block succeeds.

    The temporary file lies in the same folder, so that the final rename is atomic,
    and keeps the suffix, by which writers choose their format. Any exception, also
    KeyboardInterrupt, removes it and leaves an earlier file at `path` as it was.
    Several processes may write the same file: each has a temporary file of its own.

    Args:
      path: File to write. Its folder is made if it does not exist.

    Yields:
      The temporary path to write to.

    Raises:
      FullDiskError: There is no space for the file.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno not in _NO_SPACE or isinstance(error, FullDiskError):
            raise
        raise FullDiskError(_describe(path, partial, error), error.errno) from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that could not be made
            partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file at once; see `whole_file`."""
    with whole_file(path) as partial:
        try:
            partial.write_bytes(data)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            message = _describe(path, partial, error, needed=len(data))
            raise FullDiskError(message, error.errno) from error


def _describe(
    path: Path, partial: Path, error: OSError, needed: int | None = None
) -> str:
    """Says which file found no space, and how much it needs."""
    written = partial.stat().st_size if partial.is_file() else 0
    size = _readable(written) if needed is None else _readable(needed)
    more = "more than " if needed is None else ""
    folder = next(folder for folder in path.parents if folder.exists())
    # What the unfinished file takes is free again when it has gone.
    free = shutil.disk_usage(folder).free + written
    reason = os.strerror(error.errno or errno.ENOSPC).lower()
    return (
        f"{path} cannot be written: {reason}; it needs {more}{size}, and "
        f"{_readable(free)} are free in {folder}. Free some, or name another folder"
    )


def _readable(size: int) -> str:
    """Returns a number of bytes as people read it."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _reason(error: Exception) -> str:
    """Returns what went wrong, with its kind where the text alone says little."""
    if isinstance(error, FullDiskError):
        return str(error)
    return f"{type(error).__name__}: {error}"
