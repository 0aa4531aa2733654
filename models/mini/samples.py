"""Contact sheets: some frames of one video per prompt, side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from models.diffusion.sampling import Sampling
from models.files import whole_file
from models.media.video import to_bytes
from models.mini.checkpoint import MiniCheckpoint
from models.mini.pipeline import pipeline_of

FRAMES_SHOWN = 5
CAPTION_HEIGHT = 14  # pixels
GAP = 2  # pixels


def contact_sheet(
    checkpoint: MiniCheckpoint,
    prompts: Sequence[str],
    path: Path,
    *,
    frames: int,
    height: int,
    width: int,
) -> None:
    """Samples one video per prompt, with the pipeline's defaults, and draws them.

    Args:
      checkpoint: The model.
      prompts: One row each, two rows beside each other.
      path: PNG to write.
      frames: Frames of each video; a few of them are shown.
      height: Rows of pixels.
      width: Columns of pixels.
    """
    sampling = Sampling(frames=frames, height=height, width=width)
    result = pipeline_of(checkpoint).generate(list(prompts), sampling)
    draw_sheet(path, prompts, result.video)


def draw_sheet(
    path: Path,
    captions: Sequence[str],
    videos: Float[np.ndarray, "B T Y X 3"],
    *,
    columns: int = 2,
) -> None:
    """Writes evenly spaced frames of each video under its caption.

    Args:
      path: PNG to write.
      captions: One for each video.
      videos: Values in [0, 1].
      columns: Videos beside each other.
    """
    from PIL import Image, ImageDraw

    count, length, height, width, _ = videos.shape
    shown = np.unique(np.linspace(0, length - 1, FRAMES_SHOWN).round().astype(int))
    cell_width = len(shown) * (width + GAP) + 2 * GAP
    cell_height = height + CAPTION_HEIGHT + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (caption, video) in enumerate(zip(captions, videos, strict=True)):
        top, left = index // columns * cell_height, index % columns * cell_width
        pen.text((left, top), caption, fill="black")
        for place, frame in enumerate(to_bytes(video[shown])):
            corner = (left + place * (width + GAP), top + CAPTION_HEIGHT)
            sheet.paste(Image.fromarray(frame), corner)
    with whole_file(path) as temporary:
        sheet.save(temporary, optimize=True)
