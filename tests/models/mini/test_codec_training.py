"""The codec's training on tiny sizes: its loss, its resumption, and what it writes."""

import dataclasses
import json
from pathlib import Path

import chex
import numpy as np
import pytest
from flax import nnx

from models.mini.autoencoder import (
    autoencoder_config,
    load_autoencoder,
    read_autoencoder_config,
    with_statistics,
)
from models.mini.codec_training import (
    CodecConfig,
    CodecTrainer,
    held_out_videos,
    latent_statistics,
    measure_codec,
)
from models.mini.compilation import Compiler
from models.mini.feed import Feed
from models.mini.optimization import OptimizerConfig, load_state, save_state
from models.mini.renderer import device_sources
from models.mini.run import Progress, Run
from models.mini.scenes import Mix
from models.mini.stages import Length, Stage, VideoSize, sizes_of
from models.wan.vae.autoencoder import WanVAE
from tests.synthetic_sources import make_sources

pytestmark = pytest.mark.nightly

SIZE = VideoSize(frames=3, height=16, width=24, batch=3)
STAGES = (Stage(share=1.0, turns=(SIZE,)),)
CONFIG = CodecConfig(
    model=autoencoder_config(
        base_dim=16, decoder_base_dim=32, attention_dtype="bfloat16"
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.0),
)


@pytest.fixture(scope="module", autouse=True)
def no_procedural_scenes():
    """They take half a minute to compile; test_renderer.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Mix, "of", lambda batch: Mix(procedural=0, pictures=batch - 1, clips=1)
        )
        yield


@pytest.fixture(scope="module")
def trainer() -> CodecTrainer:
    made = CodecTrainer(CONFIG, device_sources(make_sources()))
    videos = held_out_videos(made.sources, SIZE, batches=2, offset=100)
    made.__dict__["videos_of_statistics"] = videos  # cached: fewer and smaller ones
    return made


@pytest.fixture(scope="module")
def compiler(trainer) -> Compiler:
    """The compiled step, shared by the tests."""
    made = Compiler(trainer, trainer.initial_state())
    made.start(sizes_of(STAGES))
    return made


def train(trainer, compiler, state, length, progress=None):
    folder = Path("unused")
    run = Run(
        trainer, STAGES, length, folder, workers=0, progress=progress, compiler=compiler
    )
    return run.train(state), run.progress


class StopAfterTwo(Length):
    """A length of four steps whose run breaks off after two."""

    def share(self, steps: int, seconds: float) -> float:
        return 1.0 if steps >= 2 else steps / 4


def test_loss_falls_on_one_batch(trainer, compiler):
    with Feed(0, workers=0) as feed:
        batch = trainer.batch(feed.get(0, STAGES[0].size_at))
    # From random weights: a linear start leaves little to gain in a few steps.
    state, losses = trainer._state_of(trainer._module(0), 0), []
    for _ in range(40):
        state, loss = trainer.call(compiler.get(SIZE), state, batch, 3e-3)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_resumed_run_equals_uninterrupted(trainer, compiler, tmp_path):
    four = Length(steps=4)
    whole, _ = train(trainer, compiler, trainer.initial_state(), four)
    half, progress = train(
        trainer, compiler, trainer.initial_state(), StopAfterTwo(steps=4)
    )
    assert int(half.step) == 2
    save_state(tmp_path, half, dataclasses.asdict(progress))
    loaded, stored = load_state(tmp_path, trainer.initial_state())
    resumed, _ = train(trainer, compiler, loaded, four, Progress(**stored))
    chex.assert_trees_all_equal(resumed, whole, strict=True)


def test_stored_codec_normalises_latents(trainer, tmp_path):
    trainer.save(trainer.initial_state(), tmp_path)
    config = read_autoencoder_config(json.loads((tmp_path / "codec.json").read_text()))
    codec = load_autoencoder(tmp_path / "codec.safetensors", config)
    mean, std = latent_statistics(codec.model, trainer.videos_of_statistics)
    np.testing.assert_allclose(mean, 0.0, atol=2e-2)
    np.testing.assert_allclose(std, 1.0, atol=2e-2)
    report = measure_codec(codec.model, trainer.videos_of_statistics)
    state = trainer.state_of_weights(tmp_path, 7)
    assert int(state.step) == 7
    kept = nnx.state(codec.model)
    chex.assert_trees_all_equal(state.parameters, kept)
    assert report["videos"] == 6
    assert set(report["psnr_db"]) == {"pictures", "clips"}
    assert report["psnr_db_min"] <= report["psnr_db_mean"]


def test_statistics_are_of_latents_before_normalisation():
    model = WanVAE(
        autoencoder_config(base_dim=2, decoder_base_dim=2, latents_mean=(1.0,) * 16),
        rngs=nnx.Rngs(0),
    )
    config = with_statistics(model, np.full(16, 0.5), np.full(16, 2.0))
    assert config.latents_mean == (1.5,) * 16
    assert config.latents_std == (2.0,) * 16
