"""The pipeline of a small model."""

import dataclasses
from pathlib import Path

from models.diffusion.dtypes import Linears, choose_linears, default_dtype
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.mini.checkpoint import MiniCheckpoint, MiniTextEncoder


def load_mini(
    path: Path | str | None = None,
    *,
    linears: Linears = "bfloat16",
    mesh: DeviceMesh | None = None,
) -> VideoPipeline:
    """Loads a small model, by default the one that ships.

    Args:
      path: A folder in the format of `models/mini/weights`.
      linears: Precision of the transformer's linear layers; see `load_pipeline`.
      mesh: Devices that share the transformer; see `load_pipeline`.

    Raises:
      CheckpointError: The folder is missing, incomplete, or of another format.
      ValueError: The device has no FP8.
    """
    checkpoint = MiniCheckpoint.load(
        path, dtype=default_dtype(), linears=choose_linears(linears)
    )
    return dataclasses.replace(pipeline_of(checkpoint), mesh=mesh)


def pipeline_of(checkpoint: MiniCheckpoint) -> VideoPipeline:
    """Returns a pipeline around a model in memory."""
    return VideoPipeline(
        model=checkpoint.transformer,
        text_encoder=MiniTextEncoder(checkpoint.vocabulary, checkpoint.text_embedding),
        codec=checkpoint.codec,
    )
