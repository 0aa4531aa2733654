"""Files that a request names: those that were uploaded, and no others of the machine.

Gradio copies any file that a request's JSON names to its own folder, where requests can
read it, unless the page was started by its `launch`. So paths are looked at before.
"""

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from models.app.guard import Application, Receive, Scope, Send, is_upload

MOST_BODY_BYTES = 2**20  # of a request with JSON; `guard` has refused larger ones


def why_foreign(body: bytes, folder: Path) -> str | None:
    """Returns which path in a body of JSON is none of an upload; None if all are.

    Args:
      body: Body of a request. One that is no JSON names no files.
      folder: Where uploads lie.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for path in _paths_in(content):
        if not isinstance(path, str) or not _is_upload(path, folder):
            return f"{str(path)[:200]!r} is no file that was uploaded"
    return None


def _paths_in(content: Any) -> Iterator[Any]:
    """Yields what objects of any depth have as a path."""
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if part.get("path") is not None:
                yield part["path"]
            left += part.values()
        elif isinstance(part, list):
            left += part


def _is_upload(path: str, folder: Path) -> bool:
    try:
        found = Path(path).resolve(strict=True)
        inside = found.is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError, ValueError):  # no file, a circle of links, a NUL
        return False
    return inside and Path(path).is_absolute() and found.is_file()


class UploadsOnly:
    """An ASGI application that refuses requests which name other files.

    Args:
      application: The one behind it.
      folder: Where uploads lie.
    """

    def __init__(self, application: Application, *, folder: Path):
        self._application = application
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request, or hands it on with the body that was read."""
        from starlette.responses import PlainTextResponse

        reads = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if reads or is_upload(scope["path"]):
            await self._application(scope, receive, send)
            return
        messages, body = [], b""
        more = True
        while more and len(body) <= MOST_BODY_BYTES:
            messages.append(await receive())
            body += messages[-1].get("body", b"")
            more = messages[-1].get("more_body", False)
        if (reason := why_foreign(body, self._folder)) is not None:
            refusal = PlainTextResponse(f"Refused: {reason}.\n", 403)
            await refusal(scope, receive, send)
            return

        async def replay() -> MutableMapping[str, Any]:
            return messages.pop(0) if messages else await receive()

        await self._application(scope, replay, send)
