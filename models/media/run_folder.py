"""The folder of a run: what it may hold, and files of which none costs another."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from models.files import MissingFilesError

REPORT = "report.json"
PAGE = "report.html"
KEPT_SHARE = "kept_share.png"
LATENTS = "latents.safetensors"  # in place of a video that could not be decoded
# All that any kind of run writes, so that none is left beside the files of another.
FILES = (
    "video.mp4",
    "dense.mp4",
    "sparse.mp4",
    "side_by_side.mp4",
    KEPT_SHARE,
    LATENTS,
    REPORT,
    PAGE,
)


def earlier_files(folder: Path) -> list[Path]:
    """Returns the files that an earlier run has left in a folder."""
    paths = [folder / name for name in FILES]
    return [path for path in paths if path.is_symlink() or path.exists()]


class RunFolder:
    """Writes the files of one run, each of which is tried whatever happens to others.

    Both reports of an earlier run go before the first file is written, so that a
    report always belongs to the files beside it. Other files of an earlier run go at
    the end of the block, as soon as something has been written in their place.

    Attributes:
      path: The folder; made if it does not exist.
      written: The files written so far, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[Path] = []
        self._failures: dict[Path, Exception] = {}

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """Writes a file of this run, unless that has been done already.

        What goes wrong is raised at the end of the block.

        Args:
          name: One of `FILES`.
          writer: Writes the file at the path it is given.
        """
        if name not in FILES:
            raise ValueError(f"{name=} must be one of {FILES}")
        path = self.path / name
        if path in self.written:
            return
        try:
            if not self.written:
                for report in (REPORT, PAGE):
                    (self.path / report).unlink(missing_ok=True)
            writer(path)
        except Exception as error:
            self._failures[path] = error
        else:
            self._failures.pop(path, None)
            self.written.append(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes what an earlier run has left, and says what is missing.

        Raises:
          MissingFilesError: A file could not be written, and the block was left
            without another error.
        """
        if self.written:
            for path in set(earlier_files(self.path)).difference(self.written):
                with contextlib.suppress(OSError):  # a folder of the user's own
                    path.unlink()
        if kind is None and self._failures:
            raise MissingFilesError(self._failures) from next(
                iter(self._failures.values())
            )
