"""The `draft-video` command: a thin shell over the pipelines in `models`."""

from draft_jax.cli.entry import main

__all__ = ["main"]
