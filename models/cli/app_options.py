"""The options of `draft-video app`, made without importing jax or Gradio."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.cli.model_options import add_model_options

_EXAMPLES = """examples:
  draft-video app
  draft-video app --port 8000 --outputs videos
  draft-video app --checkpoint Wan-AI/Wan2.1-T2V-1.3B
"""


def add_app(commands: Any, **options: Any) -> None:
    """Adds the command.

    Args:
      commands: What `add_subparsers` returned.
      **options: Of `add_parser`, such as the formatter of the help.
    """
    parser = commands.add_parser(
        "app",
        help="open a page to try sparsity on",
        description="Serves a page with one model in memory: a form, the progress of "
        "its run, players of dense and sparse videos, and earlier runs.",
        epilog=_EXAMPLES,
        **options,
    )
    add_model_options(parser)
    _add_own_options(parser)


def model_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """Returns those arguments of the command that `generate` has, too."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_own_options(parser)
    _, others = parser.parse_known_args(argv)
    return tuple(others)


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    """Adds what has a meaning for the page only."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; another one than 127.0.0.1 lets other machines in",
    )
    parser.add_argument(
        "--port",
        type=int,
        help="port to listen at (default: 7860, or the next free one)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which browsers may ask for the page, beside the address; may be "
        "repeated",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="make a public link through Gradio's servers, by which anybody who knows "
        "it can use the page; off unless given",
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        default=Path("outputs"),
        metavar="DIR",
        help="folder of runs, of which earlier ones are listed",
    )
    group = parser.add_argument_group("limits of a request")
    group.add_argument(
        "--max-frames", type=int, default=257, metavar="N", help="frames of a video"
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=1920 * 1088,
        metavar="N",
        help="pixels of a frame",
    )
    group.add_argument(
        "--max-memory",
        type=float,
        metavar="GIB",
        help="memory of a run beside the weights, as estimated (default: three "
        "quarters of what is free once the model is loaded)",
    )
    group.add_argument(
        "--max-upload",
        type=float,
        default=20.0,
        metavar="MIB",
        help="size of an image that is uploaded",
    )
