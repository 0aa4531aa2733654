"""Pictures that Pillow wrote."""

import numpy as np
import pytest
from PIL import Image

from models.media.image import read_image
from models.media.video import MissingExtraError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)


def test_values_of_a_picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(file)
    got = read_image(file)
    assert got.dtype == np.float32
    # (p / 255 - 0.5) / 0.5, as Wan has it
    np.testing.assert_allclose(got, (PIXELS / 255 - 0.5) / 0.5, rtol=0, atol=1e-7)
    assert read_image(str(file)).shape == (5, 7, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_other_kinds_become_colours(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    file = tmp_path / "picture.tiff"
    picture.save(file)
    expected = np.asarray(picture.convert("RGB")) / 127.5 - 1
    np.testing.assert_allclose(read_image(file), expected, rtol=0, atol=1e-6)


def test_pictures_are_turned_upright(tmp_path):
    file = tmp_path / "picture.png"
    picture = Image.fromarray(PIXELS)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    picture.save(file, exif=exif)
    expected = np.rot90(PIXELS, -1) / 127.5 - 1
    np.testing.assert_allclose(read_image(file), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"text", "cut"], ids=["empty", "text", "cut"])
def test_what_is_no_picture_is_named(tmp_path, content):
    file = tmp_path / "picture.png"
    if content == "cut":
        Image.fromarray(np.tile(PIXELS, (20, 20, 1))).save(file)
        content = file.read_bytes()[:-800]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"image {file} cannot be read: "):
        read_image(file)


def test_wide_values_are_refused(tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file)
    with pytest.raises(ValueError, match=r"mode='I;16'; expected eight bits"):
        read_image(file)


def test_missing_files_and_packages_are_named(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(FileNotFoundError, match=f"image {path} is not a file"):
            read_image(path)
    file = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match="reading images needs pillow: pip inst"
    ):
        read_image(file)


def test_pictures_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(file)
    for limit in (20, 10):  # a warning of Pillow's, and its error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="cannot be read: Image size"):
            read_image(file)
