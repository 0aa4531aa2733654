"""Files that `load_pipeline` refuses: relatives of HunyuanVideo, and damaged ones."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.folders.part_files import PartFiles
from models.loading import load_pipeline
from tests import hunyuan_folders
from tests.published_hunyuan import to_original
from tests.torch_files import write_torch

PARTS = ("transformer", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hunyuan_folders.write_folders(tmp_path_factory.mktemp("hunyuan"))[
        "diffusers"
    ]


@pytest.fixture(scope="module")
def weights(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    return safetensors.numpy.load_file(file)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    hunyuan_folders.use_tiny_sizes(monkeypatch)


def without_guidance(weights):
    return {key: value for key, value in weights.items() if "guidance" not in key}


def with_image_channels(weights):
    """HunyuanVideo-I2V's first model, which takes 33 channels and no guidance."""
    weights = without_guidance(weights)
    (name,) = (key for key in weights if key.endswith("in.proj.weight"))
    dim, _, *patch = weights[name].shape
    return weights | {name: np.zeros((dim, 33, *patch), np.float32)}


def with_audio(weights):
    return weights | {"audio_proj.proj1.bias": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_guidance, "it embeds no guidance: HunyuanCustom and models"),
        (with_image_channels, "HunyuanVideo-I2V, which starts from an image, is not"),
        (with_audio, "HunyuanCustom's audio and editing variants are not supported"),
    ],
    ids=["custom", "i2v", "custom-audio"],
)
def test_files_of_relatives_are_refused_by_name(
    folder, weights, tmp_path, change, reason
):
    file = tmp_path / "transformer.safetensors"
    safetensors.numpy.save_file(change(to_original(weights)), file)
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(file, parts=PARTS, files=PartFiles(vae=folder))
    assert str(caught.value).startswith(f"{file} is not HunyuanVideo ({reason}")


@pytest.mark.parametrize(
    "name",
    [
        "hunyuan_video_I2V_720_fixed_bf16.safetensors",
        "hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors",
        "hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt",
    ],
)
def test_names_tell_models_of_equal_shapes(folder, weights, tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pt":
        write_torch(file, {"module": to_original(weights)})
    else:
        safetensors.numpy.save_file(weights, file)
    with pytest.raises(CheckpointError, match="HunyuanVideo-I2V, which starts from"):
        load_pipeline(file, parts=PARTS, files=PartFiles(vae=folder))


def test_every_key_that_does_not_fit_is_named(folder, weights, tmp_path):
    missing = "transformer_blocks.1.attn.norm_added_q.weight"
    misshaped = "single_transformer_blocks.0.proj_mlp.weight"
    unknown = "blocks.0.self_attn.q.weight"  # of Wan
    weights = dict(weights)
    weights[unknown] = weights.pop(missing)
    weights[misshaped] = weights[misshaped][:-1]
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (file,) = (damaged / "transformer").glob("*.safetensors")
    safetensors.numpy.save_file(weights, file)
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(damaged, parts=PARTS)
    message = str(caught.value)
    assert str(damaged / "transformer") in message
    for key in (missing, misshaped, unknown):
        assert key in message
