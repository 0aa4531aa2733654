"""The page of `draft-video app` as a process, and a Chromium to open it."""

import contextlib
import http.client
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.browser import find_chromium

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
SECONDS = 400  # until a test gives up, on a busy machine
SMALL = {"width": 64, "height": 48, "frames": 9, "steps": 4}
LONG = SMALL | {"steps": 400}


class Server:
    """`draft-video app` as a process.

    Args:
      folder: Where its outputs folder is made.
      *options: Of the command, such as which model.
    """

    def __init__(self, folder, *options):
        self.outputs = folder / "outputs"
        self.errors = folder / "errors.txt"
        command = [sys.executable, "draft_video.py", "app", "--port", "0"]
        command += ["--outputs", str(self.outputs), *map(str, options)]
        self.start, self.started = time.monotonic(), time.time()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+", line)[0]
        self.address = urlsplit(self.url).netloc

    def end(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def ask(self, method, path, body=None, **headers):
        """Sends a request as it is, and returns the status and the body."""
        given = {"Host": self.address} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection = http.client.HTTPConnection(self.address, timeout=SECONDS)
        connection.putrequest(method, path, skip_host=True)
        if body is not None:
            given.setdefault("Content-Length", str(len(body)))
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextlib.contextmanager
def browser(playwright, **options):
    """A Chromium that knows nothing, with one page."""
    with tempfile.TemporaryDirectory() as folder:
        context = playwright.chromium.launch_persistent_context(
            folder,
            executable_path=find_chromium(),
            headless=True,
            args=FLAGS.split(),
            **({"viewport": {"width": 1600, "height": 1000}} | options),
        )
        context.set_default_timeout(60_000)
        try:
            yield context.pages[0]
        finally:
            context.close()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def fill(page, values):
    for name, value in values.items():
        page.locator(f"#{name} input").fill(str(value))
        page.locator(f"#{name} input").blur()


def generate(page, values=SMALL):
    fill(page, values)
    button(page, "Generate").click()


def wait_for_status(page, pattern):
    """Waits until the state of the run reads as a pattern, and returns it."""
    status = page.locator("#status")
    end = time.monotonic() + SECONDS
    while not re.search(pattern, text := status.inner_text()):
        assert time.monotonic() < end, f"the status is {text!r}"
        assert not text.startswith("Failed"), text
        time.sleep(0.05)
    return text


def report_of(page, place="#result"):
    """The report that is shown in the page."""
    return page.frame_locator(f"{place} iframe")
