"""`draft-video generate` on folders of tiny Wan models, from text and from an image."""

import json

import numpy as np
import pytest
from PIL import Image

from draft_jax import SparsitySchedule
from models.cli import generate, main, options
from models.cli import model as cli_model
from models.cli.parser import build_parser
from models.diffusion.embeddings import GivenTextEncoder, PromptEmbedding
from models.diffusion.pipeline import VideoPipeline
from models.media import video as video_io
from models.umt5.text_encoder import UMT5TextEncoder
from models.wan.checkpoint import WanParts
from models.wan.vae.tiling import Tiling
from tests.wan_folders import TEXT_TO_VIDEO, save_image_to_video

PROMPT = "a cat"
SMALL = ("--size", "48x32", "--frames", "5", "--steps", "1", "--dense")


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return save_image_to_video(tmp_path_factory.mktemp("wan") / "image")


@pytest.fixture
def image(tmp_path):
    """64 rows and 160 columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 160, 3))
    file = tmp_path / "image.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


@pytest.fixture
def unloaded(monkeypatch):
    """Errors must come before weights are loaded."""

    def fail(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr(WanParts, "load_transformer", fail)
    monkeypatch.setattr(UMT5TextEncoder, "load", fail)


def run(checkpoint, folder, *arguments):
    command = ["generate", PROMPT, "--checkpoint", str(checkpoint), *SMALL]
    return main([*command, "--output", str(folder), *map(str, arguments)])


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.nightly
def test_later_runs_do_not_load_the_text_encoder(tmp_path, monkeypatch):
    kept = ("--embeddings", tmp_path / "kept")
    assert run(TEXT_TO_VIDEO, tmp_path / "first", *kept) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2  # and the negative prompt

    def fail(*_, **__):
        pytest.fail("the text encoder is loaded")

    monkeypatch.setattr(UMT5TextEncoder, "load", fail)
    assert run(TEXT_TO_VIDEO, tmp_path / "second", *kept) == 0
    videos = [
        (tmp_path / name / "video.mp4").read_bytes() for name in ("first", "second")
    ]
    assert videos[0] == videos[1]


def test_text_options_are_passed_on(tmp_path, monkeypatch):
    seen = []

    def stop(path, *, text, **_):
        seen.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_model, "load_pipeline", stop)
    for chosen in (("--text-device", "cpu"), ("--guidance", "1")):
        assert run(TEXT_TO_VIDEO, tmp_path / "out", *chosen) == 130
    assert seen[0].device.platform == "cpu"
    assert seen[1].device is None
    assert [len(text.prompts) for text in seen] == [2, 1]
    assert seen[1].prompts == (PROMPT,)


def test_prompts_that_a_file_of_embeddings_lacks_are_named(tmp_path, capsys):
    file = tmp_path / "prompts.safetensors"
    made = {"a dog": PromptEmbedding(np.zeros((2, 16), np.float32))}
    GivenTextEncoder(embeddings=made, text_length=512).save(file)
    chosen = ("--embeddings", file, "--guidance", "1")
    assert run(TEXT_TO_VIDEO, tmp_path / "out", *chosen) == 2
    error = capsys.readouterr().err
    assert "no embeddings were given for ['a cat']" in error
    assert error.count("\n") == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fit", "size", "kept"),
    [
        # sqrt(48 * 32 * 64 / 160) = 24.8 rows, sqrt(48 * 32 * 160 / 64) = 62.0
        ("aspect", (16, 48), [[0, 64], [0, 160]]),
        ("crop", (32, 48), [[0, 64], [32, 128]]),
    ],
)
def test_video_of_an_image(image_model, image, tmp_path, capsys, fit, size, kept):
    folder = tmp_path / "out"
    chosen = ("--image", image, "--image-fit", fit)
    assert run(image_model, folder, *chosen) == 0
    report = read_report(folder)
    sampling = report["sampling"]
    assert (sampling["height"], sampling["width"]) == size
    assert sampling["shift"] == 3.0  # of the folder's scheduler
    assert report["image"] == {"file": str(image), "size": [64, 160], "kept": kept}
    assert video_io.read_mp4(folder / "video.mp4").shape == (5, *size, 3)
    part = {"aspect": "all", "crop": "rows 0-64 and columns 32-128"}[fit]
    line = f"image: {part} of 160x64, resized to {size[1]}x{size[0]}"
    assert capsys.readouterr().out.splitlines()[0] == line


@pytest.mark.nightly
def test_inspect_takes_an_image(image_model, image, tmp_path):
    command = ["inspect", PROMPT, "--checkpoint", str(image_model), *SMALL[:-1]]
    command += ["--image", str(image), "--layers", "0", "--heads", "0"]
    assert main([*command, "--output", str(tmp_path / "view.png")]) == 0


@pytest.mark.usefixtures("unloaded")
def test_images_and_models_must_fit(image_model, image, tmp_path, capsys):
    def error_of(checkpoint, *arguments):
        assert run(checkpoint, tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    given = ("--image", image)
    expected = "image is given, but this is a text-to-video model"
    assert expected in error_of(TEXT_TO_VIDEO, *given)
    expected = "image is missing, but this is an image-to-video model"
    assert expected in error_of(image_model)
    absent = tmp_path / "absent.png"
    assert f"image {absent} is not a file" in error_of(image_model, "--image", absent)
    image.write_bytes(b"text")
    assert f"image {image} cannot be read" in error_of(image_model, *given)
    Image.new("RGB", (4000, 1)).save(image)
    assert "is too long for a video of its shape" in error_of(image_model, *given)


@pytest.mark.nightly
def test_the_autoencoder_can_run_on_tiles(tmp_path, monkeypatch):
    seen = []

    def note(self, *arguments, **options):
        seen.append(self.codec.tiling)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoPipeline, "generate", note)
    assert run(TEXT_TO_VIDEO, tmp_path / "out", "--vae-tile", "64") == 130
    assert seen == [Tiling(size=(64, 64), overlap=(16, 16))]


def test_the_shipped_model_takes_no_tiles(tmp_path, capsys):
    command = ["generate", PROMPT, "--vae-tile", "64"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "--vae-tile 64 fits HunyuanVideo and Wan models" in capsys.readouterr().err


def test_the_shipped_model_takes_no_image(image, tmp_path, capsys):
    command = ["generate", PROMPT, "--image", str(image)]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert f"--image {image} is given, but this is a text-to" in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "50x32"), "width=50 must be a multiple of 16 for this model, such"),
        (("--size", "48x40"), "height=40 must be a multiple of 16 for this model, su"),
        (("--frames", "8"), "frames=8 must be 1 more than a multiple of 4"),
        (("--embedded-guidance", "6"), "embedded_guidance is given, but Wan models ar"),
        (
            ("--preset", "published", "--dense-fraction", "0.3"),
            "--dense-fraction 0.3 is given with --preset published",
        ),
        (("--steps", "0"), "num_steps=0 must be a positive integer"),
        (("--vae-tile", "40"), "--vae-tile 40 must be a positive multiple of 32"),
        (("--embeddings", "no.safetensors"), "'no.safetensors' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_sizes_are_told_before_weights_are_loaded(
    tmp_path, capsys, arguments, message
):
    assert run(TEXT_TO_VIDEO, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
def test_ssim_is_checked_at_the_size_of_the_model(tmp_path, monkeypatch):
    """Not at that of the model that ships, which is smaller."""
    seen = []

    def note(*size):
        seen.append(size)
        raise ValueError("noted")

    monkeypatch.setattr(generate.metrics, "check_ssim_size", note)
    command = ["generate", PROMPT, "--checkpoint", str(TEXT_TO_VIDEO), "--compare"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert main([*command, "--size", "64x48"]) == 2
    assert seen == [(480, 832), (48, 64)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("given", "grid"),
    [
        ((), "diffusers"),
        (("--solver", "unipc"), "diffusers"),
        (("--grid", "wan"), "wan"),
    ],
    ids=["folder", "same-solver", "wan"],
)
def test_noise_levels_are_the_folders_unless_given(tmp_path, given, grid):
    assert run(TEXT_TO_VIDEO, tmp_path, *given, "--guidance", "1") == 0
    sampling = read_report(tmp_path)["sampling"]
    assert (sampling["solver"], sampling["grid"]) == ("unipc", grid)
    assert sampling["shift"] == 3.0


@pytest.mark.parametrize(
    ("given", "sparsity", "schedule"),
    [
        ((), 0.9, SparsitySchedule(dense_fraction=0.25)),
        (
            ("--preset", "published"),
            0.75,
            SparsitySchedule(dense_above_timestep=925.0, dense_layers=(0,)),
        ),
        (
            ("--preset", "published", "--sparsity", "0.9", "--dense-layers", ""),
            0.9,
            SparsitySchedule(dense_above_timestep=925.0),
        ),
        (
            ("--method", "paper", "--dense-layers", "1", "--mask-refresh", "2"),
            0.75,
            SparsitySchedule(dense_fraction=0.25, dense_layers=(1,), mask_refresh=2),
        ),
    ],
    ids=["default", "published", "overridden", "paper"],
)
def test_presets_choose_the_dense_steps(given, sparsity, schedule):
    """Wan's rule, as the published code has it: t > 925 and block 0, 0.75."""
    parsed = build_parser().parse_args(
        ["generate", PROMPT, "--checkpoint", str(TEXT_TO_VIDEO), *given]
    )
    config, got = cli_model.read_request(parsed).draft
    assert (config.sparsity, got) == (sparsity, schedule)


def test_the_shipped_model_has_no_published_rule(tmp_path, capsys):
    command = ["generate", PROMPT, "--preset", "published"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--preset published: there is no published rule for this model" in error


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("480p", (832, 480)),
        ("720p", (1280, 720)),
        ("720x1280", (720, 1280)),
        ("832x480", (832, 480)),
    ],
)
def test_sizes_by_name(text, size):
    arguments = build_parser().parse_args(["generate", PROMPT, "--size", text])
    sampling = options.sampling_from(arguments)
    assert (sampling.width, sampling.height) == size


def test_unknown_sizes_are_told(capsys):
    assert main(["generate", PROMPT, "--size", "1080p"]) == 2
    assert (
        "'1080p' must be WIDTHxHEIGHT in pixels, such as 128x96, or one of 480p, "
        in (capsys.readouterr().err)
    )
