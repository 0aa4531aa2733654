"""Order and options of loading a Wan folder; values are in test_published_folders."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.embeddings import (
    CachedTextEncoder,
    GivenTextEncoder,
    UnknownPromptError,
)
from models.diffusion.folders.layouts import ALL_PARTS
from models.diffusion.text_options import TextOptions
from models.loading import load_pipeline
from models.umt5.text_encoder import UMT5TextEncoder
from models.wan.checkpoint import WanParts
from models.wan.loading import describe_wan, load_wan
from models.wan.sampling import wan_sampling
from tests import tiny_model
from tests.wan_folders import TEXT_TO_VIDEO, save_image_to_video

PROMPTS = ("a cat", "")


@pytest.fixture
def encoders(monkeypatch):
    """The text encoders that are loaded, and where they were asked to be."""
    loaded, load = [], UMT5TextEncoder.load

    def load_and_note(*arguments, **options):
        loaded.append((load(*arguments, **options), options["device"]))
        return loaded[-1][0]

    monkeypatch.setattr(UMT5TextEncoder, "load", load_and_note)
    return loaded


@pytest.fixture(scope="module")
def contexts():
    """What the encoder makes of the prompts when it stays in memory."""
    return [
        np.asarray(part)
        for part in jax.tree.leaves(
            load_wan(TEXT_TO_VIDEO).text_encoder.encode(PROMPTS)
        )
    ]


def is_freed(encoder):
    leaves = jax.tree.leaves(nnx.state(encoder.model))
    return all(leaf.is_deleted() for leaf in leaves)


def assert_same_contexts(encoder, contexts):
    got_leaves = jax.tree.leaves(encoder.encode(PROMPTS))
    for got, expected in zip(got_leaves, contexts, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_text_encoder_is_freed_before_the_transformer_is_loaded(
    encoders, contexts, monkeypatch
):
    load, freed = WanParts.load_transformer, []

    def load_and_look(self, *mesh):
        freed.extend(is_freed(encoder) for encoder, _ in encoders)
        return load(self, *mesh)

    monkeypatch.setattr(WanParts, "load_transformer", load_and_look)
    wan = load_wan(TEXT_TO_VIDEO, text=TextOptions(prompts=PROMPTS))
    assert freed == [True]
    assert_same_contexts(wan.text_encoder, contexts)
    with pytest.raises(UnknownPromptError, match=r"given for \['a dog'\]; there are"):
        wan.text_encoder.encode(["a dog"])


@pytest.mark.nightly
def test_text_encoder_stays_by_default(encoders):
    wan = load_wan(TEXT_TO_VIDEO)
    assert [is_freed(encoder) for encoder, _ in encoders] == [False]
    assert wan.text_encoder is encoders[0][0]


@pytest.mark.nightly
def test_text_encoder_on_the_cpu(encoders):
    device = jax.devices("cpu")[0]
    load_wan(TEXT_TO_VIDEO, text=TextOptions(device=device, prompts=PROMPTS))
    assert [where for _, where in encoders] == [device]
    config = encoders[0][0].model.config
    # The file has float32; a narrow one is stored as it is.
    assert (config.dtype, config.param_dtype) == ("float32", "float32")


@pytest.mark.nightly
def test_embeddings_are_kept_in_a_folder(encoders, contexts, tmp_path):
    folder = tmp_path / "new"
    text = TextOptions(embeddings=folder, prompts=PROMPTS)
    first = load_wan(TEXT_TO_VIDEO, text=text)
    assert [is_freed(encoder) for encoder, _ in encoders] == [True]
    assert len(list(folder.iterdir())) == len(PROMPTS)
    second = load_wan(TEXT_TO_VIDEO, text=text)
    assert len(encoders) == 1, "the second run must not load the encoder"
    for wan in (first, second):
        assert isinstance(wan.text_encoder, CachedTextEncoder)
        assert_same_contexts(wan.text_encoder, contexts)
    second.text_encoder.encode(["a dog"])  # new prompts load it again
    assert [is_freed(encoder) for encoder, _ in encoders] == [True, True]


@pytest.mark.nightly
def test_another_encoder_has_its_own_embeddings(tmp_path, encoders):
    copy = tmp_path / "copy"
    shutil.copytree(TEXT_TO_VIDEO, copy)
    file = copy / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    text = TextOptions(embeddings=tmp_path / "kept", prompts=PROMPTS)
    for folder in (TEXT_TO_VIDEO, copy):
        load_wan(folder, text=text)
    assert len(encoders) == 2


@pytest.mark.nightly
def test_embeddings_of_a_file_need_no_encoder(encoders, contexts, tmp_path):
    file = tmp_path / "prompts.safetensors"
    vectors = load_wan(TEXT_TO_VIDEO).text_encoder.embed(PROMPTS)
    GivenTextEncoder(embeddings=vectors, text_length=512).save(file)
    folder = tmp_path / "without"
    ignore = shutil.ignore_patterns("text_encoder", "tokenizer")
    shutil.copytree(TEXT_TO_VIDEO, folder, ignore=ignore)
    wan = load_wan(folder, text=TextOptions(embeddings=file, prompts=PROMPTS))
    assert_same_contexts(wan.text_encoder, contexts)
    assert len(encoders) == 1
    with pytest.raises(UnknownPromptError, match=r"given for \['a dog'\]"):
        load_wan(folder, text=TextOptions(embeddings=file, prompts=("a dog",)))
    missing = tmp_path / "absent.safetensors"
    with pytest.raises(CheckpointError, match=r"absent\.safetensors' does not exist"):
        load_wan(folder, text=TextOptions(embeddings=missing))


def test_parts_that_are_left_out(tmp_path):
    parts = [part for part in ALL_PARTS if part not in ("text_encoder", "tokenizer")]
    assert load_wan(TEXT_TO_VIDEO, parts=parts).text_encoder is None
    with pytest.raises(ValueError, match="parts must hold 'vae'"):
        load_wan(TEXT_TO_VIDEO, parts=["text_encoder", "tokenizer"])


@pytest.mark.parametrize("part", ["text_encoder", "vae", "image_encoder"])
def test_wrong_parts_are_named_before_the_transformer_is_loaded(
    tmp_path, monkeypatch, part
):
    monkeypatch.delattr(WanParts, "load_transformer")
    folder = save_image_to_video(tmp_path / "image")
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    sizes = {"text_encoder": "d_ff", "vae": "base_dim", "image_encoder": "hidden_size"}
    key = sizes[part]
    file.write_text(json.dumps(config | {key: 2 * config[key]}))
    message = rf"the {part} in .*{part}/.*safetensors.* does not fit: .* problems"
    with pytest.raises(CheckpointError, match=message):
        load_wan(folder)
    file.write_text(json.dumps(config | {key: -1}))
    with pytest.raises(CheckpointError, match=rf"{file}: .*=-1 must be a positive int"):
        load_wan(folder)


def test_what_a_folder_says_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.delattr(WanParts, "load_transformer")
    info = describe_wan(TEXT_TO_VIDEO)
    assert not info.config.takes_image
    assert info.codec.stride == (4, 8, 8)
    assert info.sampling == wan_sampling("480p", shift=3.0, grid="diffusers")
    wide = info.sampling_at(720, 1280)  # the folder's scheduler has the shift
    assert wide == dataclasses.replace(info.sampling, height=720, width=1280)
    image = describe_wan(save_image_to_video(tmp_path / "image"))
    assert image.config.takes_image
    assert image.sampling.num_steps == 40


def test_shift_of_the_original_depends_on_the_size(tmp_path):
    image = describe_wan(save_image_to_video(tmp_path / "image"))
    original = dataclasses.replace(image, own_shift=False)
    sizes = [(480, 832), (832, 480), (720, 1280), (512, 512)]
    shifts = [original.sampling_at(*size).shift for size in sizes]
    assert shifts == [3.0, 3.0, 5.0, 5.0]
    text = dataclasses.replace(describe_wan(TEXT_TO_VIDEO), own_shift=False)
    assert text.sampling_at(480, 832).shift == 5.0


def test_small_models_take_no_text_options(tmp_path):
    folder = tiny_model.save_checkpoint(tmp_path)
    text = TextOptions(embeddings=tmp_path / "kept", prompts=("a cat",))
    with pytest.raises(
        ValueError, match="fit HunyuanVideo and Wan models only"
    ) as error:
        load_pipeline(folder, loras=[("a.safetensors", 1.0)], text=text)
    assert str(error.value).startswith(
        "loras=['a.safetensors'] and text.prompts=('a cat',) and "
        f"text.embeddings={tmp_path / 'kept'}: arguments that fit"
    )


def test_folders_of_no_model_are_told_what_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # many models have one
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(CheckpointError) as error:
            load_pipeline(path)
        message = str(error.value)
        assert message.startswith(f"{path} holds no model; expected ")
        assert "a HunyuanVideo model in the original layout (hunyuan" in message
        assert ", or a Wan model in the original layout (config.json, diff" in message
        assert "; for image-to-video also models_clip_" in message
        assert " or the diffusers layout (transformer/config.json, " in message
        assert ", or a folder with config.json, text_embedding.safete" in message


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_folders_of_one_part_are_told_the_whole(tmp_path, part, monkeypatch):
    folder = shutil.copytree(TEXT_TO_VIDEO, tmp_path / "model")
    for path in (folder / part, part, "."):
        monkeypatch.chdir(folder / part if path == "." else folder)
        message = f"it is only the {part} of a model: give the whole, {folder}"
        with pytest.raises(CheckpointError, match=f"{message}$"):
            load_pipeline(path)


@pytest.mark.parametrize("below", ["", "snapshots"])
def test_folders_of_the_hubs_cache_are_told_the_snapshot(tmp_path, below):
    folder = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    for revision in ("a1", "b2"):
        shutil.copytree(TEXT_TO_VIDEO, folder / "snapshots" / revision)
    message = f"holds no model; the hub's cache .* give {folder}/snapshots/"
    with pytest.raises(CheckpointError, match=f"{message}a1$"):
        load_pipeline(folder / below)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b2")
    with pytest.raises(CheckpointError, match=f"{message}b2$"):
        load_pipeline(folder / below)
    shutil.rmtree(folder / "snapshots")  # refs alone are no model
    expected = r"holds no model; expected a Hunyuan.* a Wan model"
    with pytest.raises(CheckpointError, match=expected):
        load_pipeline(folder)
