"""`draft-video app`: a page to try sparsity on."""

import argparse
import importlib.util
import os
import secrets
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from models.app.guard import LOCAL_NAMES, AllowedHosts
from models.app.jobs import JobQueue
from models.app.limits import Limits
from models.app.runner import Runner, hear_warnings
from models.cli.app_options import model_arguments
from models.cli.outputs import check_writable
from models.media import video as video_io

INSTALL_APP_EXTRA = "pip install '.[app]' in a clone of draft_jax"


def run(arguments: argparse.Namespace) -> None:
    """Serves the page until the process is asked to end."""
    check_app_extra()
    video_io.check_video_extra()
    video_io.check_ffmpeg()
    check_writable(arguments.outputs)
    limits = limits_from(arguments)
    upload_bytes = _upload_bytes(arguments)
    # Read when Gradio is imported. Uploads lie in a folder of this process alone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with (
        tempfile.TemporaryDirectory(prefix="draft-video-") as uploads,
        hear_warnings(),
    ):
        os.environ["GRADIO_TEMP_DIR"] = uploads
        _serve(arguments, limits, upload_bytes, Path(uploads))


def _serve(
    arguments: argparse.Namespace, limits: Limits, upload_bytes: int, uploads: Path
) -> None:
    from models.app import server
    from models.app.form import abilities_of

    runner = Runner(
        model_options=model_arguments(arguments.argv[1:]),
        outputs=arguments.outputs.resolve(),
        limits=limits,
    )
    if abilities_of(runner.model).image is not None:
        upload_bytes = 0
    hosts = hosts_of(arguments.host, arguments.allow_host)
    queue = JobQueue(runner.run, prepare=runner.load)
    listening = server.listen(arguments.host, arguments.port)
    with listening:
        application = server.build_application(
            runner, queue, hosts=hosts, upload_bytes=upload_bytes, uploads=uploads
        )
        port = listening.getsockname()[1]

        def say_ready() -> None:
            name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
            print(
                f"draft-video app: http://{name}:{port}/ (Ctrl-C ends it)", flush=True
            )
            queue.start()

        if arguments.share:
            hosts.names.add(_share(arguments.host, port))
        try:
            server.serve(application, listening, when_ready=say_ready)
        finally:
            queue.close(server.CLOSE_SECONDS)


def check_app_extra() -> None:
    """Raises before anything else if Gradio is missing.

    Raises:
      MissingExtraError: Names the command to run.
    """
    if importlib.util.find_spec("gradio") is None:
        raise video_io.MissingExtraError(
            f"draft-video app needs gradio: {INSTALL_APP_EXTRA}"
        )


def limits_from(arguments: argparse.Namespace) -> Limits:
    """Returns the limits that the options describe.

    Raises:
      ValueError: One is not positive.
    """
    for flag, value in (
        ("--max-frames", arguments.max_frames),
        ("--max-pixels", arguments.max_pixels),
        ("--max-memory", arguments.max_memory),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value} must be a positive number")
    memory = arguments.max_memory
    return Limits(
        frames=arguments.max_frames,
        pixels=arguments.max_pixels,
        memory_bytes=None if memory is None else int(memory * 2**30),
    )


def hosts_of(host: str, allowed: list[str]) -> AllowedHosts:
    """Returns the names by which the page may be asked for.

    Args:
      host: Address that the server listens at.
      allowed: Names that the user adds.
    """
    names = {*allowed, host}
    if host in LOCAL_NAMES:
        return AllowedHosts(frozenset(names | LOCAL_NAMES))
    names |= LOCAL_NAMES | {socket.gethostname()}
    return AllowedHosts(frozenset(names), addresses=True)


def _upload_bytes(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.max_upload < float("inf"):
        raise ValueError(
            f"--max-upload {arguments.max_upload} must be a positive number"
        )
    return max(1, int(arguments.max_upload * 2**20))


def _share(host: str, port: int) -> str:
    """Makes a public link, prints it, and returns its name.

    Raises:
      OSError: There is none, such as without a network.
    """
    from gradio import networking

    local = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host
    try:
        url = networking.setup_tunnel(
            local, port, secrets.token_urlsafe(32), None, None
        )
    except Exception as error:
        raise OSError(f"--share: no public link can be made ({error})") from error
    print(f"draft-video app: public link {url}", flush=True)
    return str(urlsplit(url).hostname)
