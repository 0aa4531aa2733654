"""The options of `draft-video decode`, made without importing jax."""

import argparse
from pathlib import Path
from typing import Any

from models.cli.model_options import add_process_options, add_vae_options

_EXAMPLES = """examples:
  draft-video decode outputs/a-cat-0-1234abcd
  draft-video decode outputs/a-cat-0-1234abcd --vae-tile 256
"""


def add_decode(commands: Any, **options: Any) -> None:
    """Adds the command.

    Args:
      commands: What `add_subparsers` returned.
      **options: Of `add_parser`, such as the formatter of the help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "decode",
        help="make the video of latents that were kept",
        description="Makes the video of a run that could not be decoded, for lack of "
        "memory say, from the latents that generate has kept in its folder. The "
        "autoencoder is loaded alone.",
        epilog=_EXAMPLES,
        **options,
    )
    parser.add_argument(
        "latents",
        type=Path,
        metavar="FOLDER",
        help="folder of the run, or its latents.safetensors; the video goes there",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a video of that name"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="where the model is now (default: where it was)",
    )
    parser.add_argument(
        "--vae",
        type=Path,
        metavar="PATH",
        help="autoencoder in place of the model's (default: as in the run)",
    )
    add_vae_options(parser)
    add_process_options(parser)
