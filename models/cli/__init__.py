"""The `draft-video` command: a thin shell over the pipelines in `models`."""

from models.cli.entry import main, run_process

__all__ = ["main", "run_process"]
