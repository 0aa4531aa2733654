"""Reads pictures."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float

from models.media.video import INSTALL_VIDEO_EXTRA, MissingExtraError

# Pillow's modes with more than eight bits for a value, which it would clip.
_WIDE_MODES = ("I", "F")


def read_image(path: Path | str) -> Float[np.ndarray, "height width 3"]:
    """Reads a picture's colours in [-1, 1].

    Turned upright as its camera noted it. Transparency is dropped, as Wan2.1 does it.

    Args:
      path: A file of any format that Pillow reads, eight bits for each colour.

    Raises:
      FileNotFoundError: There is no such file.
      MissingExtraError: Pillow is not installed.
      ValueError: It is not a picture, is damaged, or has values of 16 or 32 bits.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} is not a file")
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError(f"reading images needs pillow: {INSTALL_VIDEO_EXTRA}")
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # A file that unpacks to hundreds of millions of pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                mode = picture.mode
                upright = ImageOps.exif_transpose(picture)
                pixels = np.asarray(upright.convert("RGB"), np.float32)
    except (
        OSError,  # what Pillow raises for formats it does not know, and cut files
        SyntaxError,  # for damaged PNG files
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    if mode.startswith(_WIDE_MODES):
        raise ValueError(f"image {path} has {mode=}; expected eight bits for a value")
    return pixels / np.float32(127.5) - np.float32(1.0)
