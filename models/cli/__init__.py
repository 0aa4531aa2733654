"""The `draft-video` command: a thin shell over the pipelines in `models`."""

from models.cli.entry import main

__all__ = ["main"]
