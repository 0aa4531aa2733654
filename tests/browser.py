"""A real Chromium without a window, driven through its debugging pipe.

Nothing is needed but the browser itself. Tests that use it are marked `browser`.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # which containers forbid, and root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# Chromium reads descriptor 3 and writes 4; neither may be closed by the other's move.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "ArrowUp": 38,
    "ArrowDown": 40,
    "PageDown": 34,
    "PageUp": 33,
    "Tab": 9,
    " ": 32,
}


def find_chromium() -> str | None:
    """The browser's program, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab. Errors of its scripts, and requests that were refused, are collected."""

    def __init__(self, connection: "_Connection", session: str) -> None:
        self._connection, self._session = connection, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    @property
    def errors(self) -> list[str]:
        self.evaluate("0")  # events that came before its answer are read
        events = self._connection.events
        thrown = [
            event["params"]["exceptionDetails"]["exception"]["description"]
            for event in events
            if event["method"] == "Runtime.exceptionThrown"
        ]
        logged = [
            event["params"]["entry"]["text"]
            for event in events
            if event["method"] == "Log.entryAdded"
            and event["params"]["entry"]["level"] == "error"
        ]
        return thrown + logged

    @property
    def addresses(self) -> set[str]:
        """The kinds of addresses that were asked for, such as "file"."""
        return {
            event["params"]["request"]["url"].split(":")[0]
            for event in self._connection.events
            if event["method"] == "Network.requestWillBeSent"
        }

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._connection.send(method, parameters, self._session)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or what it promises."""
        answer = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, script: str, limit_s: float = 30.0) -> Any:
        """The first value that is true; the page may be slow, never wrong."""
        deadline = time.monotonic() + limit_s
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline:
                raise AssertionError(f"{script} did not become true in {limit_s} s")
            time.sleep(0.05)
        return value

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Clicks at a share of an element's width and height."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(
            f"(({{left, top, width, height}}) => [left, top, width, height])"
            f"({element}.getBoundingClientRect())"
        )
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        for kind, buttons in (("mousePressed", 1), ("mouseReleased", 0)):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                button="left",
                buttons=buttons,
                clickCount=1,
                **place,
            )

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        code = {"windowsVirtualKeyCode": _KEYS.get(key, ord(key[0]))}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def photograph(self, path: Path, *, whole: bool = False) -> None:
        """Writes a PNG of what is seen, or of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


class _Connection:
    """Messages to the browser and from it, each ended by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def send(
        self, method: str, parameters: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise AssertionError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            if not part:
                raise AssertionError("Chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def open_browser() -> Iterator[Page]:
    """A page of a browser of its own, which ends with the block."""
    program = find_chromium()
    assert program is not None, "tests with a browser are marked so"
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = to_browser[0], from_browser[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, ends), *command],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        try:
            connection = _Connection(to_browser[1], from_browser[0])
            target = connection.send("Target.createTarget", {"url": "about:blank"})
            session = connection.send(
                "Target.attachToTarget",
                {"targetId": target["targetId"], "flatten": True},
            )
            yield Page(connection, session["sessionId"])
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
