"""Recording draft maps and masks beside a run."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule, VideoGrid
from models.diffusion import inspection, recording
from models.diffusion.inspection import AttentionView, inspect_attention
from models.diffusion.recording import (
    AttentionRecorder,
    Looks,
    RecordingWarning,
    choose_looks,
    record_of_view,
    to_levels,
)
from models.mini.pipeline import pipeline_of
from tests import tiny_model

PROMPT = "a red ball"
PLAN = AttentionPlan.draft(
    DraftConfig.paper(sparsity=0.5),
    SparsitySchedule(dense_fraction=0.25, dense_layers=(1,)),
)


@pytest.fixture(scope="module")
def pipeline():
    return pipeline_of(tiny_model.make_checkpoint())


@pytest.fixture(scope="module")
def run(pipeline):
    recorder = AttentionRecorder()
    result = pipeline.generate(
        PROMPT, tiny_model.SAMPLING, attention=PLAN, recorder=recorder
    )
    return result, recorder.record()


def numpy_levels(scores):
    levels = np.zeros(scores.shape, int)
    for index in np.ndindex(scores.shape[:-2]):
        for row, column in np.ndindex(scores.shape[-2:]):
            share = scores[index][row, column] / scores[index].max()
            if share > 1e-4:
                levels[index][row, column] = round(255 * (1 + np.log10(share) / 4))
    return levels


@pytest.mark.nightly
def test_a_record_has_what_inspection_sees(pipeline, run):
    _, record = run
    assert record.looks.steps == (2,)  # the middle of the steps 1, 2, 3
    assert record.looks.layers == (0, 1, 2)
    assert record.looks.heads == (0, 1)
    assert (record.of_steps, record.of_layers, record.of_heads) == (4, 3, 2)
    assert record.dense.tolist() == [[False, True, False]]
    view = inspect_attention(
        pipeline, PROMPT, tiny_model.SAMPLING, step=2, attention=PLAN
    )
    assert record.timesteps == (view.timestep,)
    masks = np.unpackbits(record.masks[0], axis=-1, count=tiny_model.NUM_TILES)
    np.testing.assert_array_equal(masks, view.masks)
    np.testing.assert_allclose(record.peaks[0], view.draft_maps.max((-2, -1)), 1e-5)
    # A score that rounds up here may round down there.
    differences = record.levels[0].astype(int) - numpy_levels(view.draft_maps)
    assert np.abs(differences).max() <= 1


@pytest.mark.nightly
def test_a_recorder_changes_neither_video_nor_latents(pipeline, run):
    recorded, record = run
    plain = pipeline.generate(PROMPT, tiny_model.SAMPLING, attention=PLAN)
    np.testing.assert_array_equal(recorded.video, plain.video)
    np.testing.assert_array_equal(recorded.latents, plain.latents)
    assert record.levels.max((-2, -1)).tolist() == [[[255, 255]] * 3]


def test_a_look_without_memory_ends_the_recording_alone(monkeypatch, without_jaxtyping):
    """Of looks before steps 1, 4 and 7 the second fails."""

    def look_at_step(sampler, state, inputs, index, looks):
        if index == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore")
        maps = np.zeros((1, 1, 2, 2), np.uint8)
        return {"levels": maps, "peaks": np.ones((1, 1)), "masks": maps[..., :1]}

    monkeypatch.setattr(recording, "look_at_step", look_at_step)
    looks = Looks(steps=(1, 4, 7), layers=(0,), heads=(0,))
    monkeypatch.setattr(AttentionRecorder, "_choose", lambda *_: looks)
    grid = VideoGrid(1, 1, 2, tile=(1, 1))
    sampler = types.SimpleNamespace(
        model=types.SimpleNamespace(num_layers=1, num_heads=1, grid=lambda _: grid),
        latent_shape=(1, 1, 2, 1),
        dense=np.zeros((8, 1), bool),
        solver=types.SimpleNamespace(timesteps=np.arange(8.0), num_steps=8),
    )
    recorder = AttentionRecorder()
    message = "recorded up to step 4, not further: RESOURCE_EXHAUSTED: 9 GB$"
    for index in range(4):
        recorder.before_step(sampler, None, None, index)
    with pytest.warns(RecordingWarning, match=message):
        recorder.before_step(sampler, None, None, 4)
    for index in range(5, 8):
        recorder.before_step(sampler, None, None, index)
    record = recorder.record()
    assert record.looks.steps == (1,)
    assert record.timesteps == (1.0,)


@pytest.mark.nightly
def test_a_dense_run_leaves_no_record(pipeline):
    recorder = AttentionRecorder()
    sampling = dataclasses.replace(tiny_model.SAMPLING, num_steps=1)
    pipeline.generate(PROMPT, sampling, recorder=recorder)
    assert recorder.record() is None


def test_levels_of_a_map_worked_by_hand():
    scores = jnp.array([[[0.5, 0.05], [5e-5, 1e-9]], [[0.0, 0.0], [0.0, 0.0]]])
    levels, peaks = to_levels(scores)
    # A tenth of the largest is one of four decades below it.
    np.testing.assert_array_equal(levels[0], [[255, 191], [0, 0]])
    np.testing.assert_array_equal(levels[1], 0)
    np.testing.assert_allclose(peaks, [0.5, 0.0])


def looks_of(*, num_steps=50, num_layers=40, num_heads=24, **options):
    """Looks at 100 tiles, of a run whose first fifth is dense."""
    plan = SparsitySchedule(dense_fraction=0.2).plan(
        np.linspace(1000, 10, num_steps),
        num_layers=num_layers,
        grid=VideoGrid(1, 1, 100, tile=(1, 1)),
        config=DraftConfig.paper(),
    )
    return choose_looks(plan, num_heads=num_heads, num_tiles=100, **options)


def test_looks_are_spread_over_sparse_steps_and_all_layers():
    looks = looks_of()
    assert looks.steps == (10, 30, 49)
    assert looks.layers == (0, 6, 11, 17, 22, 28, 33, 39)
    assert looks.heads == (0, 1, 2, 3)


def test_steps_that_a_cache_skips_are_left_out_where_others_are():
    skippable = np.ones(50, bool)
    assert looks_of(skippable=skippable).steps == (10, 30, 49)
    skippable[[5, 20, 21]] = False  # step 5 is dense
    assert looks_of(skippable=skippable).steps == (20, 21)


@pytest.mark.parametrize("most_bytes", [10_000, 60_000, 200_000, 10**6], ids=str)
def test_looks_take_no_more_than_they_may(most_bytes):
    """A map of 100 x 100 tiles has 100 * (100 + 13) bytes."""
    looks = looks_of(most_bytes=most_bytes)
    if most_bytes < 11_300:
        assert looks is None
        return
    number = len(looks.steps) * len(looks.layers) * len(looks.heads)
    assert number * 11_300 <= most_bytes
    assert number >= 0.5 * min(most_bytes // 11_300, 96)


def test_few_steps_and_small_models_have_fewer_looks():
    looks = looks_of(num_steps=16, num_layers=2, num_heads=1)
    assert len(looks.steps) == 1
    assert looks.layers == (0, 1)
    assert looks.heads == (0,)


def view_like(*, layers, heads, tiles):
    """A view whose draft maps and masks tell layers and heads apart."""
    number = np.arange(1, layers * heads + 1).reshape(layers, heads, 1, 1)
    maps = np.broadcast_to(number / 1000, (layers, heads, tiles, tiles))
    shares = np.zeros((layers, heads), np.float32)
    return AttentionView(
        draft_maps=maps.astype(np.float32),
        masks=np.broadcast_to(number % 2 == 0, maps.shape),
        top_mass=shares,
        kept_mass=shares,
        text_share=np.zeros((layers, heads, tiles), np.float32),
        text_masses=np.zeros((layers, heads, 0, tiles), np.float32),
        grid=VideoGrid(1, 1, tiles, tile=(1, 1)),
        estimate=np.zeros((1, 1, tiles, 1), np.float32),
        timestep=500.0,
        is_dense=np.arange(layers) == 1,
    )


@pytest.mark.parametrize(
    ("most_bytes", "layers", "heads"),
    [
        (6 * 99, (0, 1, 2), (0, 1)),  # a map of 9 x 9 tiles has 9 * (9 + 2) bytes
        (5 * 99, (1, 2), (0, 1)),
        (3 * 99, (1, 2), (0,)),
        (99, (1,), (0,)),
        (98, None, None),
    ],
)
def test_what_is_kept_of_a_view(most_bytes, layers, heads):
    record = record_of_view(
        view_like(layers=3, heads=2, tiles=9),
        step=7,
        of_steps=16,
        layers=(1, 2),
        heads=(0, 1),
        most_bytes=most_bytes,
    )
    if layers is None:
        assert record is None
        return
    assert (record.looks.layers, record.looks.heads) == (layers, heads)
    assert record.looks.steps == (7,)
    assert record.dense[0].tolist() == [layer == 1 for layer in layers]
    for place, (layer, head) in enumerate(itertools.product(layers, heads)):
        index = (0, place // len(heads), place % len(heads))
        number = 2 * layer + head + 1
        assert record.peaks[index] == pytest.approx(number / 1000)
        kept = np.unpackbits(record.masks[index], axis=-1, count=9)
        assert (kept == (number % 2 == 0)).all()


@pytest.mark.parametrize(
    ("module", "look"),
    [
        (recording, lambda pipeline: record(pipeline)),
        (inspection, lambda pipeline: inspect_attention(pipeline, PROMPT, step=0)),
    ],
    ids=["recording", "inspection"],
)
def test_a_look_is_compiled_with_the_options_of_its_weights(
    pipeline, monkeypatch, module, look
):
    """Without those of weights in FP8 XLA tries out slow products for minutes."""
    options = {"xla_no_such_option": True}
    monkeypatch.setattr(module, "compiler_options", lambda _: options)
    with pytest.raises(Exception, match="xla_no_such_option"):
        look(pipeline)


def record(pipeline):
    sampler, state, inputs = pipeline.start(PROMPT, tiny_model.SAMPLING, attention=PLAN)
    looks = Looks(steps=(2,), layers=(0,), heads=(0,))
    return recording.look_at_step(sampler, state, inputs, 2, looks)
