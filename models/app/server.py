"""Serves the page: files and checks in front, Gradio behind."""

import logging
import socket
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import fastapi
import gradio as gr
import uvicorn

from models.app.files import PREFIX, RunFiles
from models.app.guard import AllowedHosts, Application, Guard, Receive, Scope, Send
from models.app.jobs import JobQueue
from models.app.page import build_page
from models.app.runner import Runner
from models.app.uploads import UploadsOnly

FIRST_PORT, PORTS = 7860, 40  # tried where none is given
CLOSE_SECONDS = 1.0  # for the step that runs when the server ends


def build_application(
    runner: Runner,
    queue: JobQueue,
    *,
    hosts: AllowedHosts,
    upload_bytes: int,
    uploads: Path,
) -> Application:
    """Returns the ASGI application of a model's page.

    Args:
      runner: The model, and the outputs folder.
      queue: Where runs wait.
      hosts: Names of the server.
      upload_bytes: Most of an upload; 0 if nothing can be uploaded.
      uploads: Folder where uploads lie.
    """
    page = build_page(runner, queue, upload_bytes=upload_bytes)
    page.queue(default_concurrency_limit=None, api_open=False)
    # The browser's own fonts: the default theme asks a server for some.
    theme = gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    behind = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=resources.files(__package__).joinpath("style.css").read_text("utf-8"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=upload_bytes or 1,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    files = RunFiles(runner.outputs)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        is_file = scope["type"] == "http" and scope["path"].startswith(PREFIX)
        await (files if is_file else behind)(scope, receive, send)

    only_uploads = UploadsOnly(application, folder=uploads)
    return Guard(only_uploads, hosts=hosts, upload_bytes=upload_bytes)


def listen(host: str, port: int | None) -> socket.socket:
    """Returns a socket that listens.

    Raises:
      OSError: The address is not one of this machine, or the port is taken.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for number in ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, number))
        except (OSError, OverflowError) as error:
            listening.close()
            if number == ports[-1]:
                what = f"--port {port}" if port is not None else f"ports {ports}"
                raise OSError(f"--host {host}, {what}: {error}") from error
        else:
            listening.listen()
            return listening
    raise AssertionError("there are ports")


def serve(
    application: Application,
    listening: socket.socket,
    *,
    when_ready: Callable[[], None],
) -> None:
    """Serves until the process is asked to end."""
    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        ws="none",
    )
    _Server(config, when_ready).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]):
        super().__init__(config)
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, and then says so."""
        await super().startup(sockets=sockets)
        self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends, without a traceback of each page that is still open."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets=sockets)
