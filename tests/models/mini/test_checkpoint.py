"""The checkpoint folder: what is written is read, and errors say what is wrong."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.safetensors_io import CheckpointError
from models.diffusion.caches import MagRatios, write_ratios
from models.mini.checkpoint import MiniCheckpoint, MiniTextEncoder
from models.mini.family import describe_mini
from models.mini.text import TextEmbedding, Vocabulary
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from tests import tiny_model

TINY = WanConfig(
    dim=32,
    ffn_dim=48,
    num_heads=2,
    num_layers=2,
    text_dim=16,
    text_length=8,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)


@pytest.fixture(scope="module")
def checkpoint() -> MiniCheckpoint:
    codec = tiny_model.make_codec()
    config = dataclasses.replace(
        codec.model.config,
        latents_mean=tuple(map(float, range(16))),
        latents_std=(2.0,) * 16,
    )
    shapes = nnx.eval_shape(lambda: type(codec.model)(config, rngs=nnx.Rngs(0)))
    autoencoder = nnx.merge(nnx.graphdef(shapes), nnx.state(codec.model))
    vocabulary = Vocabulary(words=("a", "ball", "red"), num_buckets=2, max_length=8)
    return MiniCheckpoint(
        transformer=WanTransformer(TINY, rngs=nnx.Rngs(0)),
        text_embedding=TextEmbedding(vocabulary.size, 8, 16, rngs=nnx.Rngs(1)),
        vocabulary=vocabulary,
        codec=WanVAECodec(model=autoencoder),
    )


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, max_shard_bytes=40_000)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "copy")


def test_round_trip(checkpoint, written):
    loaded = MiniCheckpoint.load(written, dtype="float32")
    assert loaded.transformer.config == TINY
    assert loaded.vocabulary == checkpoint.vocabulary
    ours = dict(nnx.to_flat_state(nnx.state(checkpoint.transformer)))
    theirs = dict(nnx.to_flat_state(nnx.state(loaded.transformer)))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        # Stored as bfloat16, read as the configuration's parameter type.
        rounded = np.asarray(leaf[...]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(theirs[path][...], rounded, err_msg=str(path))
    assert loaded.codec.model.config == checkpoint.codec.model.config
    ours, theirs = (nnx.state(each.codec.model) for each in (checkpoint, loaded))
    rounded = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), ours)
    chex.assert_trees_all_equal(theirs, rounded)
    chex.assert_trees_all_equal(
        nnx.state(loaded.text_embedding),
        jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32),
            nnx.state(checkpoint.text_embedding),
        ),
    )


def test_ratios_lie_beside_the_weights_that_they_are_of(checkpoint, folder):
    info = describe_mini(folder)
    assert info.mag_ratios(info.sampling, from_image=False) is None
    ratios = MagRatios(values=((1.0, 0.9),), model="trained", source="a test")
    write_ratios(folder / "ratios.json", ratios, {})
    assert info.mag_ratios(info.sampling, from_image=False) == ratios
    checkpoint.save(folder)  # other weights, perhaps
    assert info.mag_ratios(info.sampling, from_image=False) is None


def test_shards_and_diffusers_keys(written):
    shards = sorted(written.glob("transformer-*.safetensors"))
    assert len(shards) > 1
    names = {name for file in shards for name in safetensors.numpy.load_file(file)}
    assert "blocks.1.attn1.to_q.weight" in names
    assert "condition_embedder.time_embedder.linear_1.weight" in names
    stored = json.loads((written / "config.json").read_text())
    assert stored["format"] == "draft-video-1"
    assert stored["transformer"]["num_attention_heads"] == 2
    assert stored["codec"]["latents_mean"] == list(range(16))


def test_text_encoder(checkpoint):
    encoder = MiniTextEncoder(checkpoint.vocabulary, checkpoint.text_embedding)
    context = encoder.encode(["a red ball", "", "a dragon"])
    assert context.embeddings.shape == (3, 8, 16)
    np.testing.assert_array_equal(context.lengths, [3, 0, 2])
    assert context.pooled is None
    for prompt, unknown in (
        ("a red dragon", ["dragon"]),
        ("a red 球 🎈 мяч", ["球", "🎈", "мяч"]),
        (" ?! ", ["?!"]),
        ("", []),
    ):
        assert encoder.unknown_words(prompt) == unknown
    assert encoder.describe_vocabulary() == "it knows: a ball red"


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder; expected"):
        MiniCheckpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["config.json", "text_embedding.safetensors", "codec.safetensors"],
)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(
        CheckpointError, match=rf"lacks \['{name}'\]; expected a folder"
    ):
        MiniCheckpoint.load(folder)


def test_missing_transformer_and_missing_shard(folder):
    first, *others = sorted(folder.glob("transformer-*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the checkpoint.*{first.name}"):
        MiniCheckpoint.load(folder)
    for file in others:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['transformer\*.safetensors'\]"):
        MiniCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("sign", "layout"),
    [("model_index.json", "diffusers"), ("models_t5_umt5-xxl.pth", "original")],
)
def test_published_layout(tmp_path, sign, layout):
    (tmp_path / sign).write_text("{}")
    with pytest.raises(
        CheckpointError, match=f"in the {layout} layout, which models.wan"
    ):
        MiniCheckpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": "other"}', "has format='other'; expected 'draft-video-1'"),
        ('{"format": "draft-video-1"}', "is damaged: KeyError"),
    ],
)
def test_damaged_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        MiniCheckpoint.load(folder)


def test_damaged_vocabulary(folder):
    (folder / "vocabulary.json").write_text('{"words": ["a"')
    with pytest.raises(CheckpointError, match="vocabulary"):
        MiniCheckpoint.load(folder)


@pytest.mark.parametrize(
    "name",
    ["codec.safetensors", "text_embedding.safetensors", "transformer"],
)
def test_cut_off_tensors(folder, name):
    (file, *_) = sorted(folder.glob(f"{name}*"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        MiniCheckpoint.load(folder)


def test_embedding_of_another_vocabulary(folder):
    Vocabulary(words=("a",), num_buckets=2, max_length=8).save(
        folder / "vocabulary.json"
    )
    with pytest.raises(CheckpointError, match="does not fit config and vocabulary"):
        MiniCheckpoint.load(folder)


def test_codec_of_other_channels(folder):
    edit_codec(folder, z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    with pytest.raises(CheckpointError, match="8 latent channels; the transformer nee"):
        MiniCheckpoint.load(folder)


def test_codec_of_other_sizes(folder):
    edit_codec(folder, base_dim=4)
    with pytest.raises(CheckpointError, match=r"codec of .* does not fit its config"):
        MiniCheckpoint.load(folder)


def edit_codec(folder, **changes):
    stored = json.loads((folder / "config.json").read_text())
    stored["codec"] |= changes
    (folder / "config.json").write_text(json.dumps(stored))


def test_transformer_of_other_sizes(folder):
    stored = json.loads((folder / "config.json").read_text())
    stored["transformer"]["ffn_dim"] = 64
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        MiniCheckpoint.load(folder)
