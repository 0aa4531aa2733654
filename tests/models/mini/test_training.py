"""The training step and loop of the small model, on tiny sizes."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.mini import train
from models.mini.autoencoder import autoencoder_config
from models.mini.checkpoint import MiniCheckpoint
from models.mini.compilation import Compiler
from models.mini.data_parallel import DataParallel
from models.mini.feed import Feed
from models.mini.optimization import (
    OptimizerConfig,
    decayed,
    learning_rate_at,
    load_state,
    save_state,
)
from models.mini.renderer import device_sources
from models.mini.run import Progress, Run
from models.mini.scenes import Mix, all_captions, sample_batch
from models.mini.stages import Length, Stage, VideoSize, sizes_of
from models.mini.text import Vocabulary
from models.mini.training import (
    TrainConfig,
    Trainer,
    sample_noise_levels,
)
from models.wan.config import WanConfig
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from tests.synthetic_sources import make_sources

pytestmark = pytest.mark.nightly

TINY = WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    text_dim=16,
    text_length=32,
    freq_dim=16,
    tile=(2, 2),
    dtype="float32",
)
SIZE = VideoSize(frames=3, height=16, width=24, batch=6)
OTHER = VideoSize(frames=5, height=16, width=16, batch=3)
STAGES = (
    Stage(share=1.0, turns=(SIZE,)),
    Stage(share=1.0, turns=(SIZE, OTHER)),
)


@pytest.fixture(scope="module", autouse=True)
def no_procedural_scenes():
    """They take half a minute to compile; test_renderer.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Mix, "of", lambda batch: Mix(procedural=0, pictures=batch - 1, clips=1)
        )
        yield


def make_trainer(devices: DataParallel) -> Trainer:
    config = TrainConfig(
        model=TINY, optimizer=OptimizerConfig(warmup_steps=5, learning_rate=3e-3)
    )
    autoencoder = WanVAE(
        autoencoder_config(base_dim=2, decoder_base_dim=2), rngs=nnx.Rngs(0)
    )
    return Trainer(
        config,
        Vocabulary.from_captions(all_captions(), max_length=32),
        WanVAECodec(model=autoencoder),
        device_sources(make_sources()),
        devices,
    )


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer(DataParallel.of(1))


@pytest.fixture(scope="module")
def draw():
    return sample_batch((0, 0), Mix.of(SIZE.batch), SIZE.frames, SIZE.aspect)


@pytest.fixture(scope="module")
def compiler(trainer) -> Compiler:
    """The compiled steps, shared by the tests."""
    made = Compiler(trainer, trainer.initial_state())
    made.start(sizes_of(STAGES))
    return made


def new_run(trainer, compiler, folder, steps=6, progress=None) -> Run:
    length = Length(steps=steps)
    run = Run(
        trainer, STAGES, length, folder, workers=0, progress=progress, compiler=compiler
    )
    return run


def test_loss_falls_on_one_batch(trainer, compiler, draw):
    batch, state = trainer.batch(draw), trainer.initial_state()
    losses = []
    for _ in range(60):
        state, loss = trainer.call(compiler.get(SIZE), state, batch, 3e-3)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    assert int(state.step) == 60


def test_muon_trains_and_passes_over_broken_videos(trainer, draw):
    config = dataclasses.replace(trainer.config, optimizer=OptimizerConfig(kind="muon"))
    ours = dataclasses.replace(trainer, config=config)
    batch, state = ours.batch(draw), ours.initial_state()
    latents = 0.1 * jax.random.normal(jax.random.key(0), (SIZE.batch, 2, 4, 6, 16))
    text = (batch.ids, batch.lengths)
    losses = []
    for _ in range(40):
        state, loss = ours.step(state, *text, latents, np.float32(1e-2))
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    before = jax.device_get(state)
    broken = latents.at[0, 0, 0, 0, 0].set(jnp.nan)
    after, _ = ours.step(state, *text, broken, np.float32(3e-3))
    assert int(after.step) == before.step + 1
    chex.assert_trees_all_equal(jax.device_get(after[1:]), before[1:])


def test_average_follows_parameters(trainer, compiler, draw):
    before = jax.device_get(trainer.initial_state())
    state = trainer.initial_state()
    after, _ = trainer.call(compiler.get(SIZE), state, trainer.batch(draw), 1e-3)
    decay = min(trainer.config.ema, 1 / 10)  # (1 + 0) / (10 + 0)
    expected = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * np.asarray(new),
        before.parameters,
        jax.device_get(after.parameters),
    )
    chex.assert_trees_all_close(after.ema, expected, rtol=1e-5, atol=1e-7)


def test_resumed_run_equals_uninterrupted(trainer, compiler, tmp_path):
    whole = new_run(trainer, compiler, tmp_path).train(trainer.initial_state())
    half = new_run(trainer, compiler, tmp_path)
    half.length = _StopAfter(steps=6, stop=4)  # among steps that take turns
    state = half.train(trainer.initial_state())
    assert int(state.step) == 4
    save_state(tmp_path, state, dataclasses.asdict(half.progress))
    loaded, stored = load_state(tmp_path, trainer.initial_state())
    resumed = new_run(trainer, compiler, tmp_path, progress=Progress(**stored))
    final = resumed.train(loaded)
    assert resumed.progress.videos == 4 * SIZE.batch + 2 * OTHER.batch
    chex.assert_trees_all_equal(final, whole, strict=True)


class _StopAfter(Length):
    """A length of `steps` whose run breaks off after `stop` of them."""

    def __init__(self, *, steps: int, stop: int) -> None:
        super().__init__(steps=steps)
        object.__setattr__(self, "stop", stop)

    def share(self, steps: int, seconds: float) -> float:
        return 1.0 if steps >= self.stop else super().share(steps, seconds)


def test_state_of_another_model_is_refused(trainer, tmp_path):
    save_state(tmp_path, trainer.initial_state(), {})
    wider = dataclasses.replace(
        trainer.config, model=dataclasses.replace(TINY, ffn_dim=32)
    )
    other = dataclasses.replace(trainer, config=wider)
    with pytest.raises(
        ValueError, match=r"state\.npz belongs to another configuration"
    ):
        load_state(tmp_path, other.initial_state())


def test_weights_and_log_are_enough_to_continue(
    trainer, compiler, tmp_path, monkeypatch
):
    monkeypatch.setattr("models.mini.run.LOG_EVERY", 2)
    run = new_run(trainer, compiler, tmp_path, steps=4)
    state = run.train(trainer.initial_state(), save_every=0.0)
    run.save(state)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [entry["step"] for entry in log["losses"]] == [2, 4, 4]
    assert [entry["size"][0] for entry in log["losses"]] == [3, 3, 5]
    assert log["videos"] == 3 * SIZE.batch + OTHER.batch
    loaded = MiniCheckpoint.load(tmp_path / "weights", dtype="float32")
    kernel = state.ema["transformer"]["blocks"]["attn1"]["to_q"]["kernel"][...]
    stored = loaded.transformer.blocks.attn1.to_q.kernel[...]
    np.testing.assert_array_equal(
        np.asarray(stored, np.float32),
        np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32),
    )

    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    state, progress = train.start_state(trainer, None, moved)
    assert int(state.step) == progress.steps == 4
    assert progress.starts == [0, 4]
    continued = new_run(trainer, compiler, moved, steps=6, progress=progress)
    assert int(continued.train(state).step) == 6
    with pytest.raises(ValueError, match="exclude each other"):
        train.start_state(trainer, moved, moved)


def test_checkpoint_of_another_model_is_refused(trainer):
    state = trainer.initial_state()
    other = dataclasses.replace(trainer, vocabulary=Vocabulary(words=("a",)))
    with pytest.raises(ValueError, match="the checkpoint's vocabulary is"):
        other.state_from(trainer.checkpoint(state.ema), 1)


def test_decay_is_for_matrices_only(trainer):
    mask = decayed(trainer.initial_state().parameters)
    flat = jax.tree_util.tree_leaves_with_path(mask)
    names = {jax.tree_util.keystr(path): value for path, value in flat}
    assert any(names.values())
    for name, value in names.items():
        assert value == ("kernel" in name), name


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_follow_the_shift(shift):
    level = np.asarray(sample_noise_levels(jax.random.key(0), 20_000, shift))
    assert level.min() > 0.0
    assert level.max() < 1.0
    # Both parts are symmetric about 1/2 before the shift maps 1/2 to s / (s + 1).
    np.testing.assert_allclose(np.median(level), shift / (shift + 1), atol=0.01)
    unshifted = level / (shift - (shift - 1) * level)
    # Variances: uniform 1/12; the logistic of a standard normal 0.0434.
    np.testing.assert_allclose(unshifted.var(), (1 / 12 + 0.0434) / 2, atol=0.002)


def test_learning_rate_rises_then_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate_at(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_at(config, 50, 0.5) == pytest.approx(0.5)
    assert learning_rate_at(config, 100, 1.0) == pytest.approx(0.0)


def test_options():
    given = ["--sources", "s", "--output", "o", "--codec", "c", "--minutes", "25"]
    given += ["--warmup-steps", "7", "--stage", "1=9x96x128*4", "--optimizer", "muon"]
    options = train.make_parser().parse_args(given)
    assert options.stage == [Stage.parse("1=9x96x128*4")]
    assert train.length_of(options) == Length(seconds=1500.0)
    config = train.make_config(options).optimizer
    assert config == OptimizerConfig(kind="muon", warmup_steps=7)


@pytest.mark.parametrize(
    ("config", "field", "value", "text"),
    [
        (TrainConfig, "ema", 1.0, r"ema=1\.0 must be in \[0, 1\)"),
        (TrainConfig, "caption_dropout", -0.1, "caption_dropout"),
        (OptimizerConfig, "learning_rate", 0.0, "learning_rate=0.0 must be positive"),
        (OptimizerConfig, "momentum", 1.0, r"momentum=1\.0 must be in \[0, 1\)"),
    ],
    ids=["ema", "caption_dropout", "learning_rate", "momentum"],
)
def test_bad_config(config, field, value, text):
    with pytest.raises(ValueError, match=text):
        config(**{field: value})


def test_feed_of_processes_equals_feed_in_process():
    turns = Stage(
        share=1.0,
        turns=(
            VideoSize(frames=4, height=3, width=4, batch=4),
            VideoSize(frames=6, height=2, width=3, batch=5),
        ),
    )
    with Feed(3, workers=1, ahead=2) as ahead, Feed(3, workers=0) as plain:
        for step in (0, 1, 2, 5):
            got = ahead.get(step, turns.size_at)
            expected = plain.get(step, turns.size_at)
            assert got[0] == expected[0]
            assert len(got[0]) == turns.size_at(step).batch
            chex.assert_trees_all_equal(got[1:], expected[1:], strict=True)
