"""`draft-video` on folders of a tiny HunyuanVideo model, with embeddings given."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from draft_jax import SparsitySchedule
from models import loading
from models.checkpoints.memory_map import CheckpointError
from models.cli import main
from models.cli import model as cli_model
from models.cli.parser import build_parser
from models.diffusion.text_options import TextOptions
from models.media import video as video_io
from tests import hunyuan_folders
from tests.wan_folders import TEXT_TO_VIDEO

PROMPT = "a cat"
SMALL = ("--size", "48x32", "--frames", "5", "--steps", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hunyuan_folders.write_folders(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prompts.safetensors"
    return hunyuan_folders.write_embeddings(file, PROMPT)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    hunyuan_folders.use_tiny_sizes(monkeypatch)


def run(command, checkpoint, embeddings, output, *arguments):
    chosen = ("--checkpoint", checkpoint, "--embeddings", embeddings, *SMALL)
    given = map(str, (command, PROMPT, *chosen, "--output", output, *arguments))
    return main(list(given))


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.nightly
def test_both_layouts_load_to_the_same_model(folders, embeddings):
    text = TextOptions(embeddings=embeddings, prompts=(PROMPT,))
    models = [
        (pipeline.model, pipeline.codec.model)
        for pipeline in (
            loading.load_pipeline(folder, text=text) for folder in folders.values()
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.state, models))


@pytest.mark.nightly
def test_both_layouts_make_the_same_video(folders, embeddings, tmp_path):
    videos = []
    for layout, folder in folders.items():
        output = tmp_path / layout
        assert run("generate", folder, embeddings, output, "--shift", "7") == 0
        videos.append(video_io.read_mp4(output / "video.mp4"))
        report = read_report(output)
        assert report["family"] == "HunyuanVideo"
        sampling = report["sampling"]
        assert (sampling["embedded_guidance"], sampling["guidance"]) == (6.0, 1.0)
        assert (sampling["solver"], sampling["grid"]) == ("euler", "linear")
        assert len(report["kept_share_per_layer"]) == 4
    assert videos[0].shape == (5, 32, 48, 3)
    np.testing.assert_array_equal(*videos)


def request_of(folder, embeddings, *arguments):
    chosen = ("--checkpoint", folder, "--embeddings", embeddings, *arguments)
    parsed = build_parser().parse_args(["generate", PROMPT, *map(str, chosen)])
    return cli_model.read_request(parsed)


@pytest.mark.parametrize(("layout", "shift"), [("original", 7.0), ("diffusers", 5.0)])
def test_settings_are_the_models_own(folders, embeddings, layout, shift):
    request = request_of(folders[layout], embeddings, "--preset", "published")
    sampling = request.sampling
    assert (sampling.frames, sampling.height, sampling.width) == (129, 720, 1280)
    assert (sampling.num_steps, sampling.shift) == (50, shift)
    config, schedule = request.draft
    assert config.sparsity == 0.9
    assert schedule == SparsitySchedule(dense_above_timestep=945.0, dense_layers=(0, 1))


@pytest.mark.nightly
def test_comparison_and_inspection(folders, embeddings, tmp_path):
    folder, output = folders["diffusers"], tmp_path / "both"
    tiled = ("--vae-tile", "32")  # pixels; the video has 48 columns
    assert run("generate", folder, embeddings, output, "--compare", *tiled) == 0
    assert (output / "side_by_side.mp4").is_file()
    picture = tmp_path / "view.png"
    assert run("inspect", folder, embeddings, picture, "--layers", "0,3") == 0
    assert picture.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "50x32"), "width=50 must be a multiple of 16"),
        (("--frames", "8"), "frames=8 must be"),
        (("--image-encoder", "x"), "--image-encoder x fits Wan models only"),
        (("--lora", "x.safetensors"), "x.safetensors does not exist"),
        (("--vae-tile", "40"), "--vae-tile 40 must be a positive multiple of 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused(
    folders, embeddings, tmp_path, capsys, arguments, message
):
    output = tmp_path / "out"
    assert run("generate", folders["original"], embeddings, output, *arguments) == 2
    assert message in capsys.readouterr().err


def test_steps_of_a_fast_adapter_are_suggested(folders, embeddings, tmp_path):
    file = tmp_path / "hyvideo_FastVideo_LoRA.safetensors"
    safetensors.numpy.save_file({"proj_out.diff_b": np.zeros(16, np.float32)}, file)
    with pytest.warns(UserWarning, match="'fastvideo'.*: --steps 6 --guidance 1 suit"):
        request_of(folders["diffusers"], embeddings, "--lora", file)


def test_missing_parts_are_named(folders, monkeypatch, capsys):
    # Packages come first: torch is there in this test, installed or not.
    monkeypatch.setattr("models.hunyuan.loading.check_text_packages", lambda: None)
    for layout, folder in folders.items():
        assert main(["generate", PROMPT, "--checkpoint", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{folder}, a HunyuanVideo model in the {layout} layout, lacks" in error
        lacking = error.partition(" lacks ")[2].partition("; expected ")[0].split(", ")
        for part in ("text_encoder", "text_encoder_2"):
            for file in ("config.json", "*.safetensors"):
                assert f"{part}/{file} ({part})" in lacking


def test_fp8_weights_with_a_map_are_refused(folders, embeddings, tmp_path):
    fp8 = tmp_path / "model_states_fp8.pt"
    fp8.write_bytes(b"")
    with pytest.raises(CheckpointError, match="FP8 weights whose scales are in a map"):
        request_of(fp8, embeddings, "--vae", folders["diffusers"])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("HunyuanVideoImageToVideoPipeline", "HunyuanVideo-I2V, which starts from"),
        ("HunyuanVideo15Pipeline", r"HunyuanVideo 1\.5 is another architecture"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path, named, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": named}))
    with pytest.raises(CheckpointError, match=message):
        loading.find_family(tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "hunyuan-video-i2v-720p").mkdir()
    (tmp_path / "hunyuan-video-i2v-720p" / "vae").mkdir()
    with pytest.raises(CheckpointError, match="HunyuanVideo-I2V"):
        loading.find_family(tmp_path)


def test_families_do_not_take_each_others_folders(folders):
    for folder in folders.values():
        assert loading.find_family(folder)[0] is loading.HUNYUAN
    assert loading.find_family(TEXT_TO_VIDEO)[0] is loading.WAN
    part = folders["diffusers"] / "transformer"
    assert not loading.WAN.owns(part)
    with pytest.raises(CheckpointError, match="is only the transformer of a model"):
        loading.find_family(part)


def test_files_of_a_transformer_are_told_apart(folders, embeddings):
    (file,) = (folders["diffusers"] / "transformer").glob("*.safetensors")
    assert loading.find_family(file)[0] is loading.HUNYUAN
    request = request_of(file, embeddings, "--vae", folders["diffusers"])
    assert request.info.model == "HunyuanVideo"
    wan, *_ = (TEXT_TO_VIDEO / "transformer").glob("*.safetensors")
    assert loading.find_family(wan)[0] is loading.WAN
