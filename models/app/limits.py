"""Limits of what a page may ask for, so that it cannot fill the memory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from models.app.form import FormError
from models.cli.model import Request
from models.diffusion.pipeline import VideoPipeline

# Arrays of a step, each as wide for every token and row as the widest layer (that of
# the modulation, six times the model's width). The shipped model has 1.48 to 1.58, of
# 2,304 to 18,432 tokens (memory_analysis of its compiled steps, jax 0.12.0.1, CPU,
# 2026-11-29).
STEP_ARRAYS = 1.6
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
    """Returns an estimate of the memory that a run needs beside the weights."""
    sampling, model = request.sampling, pipeline.model
    tokens = model.grid(pipeline.latent_shape(sampling)).num_tokens
    one_call = request.arguments.guidance_batching == "one_call"
    rows = 2 if sampling.guided and one_call else 1
    weights = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.ndim > 1]
    widest = max(max(weight.shape[-2:]) for weight in weights)
    size = max(weight.dtype.itemsize for weight in weights)
    step = STEP_ARRAYS * rows * tokens * widest * size
    pixels = sampling.frames * sampling.height * sampling.width
    return int(step + VIDEO_COPIES * 4 * 3 * pixels)


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
