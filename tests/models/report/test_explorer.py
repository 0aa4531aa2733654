"""What the explorer of a page is given."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from draft_jax import VideoGrid
from models.diffusion.recording import AttentionRecord, Looks
from models.report.explorer import explorer_data


def record(**changes):
    shape = (1, 2, 1, 6, 6)
    fields = {
        "looks": Looks(steps=(3,), layers=(0, 7), heads=(0,)),
        "levels": np.arange(72, dtype=np.uint8).reshape(shape),
        "peaks": np.full(shape[:3], 0.5, np.float32),
        "masks": np.full((*shape[:4], 1), 0b10100000, np.uint8),
        "dense": np.array([[True, False]]),
        "timesteps": (750.0,),
        "grid": VideoGrid(3, 5, 8, tile=(4, 8), text_length=9),
        "video_frames": 3,
        "of_steps": 8,
        "of_layers": 8,
        "of_heads": 1,
        "time_ms": 12.0,
    }
    return AttentionRecord(**fields | changes)


def pictures_of(data):
    files = (io.BytesIO(base64.b64decode(text)) for text in data["frames"])
    return [Image.open(file) for file in files]


@pytest.mark.parametrize(
    ("video_frames", "middles"), [(3, [2, 6, 10]), (2, [3, 9]), (1, [6])], ids=str
)
def test_each_latent_frame_has_the_picture_in_its_middle(video_frames, middles):
    """Of twelve frames: thirds, halves, or all."""
    levels = np.linspace(0.1, 0.9, 12, dtype=np.float32)
    video = np.broadcast_to(levels[:, None, None, None], (12, 640, 960, 3))
    data = explorer_data(record(video_frames=video_frames), video)
    pictures = pictures_of(data)
    assert [picture.size for picture in pictures] == [(320, 213)] * video_frames
    greys = [np.asarray(picture).mean() for picture in pictures]
    np.testing.assert_allclose(greys, 255 * levels[middles], atol=2)


def test_maps_and_masks_are_as_recorded():
    data = explorer_data(record(), None)
    assert list(base64.b64decode(data["levels"])) == list(range(72))
    assert base64.b64decode(data["masks"]) == bytes([0b10100000]) * 12
    assert data["frames"] == []
    assert data["grid"] == {
        "frames": 3,
        "tiles": [2, 1],
        "tile": [4, 8],
        "tokens": [5, 8],
        "text": 9,
    }


def test_what_was_left_out_is_said():
    data = explorer_data(record(), None)
    expected = "Recorded were 1 of 8 steps, 2 of 8 layers, chosen before the run."
    assert data["left_out"] == expected
    everything = record(of_steps=1, of_layers=2)
    assert explorer_data(everything, None)["left_out"] == ""
