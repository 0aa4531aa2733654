"""Limits of what a page may ask for, so that it cannot fill the memory."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from draft_jax import DraftConfig, VideoGrid, initial_mask
from models.app.form import FormError
from models.cli.model import Request
from models.diffusion.interfaces import KeepsResidual, LatentShape, VideoModel
from models.diffusion.pipeline import VideoPipeline

# Arrays of a step, each as wide as the model for every token and row: the residual
# stream and its norm, queries, keys and values before and after their rotation, what
# attention and a feed-forward network make, in float32 here and there. A single block
# of HunyuanVideo joins them and has the most. Compiled steps grow by 9 (Wan) to 15
# (HunyuanVideo) with each token, of widths from 64 to 256 and 512 to 4,128 tokens
# (memory_analysis, jax 0.12.0.1, CPU, 2026-11-30).
STEP_ARRAYS = 16
# Copies of a video in float32: decoded, clipped and as bytes, of two runs.
VIDEO_COPIES = 8
_SHARE_OF_FREE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Most of what a request may ask for.

    Args:
      frames: Frames of a video.
      pixels: Pixels of a frame.
      memory_bytes: Memory of a run, by `run_bytes`; None for no limit.

    Raises:
      ValueError: A limit is not positive.
    """

    frames: int = 257
    pixels: int = 1920 * 1088
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name}={value!r} must be positive")

    def check(self, request: Request, pipeline: VideoPipeline | None) -> None:
        """Checks a request.

        Args:
          request: What is asked for.
          pipeline: The model, which tells the memory; None before it is loaded.

        Raises:
          FormError: It is too large.
        """
        sampling = request.sampling
        pixels = sampling.height * sampling.width
        messages = {}
        if sampling.frames > self.frames:
            messages["frames"] = (
                f"frames={sampling.frames} is more than {self.frames}, the most that "
                "this server takes (--max-frames)"
            )
        if pixels > self.pixels:
            messages["width"] = (
                f"{sampling.width}x{sampling.height} has {pixels} pixels, more than "
                f"{self.pixels}, the most that this server takes (--max-pixels)"
            )
        if not messages and self.memory_bytes is not None and pipeline is not None:
            needed = run_bytes(request, pipeline)
            if needed > self.memory_bytes:
                messages["frames"] = (
                    f"{sampling.frames} frames of {sampling.width}x{sampling.height} "
                    f"need about {_gib(needed)} GiB, more than "
                    f"{_gib(self.memory_bytes)} GiB, the most that this server takes "
                    "(--max-memory): make fewer frames or smaller ones"
                )
        if messages:
            raise FormError(messages)


def run_bytes(request: Request, pipeline: VideoPipeline) -> int:
    """Returns an estimate of the memory that a run needs beside the weights.

    It follows from shapes alone, of any model: `STEP_ARRAYS` arrays of a block for the
    rows that run at once, the masks of all layers, what a step cache keeps, and copies
    of the video. What the decoder needs is not in it.
    """
    sampling, model = request.sampling, pipeline.model
    shape = pipeline.latent_shape(sampling)
    grid = model.grid(shape)
    rows = 2 if sampling.guided else 1
    at_once = 1 if request.arguments.guidance_batching == "two_calls" else rows
    array = grid.num_tokens * _bytes_of_a_token(model, shape)
    kept = rows * array if request.cache is not None else 0
    masks = 0
    if not request.arguments.dense:
        masks = model.num_layers * rows * _mask_bytes(model, grid, request.draft[0])
    pixels = sampling.frames * sampling.height * sampling.width
    video = VIDEO_COPIES * 4 * 3 * pixels
    return STEP_ARRAYS * at_once * array + masks + kept + video


def _bytes_of_a_token(model: VideoModel, shape: LatentShape) -> int:
    """Returns the bytes of a token in the stream between a model's blocks."""
    assert isinstance(model, KeepsResidual)  # every family's does
    residual = model.residual_shape(shape)
    return residual.shape[-1] * residual.dtype.itemsize


def _mask_bytes(model: VideoModel, grid: VideoGrid, config: DraftConfig) -> int:
    """Returns the bytes of the mask of a layer and a row."""
    mask = jax.eval_shape(
        lambda: initial_mask(grid, config, batch=1, num_heads=model.num_heads)
    )
    leaves = jax.tree.leaves(mask)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def free_memory_bytes() -> int | None:
    """Returns the share of the free memory that runs may use; None if not known."""
    free = _free_on_device()
    return None if free is None else int(_SHARE_OF_FREE * free)


def _free_on_device() -> int | None:
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats: dict[str, Any] = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    information = Path("/proc/meminfo")
    if not information.is_file():
        return None
    for line in information.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(value.split()[0])
    return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
