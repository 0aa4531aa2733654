"""Latents of a run that could not be decoded: kept in its folder."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.checkpoints.hub import commit_of
from models.cli.model import Request
from models.cli.report import command_line
from models.cli.tiles import smaller_tile
from models.diffusion.comparison import run_report
from models.diffusion.decoding import KeptLatents
from models.diffusion.results import DecodingError
from models.media.run_folder import LATENTS, RunFolder


@contextlib.contextmanager
def keep_latents(
    files: RunFolder, video: str, request: Request, details: dict[str, Any]
) -> Iterator[None]:
    """Writes latents where a run in the block cannot be decoded.

    The video becomes a file that is missing, for a reason that says what to do.

    Args:
      files: The folder of the run.
      video: Name of the file that the video would have had.
      request: Settings of the run.
      details: Entries to put in front of the run's report.

    Raises:
      DecodingError: As in the block, once they are written.
    """
    try:
        yield
    except DecodingError as error:
        kept = KeptLatents(
            latents=error.result.latents,
            video=video,
            report=details | run_report(error.result),
            model=_model_of(request),
        )
        files.write(LATENTS, kept.write)
        said = str(error)
        if files.path / LATENTS in files.written:
            said += (
                f". Its latents are kept: {_command(files.path, request)} decodes them"
            )
        files.write(video, functools.partial(_fail, RuntimeError(said)))
        raise


def _fail(reason: Exception, path: Path) -> None:
    """Stands for the writer of a file that there cannot be."""
    raise reason


def _model_of(request: Request) -> dict[str, str | None]:
    """Returns how the model is found again, from any folder."""
    arguments = request.arguments
    given = {
        "checkpoint": arguments.checkpoint,
        "vae": arguments.vae,
        "revision": commit_of(request.info.path) or arguments.revision,
    }
    return {
        name: str(value.absolute())
        if isinstance(value, Path) and value.exists()
        else None
        if value is None
        else str(value)
        for name, value in given.items()
    }


def _command(folder: Path, request: Request) -> str:
    """Returns the command that decodes, on smaller tiles if the model has any."""
    arguments = ["decode", str(folder)]
    if "tiles" in request.family.takes:
        arguments += ["--vae-tile", str(smaller_tile(request.arguments))]
    if request.arguments.vae_dtype is not None:
        arguments += ["--vae-dtype", request.arguments.vae_dtype]
    return f"`{command_line(arguments)}`"
