"""`draft-video decode`: latents of a run that could not be decoded, and their video."""

import json
import shutil

import numpy as np
import pytest

from models.cli import main
from models.diffusion.decoding import KeptLatents
from models.media import video as video_io
from models.wan.vae.codec import WanVAECodec
from tests import hunyuan_folders, tiny_model
from tests.wan_folders import TEXT_TO_VIDEO

PROMPT = "a red ball"
SMALL = ("--size", "48x32", "--frames", "3", "--steps", "2")
FAILED = {"latents.safetensors"}
MADE = {"video.mp4", "report.json", "report.html"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def generate(checkpoint, output, *options):
    chosen = ("--checkpoint", str(checkpoint), "--output", str(output))
    return main(["generate", PROMPT, *chosen, *options])


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.nightly
def test_a_run_that_is_not_decoded_is_made_later(
    checkpoint, tmp_path, monkeypatch, capsys
):
    whole, failed = tmp_path / "whole", tmp_path / "it's failed"
    assert generate(checkpoint, whole, *SMALL, "--dense", "--fps", "7") == 0
    with monkeypatch.context() as patch:
        tiny_model.fail_to_decode(patch)
        capsys.readouterr()
        assert generate(checkpoint, failed, *SMALL, "--dense", "--fps", "7") == 3
    assert names(failed) == FAILED
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert "video.mp4 (RuntimeError: the video cannot be decoded: so much" in error
    command = f"draft-video decode '{tmp_path}/it'\"'\"'s failed'"
    assert f"Its latents are kept: `{command}` decodes them" in error
    assert captured.out == f"{failed / 'latents.safetensors'}\n"

    assert main(["decode", str(failed)]) == 0
    assert names(failed) == FAILED | MADE
    expected = (whole / "video.mp4").read_bytes()
    assert (failed / "video.mp4").read_bytes() == expected
    reports = [json.loads((f / "report.json").read_text()) for f in (whole, failed)]
    assert set(reports[0]) == set(reports[1])
    for name in ("prompt", "sampling", "attention", "fps", "dense_steps", "stopped"):
        assert reports[0][name] == reports[1][name]
    assert len(reports[1]["time_ms_per_step"]) == 2
    assert reports[1]["decode_ms"] > 0
    # Again only if it is asked for.
    (failed / "video.mp4").write_bytes(b"")
    assert main(["decode", str(failed / "latents.safetensors")]) == 2
    assert "video.mp4 exists; --overwrite replaces it" in capsys.readouterr().err
    assert main(["decode", str(failed), "--overwrite"]) == 0
    assert (failed / "video.mp4").read_bytes() == expected


@pytest.mark.nightly
def test_of_a_comparison_the_dense_video_stays(checkpoint, tmp_path, monkeypatch):
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert generate(checkpoint, whole, *SMALL, "--compare") == 0
    with monkeypatch.context() as patch:
        tiny_model.fail_to_decode(patch, after=1)
        assert generate(checkpoint, failed, *SMALL, "--compare") == 3
    assert names(failed) == FAILED | {"dense.mp4"}
    assert main(["decode", str(failed)]) == 0
    for name in ("dense.mp4", "sparse.mp4"):
        assert (failed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.nightly
def test_later_seeds_do_not_run_for_nothing(checkpoint, tmp_path, monkeypatch):
    tiny_model.fail_to_decode(monkeypatch)
    assert generate(checkpoint, tmp_path / "out", *SMALL, "--seed", "1,2") == 3
    assert names(tmp_path / "out") == {"1"}


@pytest.mark.nightly
def test_a_wan_video_is_decoded_on_the_tiles_that_are_suggested(
    tmp_path, monkeypatch, capsys
):
    """The autoencoder alone is loaded, from wherever the model is by then."""
    here = tmp_path / "model"
    shutil.copytree(TEXT_TO_VIDEO, here)
    small = ("--size", "96x64", "--frames", "5", "--steps", "1", "--guidance", "1")
    tiles = ("--vae-tile", "64", "--vae-dtype", "bfloat16")

    def fail(*_):
        raise MemoryError("so much memory is not there")

    with monkeypatch.context() as patch:
        patch.setattr(WanVAECodec, "decode_to_host", fail)
        out = tmp_path / "out"
        assert generate(here, out, *small, "--dense", *tiles) == 3
    command = f"`draft-video decode {out} --vae-tile 32 --vae-dtype bfloat16`"
    assert command in capsys.readouterr().err
    assert generate(here, tmp_path / "whole", *small, "--dense", *tiles) == 0
    moved = here.rename(tmp_path / "moved")
    shutil.rmtree(moved / "text_encoder")
    assert main(["decode", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{here} does not exist" in error
    assert main(["decode", str(out), "--checkpoint", str(moved), *tiles]) == 0
    videos = [tmp_path / name / "video.mp4" for name in ("out", "whole")]
    assert videos[0].read_bytes() == videos[1].read_bytes()


@pytest.mark.nightly
def test_a_hunyuan_video_is_decoded(tmp_path, monkeypatch):
    hunyuan_folders.use_tiny_sizes(monkeypatch)
    folder = hunyuan_folders.write_folders(tmp_path)["original"]
    latents = np.zeros((1, 2, 4, 6, 4), np.float32)
    report = {
        "prompt": PROMPT,
        "fps": 24.0,
        "sampling": {"frames": 5, "height": 32, "width": 48},
    }
    KeptLatents(
        latents=latents,
        video="video.mp4",
        report=report,
        model={"checkpoint": str(folder), "vae": None, "revision": None},
    ).write(tmp_path / "run" / "latents.safetensors")
    assert main(["decode", str(tmp_path / "run")]) == 0
    assert video_io.read_mp4(tmp_path / "run" / "video.mp4").shape == (5, 32, 48, 3)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        ("../x.mp4", (), "'../x.mp4' must be one of dense.mp4"),
        ("video.mp4", ("--vae-tile", "40"), "--vae-tile 40 must be a positive"),
        ("video.mp4", ("--vae-tile", "64"), "tiles=64: arguments that fit"),
        ("video.mp4", ("--vae-dtype", "bfloat16"), "codec_dtype=bfloat16"),
        ("video.mp4", ("--vae", "x"), "files.vae=x"),
        ("video.mp4", ("--checkpoint", "no/where/x"), "no/where/x does not exist"),
    ],
)
def test_what_is_refused(tmp_path, capsys, video, options, message):
    """A name in a file leads to no other folder."""
    KeptLatents(
        latents=np.zeros((1, 1, 1, 1, 16), np.float32),
        video=video,
        report={},
        model={"checkpoint": None, "vae": None, "revision": None},
    ).write(tmp_path / "run" / "latents.safetensors")
    assert main(["decode", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == {"run"}


def test_a_folder_without_latents_is_named(tmp_path, capsys):
    assert main(["decode", str(tmp_path)]) == 2
    assert f"{tmp_path / 'latents.safetensors'}" in capsys.readouterr().err
