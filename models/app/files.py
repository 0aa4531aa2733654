"""Files of the outputs folder, by the path of a request, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

from models.app.guard import Receive, Scope, Send

PREFIX = "/runs/"  # of paths that lead to the outputs folder
# What runs write. Anything else in the folder is the user's own.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
}
# A report loads nothing from elsewhere and sends nothing: not to this server either.
_REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "connect-src data: blob:; frame-ancestors 'self'; form-action 'none'"
)


def find_file(root: Path, path: str) -> Path | None:
    """Returns the file that a path below the folder names; None if there is none.

    Links are followed, and lead to a file only if that lies in the folder, too.

    Args:
      root: The outputs folder.
      path: Names with slashes between, decoded once.
    """
    names = path.split("/")
    if not all(map(_is_plain, names)) or Path(names[-1]).suffix not in MEDIA_TYPES:
        return None
    try:
        found = root.joinpath(*names).resolve(strict=True)
        inside = found.is_relative_to(root.resolve(strict=True))
    except (OSError, RuntimeError, ValueError):  # no file, a circle of links, too long
        return None
    # What a link leads to must be such a file as well.
    return found if inside and found.suffix in MEDIA_TYPES and found.is_file() else None


def url_of(root: Path, file: Path) -> str:
    """Returns the path of a request for a file of the folder, encoded."""
    from urllib.parse import quote

    return PREFIX + quote(file.relative_to(root).as_posix())


class RunFiles:
    """An ASGI application that serves files of the outputs folder.

    Args:
      root: The folder.
    """

    def __init__(self, root: Path):
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the file, or a part that is asked for; else with 404."""
        from starlette.responses import FileResponse, PlainTextResponse, Response

        file = find_file(self._root, scope["path"].removeprefix(PREFIX))
        response: Response
        if scope["method"] not in ("GET", "HEAD"):
            response = PlainTextResponse("Refused: files are read only.\n", 405)
        elif file is None:
            response = PlainTextResponse("There is no such file.\n", 404)
        else:
            headers = {"cache-control": "no-cache"}
            if file.suffix == ".html":
                headers["content-security-policy"] = _REPORT_POLICY
            media_type = MEDIA_TYPES[file.suffix]
            response = FileResponse(file, headers=headers, media_type=media_type)
        await response(scope, receive, send)


def files_in(folder: Path) -> Iterator[Path]:
    """Yields the files of a run's folder that can be asked for."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in MEDIA_TYPES and _is_plain(file.name):
            yield file


def _is_plain(name: str) -> bool:
    """Returns whether a name stands for a file in its folder, on any system."""
    unsafe = not name or name.startswith(".") or set(name) & set('\\\0:*?"<>|')
    return not unsafe and name.isprintable()
