"""The training step and loop of the small model, on tiny sizes."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.mini import samples, training
from models.mini.checkpoint import MiniCheckpoint
from models.mini.codec import LinearCodec
from models.mini.feed import Feed
from models.mini.renderer import device_sources
from models.mini.scenes import Mix, all_captions, sample_batch
from models.mini.text import Vocabulary
from models.mini.train import Length, Progress, Run, Stage, parse_options, stage_at
from models.mini.training import (
    TrainConfig,
    Trainer,
    decayed,
    fit_codec,
    learning_rate_at,
    load_state,
    sample_noise_levels,
    save_state,
)
from models.wan.config import WanConfig
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
STAGE = Stage(frames=4, batch=6, share=1.0)


@pytest.fixture(scope="module", autouse=True)
def no_procedural_scenes():
    """They take half a minute to compile; test_renderer.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Mix, "of", lambda batch: Mix(procedural=0, pictures=batch - 1, clips=1)
        )
        yield


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    config = TrainConfig(
        model=TINY, height=16, width=24, warmup_steps=5, learning_rate=3e-3
    )
    sources = device_sources(make_sources())
    vocabulary = Vocabulary.from_captions(all_captions(), max_length=32)
    videos = np.random.default_rng(0).uniform(-1, 1, (1, 4, 32, 48, 3))
    codec = LinearCodec.fit([videos.cumsum(2).astype(np.float32)], whitening=0.5)
    return Trainer(config, vocabulary, codec, sources)


@pytest.fixture(scope="module")
def compiled(trainer):
    """The compiled step, shared by the tests."""
    draw = sample_batch((0, 0), Mix.of(STAGE.batch), STAGE.frames)
    return trainer.compile_step(trainer.initial_state(), trainer.batch(draw))


def new_run(trainer, compiled, folder, steps: int = 6) -> Run:
    run = Run(trainer, (STAGE,), Length(steps=steps), folder, workers=0)
    run._compiled[STAGE] = compiled
    return run


def test_loss_falls_on_one_batch(trainer, compiled):
    draw = sample_batch((0, 0), Mix.of(STAGE.batch), STAGE.frames)
    batch, state = trainer.batch(draw), trainer.initial_state()
    losses = []
    for _ in range(60):
        state, loss = compiled(state, batch, 3e-3)
        losses.append(float(loss))
    # The output layer starts at zero: the first loss is the variance of the target,
    # that of the noise (1) and of the latents (under 1 with whitening 0.5).
    assert 1.0 < losses[0] < 2.0
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    assert int(state.step) == 60


def test_average_follows_parameters(trainer, compiled):
    draw = sample_batch((0, 0), Mix.of(STAGE.batch), STAGE.frames)
    before = jax.device_get(trainer.initial_state())
    after, _ = compiled(trainer.initial_state(), trainer.batch(draw), 1e-3)
    decay = min(trainer.config.ema, 1 / 10)  # (1 + 0) / (10 + 0)
    expected = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * np.asarray(new),
        before.parameters,
        jax.device_get(after.parameters),
    )
    chex.assert_trees_all_close(after.ema, expected, rtol=1e-5, atol=1e-7)


def test_resumed_run_equals_uninterrupted(trainer, compiled, tmp_path):
    whole = new_run(trainer, compiled, tmp_path / "a").train(trainer.initial_state())
    half = new_run(trainer, compiled, tmp_path / "b")
    half.length = Length(steps=6)
    state = trainer.initial_state()
    half.stages, stop_at = (STAGE,), 3
    half.length = _StopAfter(steps=6, stop=stop_at)
    state = half.train(state)
    assert int(state.step) == stop_at
    save_state(tmp_path / "b", state, dataclasses.asdict(half.progress))
    loaded, progress = load_state(tmp_path / "b", trainer.initial_state())
    resumed = new_run(trainer, compiled, tmp_path / "b")
    resumed.progress = Progress(**progress)
    final = resumed.train(loaded)
    assert resumed.progress.videos == 6 * STAGE.batch
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


def test_run_writes_loadable_weights_and_log(trainer, compiled, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        samples, "contact_sheet", lambda *arguments, **_: sheets.append(arguments)
    )
    run = new_run(trainer, compiled, tmp_path, steps=4)
    monkeypatch.setattr("models.mini.train.LOG_EVERY", 2)
    state = run.train(trainer.initial_state(), save_every=0.0)
    run.save(state)
    log = json.loads((tmp_path / "log.json").read_text())
    assert [entry["step"] for entry in log["losses"]] == [2, 4]
    assert log["steps"] == 4
    assert log["videos"] == 4 * STAGE.batch
    assert sheets
    assert sheets[-1][2] == tmp_path / "samples_000004.png"
    loaded = MiniCheckpoint.load(tmp_path / "weights")
    kernel = state.ema["transformer"]["blocks"]["attn1"]["to_q"]["kernel"][...]
    stored = loaded.transformer.blocks.attn1.to_q.kernel[...]
    np.testing.assert_array_equal(
        np.asarray(stored, np.float32),
        np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32),
    )


def test_codec_is_fitted_to_rendered_videos(monkeypatch):
    """The renderer is replaced: here only which batches it gets is of interest."""
    rng = np.random.default_rng(0)
    videos = rng.uniform(-1, 1, (8, 2, 4, 8, 8, 3)).astype(np.float32)
    asked = []

    def render(procedural, pictures, clips, sources, *, height, width):
        asked.append((len(clips["frame"]), height, width, clips["frame"].shape[1]))
        return jnp.asarray(videos[len(asked) - 1])

    monkeypatch.setattr(training, "render_batch", render)
    monkeypatch.setattr(jax, "jit", lambda function: function)
    codec = fit_codec(TrainConfig(model=TINY, height=8, width=8), {})
    assert asked == [(Mix.of(32).clips, 8, 8, 8)] * 8
    expected = LinearCodec.fit(videos, whitening=0.5)
    np.testing.assert_allclose(codec.scale, expected.scale, rtol=1e-6)


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
    config = TrainConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate_at(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_at(config, 50, 0.5) == pytest.approx(0.5)
    assert learning_rate_at(config, 100, 1.0) == pytest.approx(0.0)


def test_stages_follow_their_shares():
    stages = tuple(Stage(frames=f, batch=4, share=s) for f, s in ((8, 1.0), (24, 3.0)))
    assert [stage_at(stages, s).frames for s in (0.0, 0.24, 0.26, 1.0)] == [
        8,
        8,
        24,
        24,
    ]
    assert Length(steps=10).share(5, 99.0) == 0.5
    assert Length(seconds=10.0).share(5, 2.5) == 0.25


def test_options(tmp_path, capsys):
    options = parse_options(
        ["--sources", "s", "--output", "o", "--steps", "3", "--stage", "8,16,0.5"]
    )
    assert options.stage == [Stage(frames=8, batch=16, share=0.5)]
    for bad, text in (("8,16", "must be FRAMES"), ("7,16,1", "frames must be even")):
        with pytest.raises(SystemExit):
            parse_options(
                ["--sources", "s", "--output", "o", "--steps", "3", "--stage", bad]
            )
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("ema", 1.0, r"ema=1\.0 must be in \[0, 1\)"),
        ("caption_dropout", -0.1, "caption_dropout"),
        ("learning_rate", 0.0, "learning_rate=0.0 must be positive"),
    ],
)
def test_bad_config(field, value, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**{field: value})


def test_feed_of_processes_equals_feed_in_process():
    with Feed(3, workers=1, ahead=2) as ahead, Feed(3, workers=0) as plain:
        for step, frames in ((0, 4), (1, 4), (2, 6), (5, 6)):
            got = ahead.get(step, batch=4, frames=frames)
            expected = plain.get(step, batch=4, frames=frames)
            assert got[0] == expected[0]
            chex.assert_trees_all_equal(got[1:], expected[1:], strict=True)
