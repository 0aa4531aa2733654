"""Sizes of videos: what suits a model, and an image."""

import pytest

from models.diffusion.sizes import latent_shape, side_multiples, size_like_image
from models.wan.config import WanConfig
from models.wan.sampling import wan_sampling
from models.wan.vae.config import WanVAEConfig

CONFIG = WanConfig.t2v_14b()
VAE = WanVAEConfig.wan2_1()
MODEL = {"patch_size": CONFIG.patch_size, "channels": CONFIG.out_channels}
SIZES = {"480p": 480 * 832, "720p": 720 * 1280}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 832), (21, 60, 104, 16)),
        ((832, 480), (21, 104, 60, 16)),
        ((720, 1280), (21, 90, 160, 16)),
        ((1280, 720), (21, 160, 90, 16)),
        ((768, 1280), (21, 96, 160, 16)),
        ((16, 16), (21, 2, 2, 16)),
        ((1008, 592), (21, 126, 74, 16)),
    ],
    ids=str,
)
def test_any_size_that_can_be_patched(size, expected):
    height, width = size
    sampling = wan_sampling("720p", height=height, width=width)
    assert latent_shape(sampling, VAE, **MODEL) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 488}, "height=488 must be a multiple of 16 .*, such as 480 or 496"),
        ({"width": 10}, "width=10 must be a multiple of 16 for this model, such as 16"),
        (
            {"frames": 80},
            "frames=80 must be 1 more than a multiple of 4, such as 77 or 81",
        ),
    ],
    ids=str,
)
def test_other_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        latent_shape(wan_sampling("480p", **changes), VAE, **MODEL)


def test_patches_of_several_frames():
    model = MODEL | {"patch_size": (2, 2, 1)}
    assert side_multiples(model["patch_size"], VAE) == (16, 8)
    with pytest.raises(ValueError, match="frames=81 gives 21 latent frames, which mus"):
        latent_shape(wan_sampling(), VAE, **model)


@pytest.mark.parametrize(
    ("image", "area", "expected"),
    [
        # Worked by hand: sqrt(area * height / width), down to a multiple of 16.
        ((1000, 1500), "480p", (512, 768)),  # 515.98 x 773.97
        ((3024, 4032), "480p", (544, 720)),  # 547.28 x 729.71
        ((4032, 3024), "480p", (720, 544)),
        ((1080, 1920), "480p", (464, 832)),  # 473.96 x 842.61
        ((1080, 1920), "720p", (720, 1280)),  # exact
        ((45, 80), "720p", (720, 1280)),  # exact, and enlarged
        ((1024, 1024), "720p", (960, 960)),  # exact
        ((480, 832), "480p", (480, 832)),  # exact; 464 rows in floating point
        ((832, 480), "480p", (832, 480)),
        ((1, 100), "720p", (96, 9600)),  # 96 x 9600 exactly
    ],
    ids=str,
)
def test_size_with_the_aspect_ratio_of_an_image(image, area, expected):
    got = size_like_image(image, area=SIZES[area], multiples=(16, 16))
    assert got == expected


def test_images_too_long_for_an_area_are_named():
    with pytest.raises(
        ValueError, match=r"an image of 1 x 4000 pixels \(height x widt"
    ):
        size_like_image((1, 4000), area=SIZES["720p"], multiples=(16, 16))
