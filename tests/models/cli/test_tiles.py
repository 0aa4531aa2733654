"""Tiles that a command runs the autoencoder on."""

import argparse

import jax
import pytest
from flax import nnx

from models.cli.tiles import check_tile, smaller_tile, with_tiles
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.tiling import HunyuanTiling
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig


def given(tile):
    return argparse.Namespace(vae_tile=tile)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture(scope="module")
def wan():
    config = WanVAEConfig.wan2_1(base_dim=8)
    return WanVAECodec(model=nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))


def test_a_cpu_decodes_whole_frames(wan):
    assert with_tiles(wan, given(None)).tiling is None
    assert with_tiles(wan, given(64)).tiling.size == (64, 64)


def test_a_gpu_decodes_tiles_where_a_codec_would_take_whole_frames(wan, on_gpu):
    with pytest.warns(UserWarning, match="--vae-tile 0"):
        assert with_tiles(wan, given(None)).tiling.size == (256, 256)
    assert with_tiles(wan, given(64)).tiling.size == (64, 64)
    assert with_tiles(wan, given(0)).tiling is None


def test_a_codec_with_tiles_of_its_own_keeps_them(on_gpu):
    config = HunyuanVAEConfig.video(block_out_channels=(32,) * 4)
    codec = HunyuanVAECodec(
        model=nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0)))
    )
    assert with_tiles(codec, given(None)).tiling == HunyuanTiling.original()
    assert with_tiles(codec, given(0)).tiling is None


class NoTiles:
    """A codec of a user's own, as far as tiles are concerned."""

    stride = (2, 4, 4)

    def latent_shape(self, **sides):
        raise NotImplementedError

    encode = decode = tiled = latent_shape


def test_a_codec_without_tiles_stays(on_gpu):
    codec = NoTiles()
    assert with_tiles(codec, given(None)) is codec


@pytest.mark.parametrize(
    ("tile", "cpu", "gpu"), [(None, 256, 128), (0, 256, 256), (64, 32, 32)], ids=str
)
def test_what_is_suggested_is_smaller(monkeypatch, tile, cpu, gpu):
    assert smaller_tile(given(tile)) == cpu
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert smaller_tile(given(tile)) == gpu


@pytest.mark.parametrize("pixels", [-32, 40])
def test_other_sides_are_refused(pixels):
    with pytest.raises(ValueError, match=f"--vae-tile {pixels} must be a positive"):
        check_tile(pixels)
    check_tile(0)
    check_tile(96)
