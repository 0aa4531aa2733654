"""Whole published models, all parts, against what diffusers' pipelines generated.

The folders are those of tests/fixtures/make_wan_folder_fixtures.py and, from an image,
make_wan_image_folder_fixtures.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from models.diffusion.sampling import Sampling
from models.loading import load_pipeline
from models.umt5.config import UMT5Config
from models.wan.checkpoint import WanFolder
from models.wan.sampling import wan_sampling
from models.wan.vae.config import WanVAEConfig

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDERS = FIXTURES / "wan_folders"
# Float32 over five guided steps. Measured: latents 2.2e-5 of at most 7.6, in both
# layouts alike, and from an image 2.0e-5 of 5.0; video 2.2e-6 and 1.3e-6 of 1.
LATENTS = {"rtol": 0, "atol": 5e-5}
VIDEO = {"rtol": 0, "atol": 5e-6}


def read_expected(name):
    """Arrays with channels last, and the settings."""
    file = FOLDERS / f"{name}.safetensors"
    with safetensors.safe_open(file, "np") as stored:
        settings = json.loads(stored.metadata()["settings"])
    arrays = safetensors.numpy.load_file(file)
    for key in ("noise", "latents"):
        arrays[key] = arrays[key].transpose(0, 2, 3, 4, 1)
    arrays["video"] = arrays["video"].transpose(0, 1, 3, 4, 2)
    return arrays | {"settings": settings}


def make_sampling(settings):
    """As in the pipeline that made the fixtures, whose scheduler the folder has."""
    scheduler = WanFolder.open(FOLDERS / "diffusers").scheduler()
    return Sampling(
        frames=settings["num_frames"],
        height=settings["height"],
        width=settings["width"],
        num_steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        negative_prompt=settings["negative_prompt"],
        shift=scheduler.shift,
        solver=scheduler.solver,
        grid=scheduler.grid,
    )


@pytest.fixture(params=["diffusers", "original"])
def folder(request, tmp_path, monkeypatch):
    """A folder; sizes that the original's code fixes are set to the tiny ones."""
    if request.param == "diffusers":
        return FOLDERS / "diffusers"
    shutil.copytree(FOLDERS / "original", tmp_path / "original")
    tokenizer = tmp_path / "original" / "google" / "umt5-xxl"
    shutil.copytree(FOLDERS / "diffusers" / "tokenizer", tokenizer)
    for config, name, part in (
        (UMT5Config, "xxl", "text_encoder"),
        (WanVAEConfig, "wan2_1", "vae"),
    ):
        stored = json.loads((FOLDERS / "diffusers" / part / "config.json").read_text())

        def tiny(cls, stored=stored, **changes):
            return cls.from_dict(stored, **changes)

        monkeypatch.setattr(config, name, classmethod(tiny))
    return tmp_path / "original"


def test_video_of_a_prompt_is_that_of_diffusers(folder):
    expected = read_expected("expected")
    settings = expected["settings"]
    sampling = make_sampling(settings)
    pipeline = load_pipeline(folder)
    own = wan_sampling("480p", solver="unipc", shift=sampling.shift)
    if folder.name == "diffusers":
        own = dataclasses.replace(own, grid=sampling.grid)
    else:  # whose folder says nothing: the settings of its code
        own = dataclasses.replace(own, shift=5.0)
    assert (pipeline.sampling, pipeline.fps) == (own, 16.0)
    result = pipeline.generate(settings["prompt"], sampling, noise=expected["noise"])
    np.testing.assert_allclose(result.latents, expected["latents"], **LATENTS)
    np.testing.assert_allclose(result.video, expected["video"], **VIDEO)


@pytest.mark.nightly
def test_video_of_an_image_is_that_of_diffusers(tmp_path):
    """From pixels: image tower and autoencoder see the image too."""
    folder = tmp_path / "image"
    ignore = shutil.ignore_patterns("transformer")
    shutil.copytree(FOLDERS / "diffusers", folder, ignore=ignore)
    shutil.copytree(FOLDERS / "image", folder, dirs_exist_ok=True)
    expected = read_expected("expected_image")
    settings = expected["settings"]
    result = load_pipeline(folder).generate(
        settings["prompt"],
        make_sampling(settings),
        image=expected["image"].astype(np.float32) / 127.5 - 1.0,
        noise=expected["noise"],
    )
    np.testing.assert_allclose(result.latents, expected["latents"], **LATENTS)
    np.testing.assert_allclose(result.video, expected["video"], **VIDEO)
