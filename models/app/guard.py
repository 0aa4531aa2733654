"""What the server refuses before the page sees it: foreign pages, and large bodies.

A page that is open in the same browser can send requests to 127.0.0.1, and a name whose
address changes (DNS rebinding) makes them look like its own. So the name that a request
asks for and the page that it comes from are checked, whatever the request is.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_UPLOADS = "/upload"  # how the path of Gradio's uploads ends
_BODY_BYTES = 2**20  # of any other request, which holds settings only
# No other page may show this one in a frame, where clicks could be led astray.
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class AllowedHosts:
    """Names by which the server may be asked.

    Args:
      names: Names and addresses, without a port.
      addresses: Whether any address in numbers will do, too. No other site can have
        one, so it is safe where the server listens to a network.
    """

    def __init__(self, names: frozenset[str] = LOCAL_NAMES, *, addresses: bool = False):
        self.names = {name.lower() for name in names}
        self.addresses = addresses

    def allow(self, host: str) -> bool:
        """Returns whether the value of a Host header is such a name."""
        name = name_of(host)
        if name is None:
            return False
        return name in self.names or (self.addresses and _is_address(name))


def name_of(host: str) -> str | None:
    """Returns the name in a Host header, in lower case; None if it is malformed."""
    match = re.fullmatch(
        r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9_.-]+))(?::\d{1,5})?", host
    )
    if match is None:
        return None
    return (match[1] or match[2]).lower().rstrip(".")


def why_refused(
    method: str, headers: Mapping[str, list[str]], hosts: AllowedHosts
) -> str | None:
    """Returns why a request is refused; None if it is not.

    Args:
      method: Such as "POST"; "GET" of a web socket.
      headers: All values of each header, by its name in lower case.
      hosts: Names of this server.
    """
    host = headers.get("host", [])
    if len(host) != 1 or not hosts.allow(host[0]):
        return (
            f"the host {', '.join(host)!r} is not a name of this server; add it with "
            "--allow-host if it is"
        )
    for origin in headers.get("origin", []):
        if origin.lower() not in (
            f"http://{host[0]}".lower(),
            f"https://{host[0]}".lower(),
        ):
            return f"the request comes from {origin!r}, another site"
    site = headers.get("sec-fetch-site", ["none"])[-1]
    if site not in ("none", "same-origin"):
        is_link = headers.get("sec-fetch-mode") == ["navigate"]
        is_link &= headers.get("sec-fetch-dest") == ["document"]
        if not (is_link and method in ("GET", "HEAD")):
            return f"the request comes from another site ({site})"
    return None


def why_too_large(
    method: str, path: str, headers: Mapping[str, list[str]], upload_bytes: int
) -> tuple[int, str] | None:
    """Returns the status and the reason if a body is too large; None if it is not.

    Args:
      method: Of the request.
      path: Of the request.
      headers: As in `why_refused`.
      upload_bytes: Most of an upload; 0 if nothing can be uploaded.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return None
    uploads = is_upload(path)
    if uploads and not upload_bytes:
        return 403, "this model takes no image, so nothing can be uploaded"
    most = upload_bytes if uploads else _BODY_BYTES
    length = headers.get("content-length", [])
    if len(length) != 1 or not re.fullmatch(r"\d{1,15}", length[0]):
        return 411, "the request does not say how long it is"
    if int(length[0]) > most:
        return 413, f"the request has {length[0]} bytes; at most {most} are taken"
    return None


def is_upload(path: str) -> bool:
    """Returns whether a request of a path brings a file."""
    return path.rstrip("/").endswith(_UPLOADS)


class Guard:
    """An ASGI application that stands in front of another.

    Args:
      application: The one behind it.
      hosts: Names of this server.
      upload_bytes: Most of an upload; 0 if nothing can be uploaded.
    """

    def __init__(
        self, application: Application, *, hosts: AllowedHosts, upload_bytes: int
    ):
        self._application = application
        self._hosts = hosts
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request, or hands it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(
                value.decode("latin-1")
            )
        method = scope.get("method", "GET")
        reason = why_refused(method, headers, self._hosts)
        refusal = None if reason is None else (403, reason)
        refusal = refusal or why_too_large(
            method, scope["path"], headers, self._upload_bytes
        )
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", ())}
                added = [pair for pair in _HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._application(scope, receive, send_with_headers)


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    """Answers with a sentence; a web socket is closed before it opens."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"Refused: {reason}.\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the body was not read
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
