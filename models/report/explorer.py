"""Data of the explorer of draft maps: what was recorded, and pictures of its frames."""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float

from models.diffusion.recording import DECADES, AttentionRecord
from models.media.video import check_video_extra, to_bytes

PICTURE_SIDE = 320  # pixels of a frame's longer side
_JPEG_QUALITY = 80


def explorer_data(
    record: AttentionRecord, video: Float[np.ndarray, "frames height width 3"] | None
) -> dict[str, Any]:
    """Returns what the explorer shows, ready for strict JSON.

    Args:
      record: Draft maps and masks.
      video: The video, or an estimate of it, in [0, 1]. Each latent frame is shown by
        the frame in the middle of those that it stands for. None for no pictures.

    Raises:
      MissingExtraError: Pillow is not installed.
    """
    grid, looks = record.grid, record.looks
    return {
        "grid": {
            "frames": grid.frames,
            "tiles": list(grid.tiles_per_frame),
            "tile": list(grid.tile),
            "tokens": [grid.height, grid.width],
            "text": grid.text_length,
        },
        "looks": [
            {"step": step, "timestep": timestep}
            for step, timestep in zip(looks.steps, record.timesteps, strict=True)
        ],
        "layers": list(looks.layers),
        "heads": list(looks.heads),
        "dense": record.dense.tolist(),
        "of": {
            "steps": record.of_steps,
            "layers": record.of_layers,
            "heads": record.of_heads,
        },
        "time_ms": record.time_ms,
        "decades": DECADES,
        "peaks": record.peaks.astype(float).tolist(),
        "levels": _base64(record.levels.tobytes()),
        "masks": _base64(record.masks.tobytes()),
        "frames": [] if video is None else _pictures(video, record.video_frames),
        "left_out": _left_out(record),
    }


def _left_out(record: AttentionRecord) -> str:
    """Says in a sentence what the record has not, or nothing."""
    looks = record.looks
    parts = [
        f"{len(shown)} of {total} {name}"
        for name, shown, total in (
            ("steps", looks.steps, record.of_steps),
            ("layers", looks.layers, record.of_layers),
            ("heads", looks.heads, record.of_heads),
        )
        if len(shown) < total
    ]
    if not parts:
        return ""
    return f"Recorded were {', '.join(parts)}, chosen before the run."


def _pictures(
    video: Float[np.ndarray, "frames height width 3"], latent_frames: int
) -> list[str]:
    """Returns a small JPEG for each latent frame, as text."""
    check_video_extra()
    from PIL import Image

    middles = (2 * np.arange(latent_frames) + 1) * len(video) // (2 * latent_frames)
    pictures = []
    for pixels in to_bytes(video[middles]):
        picture = Image.fromarray(pixels)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=_JPEG_QUALITY)
        pictures.append(_base64(file.getvalue()))
    return pictures


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
