"""The pipeline of a small model."""

from pathlib import Path

from models.diffusion.dtypes import default_dtype
from models.diffusion.pipeline import VideoPipeline
from models.mini.checkpoint import MiniCheckpoint, MiniTextEncoder


def load_mini(path: Path | str | None = None) -> VideoPipeline:
    """Loads a small model, by default the one that ships.

    Args:
      path: A folder in the format of `models/mini/weights`.

    Raises:
      CheckpointError: The folder is missing, incomplete, or of another format.
    """
    return pipeline_of(MiniCheckpoint.load(path, dtype=default_dtype()))


def pipeline_of(checkpoint: MiniCheckpoint) -> VideoPipeline:
    """Returns a pipeline around a model in memory."""
    return VideoPipeline(
        model=checkpoint.transformer,
        text_encoder=MiniTextEncoder(checkpoint.vocabulary, checkpoint.text_embedding),
        codec=checkpoint.codec,
    )
