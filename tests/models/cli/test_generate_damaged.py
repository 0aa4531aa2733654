"""`draft-video generate` where a checkpoint is damaged: one line, and no files."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from models.cli import main
from models.media.run_folder import LATENTS
from tests.wan_folders import TEXT_TO_VIDEO, save_image_to_video

pytestmark = pytest.mark.nightly

SMALL = ("--size", "48x32", "--frames", "5", "--steps", "1", "--guidance", "1")
# More can't be had of the two blocks of so small a video, which a note would say.
SMALL += ("--sparsity", "0.5")


def spoil(folder, part, key):
    """Turns one weight into NaN."""
    for file in (folder / part).glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        if key in tensors:
            tensors[key] = np.full_like(tensors[key], np.nan)
            safetensors.numpy.save_file(tensors, file)
            return folder
    raise AssertionError(f"no file of {folder / part} holds {key}")


def error_of(checkpoint, output, capsys, *arguments, status=2):
    """The only line of a run that fails; it leaves files behind with status 3 alone."""
    command = ["generate", "a cat", "--checkpoint", str(checkpoint), *SMALL]
    assert main([*command, "--output", str(output), *arguments]) == status
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert output.exists() == (status == 3)
    return captured.err


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_a_video_that_is_not_finite_is_not_written(tmp_path, capsys, tiled):
    folder = shutil.copytree(TEXT_TO_VIDEO, tmp_path / "model")
    spoil(folder, "vae", "decoder.conv_in.bias")
    tiles = ("--vae-tile", "32") if tiled else ()
    error = error_of(folder, tmp_path / "out", capsys, *tiles, status=3)
    assert "the video that the codec decoded is not finite: check the codec's" in error
    assert [file.name for file in (tmp_path / "out").iterdir()] == [LATENTS]


def test_an_image_whose_latent_is_not_finite_is_told(tmp_path, capsys):
    folder = spoil(
        save_image_to_video(tmp_path / "model"), "vae", "encoder.conv_in.bias"
    )
    file = tmp_path / "image.png"
    Image.new("RGB", (48, 32)).save(file)
    error = error_of(folder, tmp_path / "out", capsys, "--image", str(file))
    assert "the latent that the codec made of the image is not finite: che" in error
