"""Prompts to videos on a tiny random model."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import (
    AttentionPlan,
    Compensation,
    DraftConfig,
    SparsitySchedule,
    StepKind,
)
from models.diffusion import pipeline as pipeline_module
from models.diffusion import sampler as sampler_module
from models.diffusion.interfaces import TextContext
from models.diffusion.pipeline import EmptyPromptWarning, UnknownWordWarning
from models.diffusion.results import StopGeneration
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowUniPC
from models.loading import load_pipeline
from models.mini.autoencoder import autoencoder_config
from models.wan.conditions import WanConditioning
from models.wan.inputs import WanInputs
from models.wan.sampling import wan_sampling
from models.wan.transformer import WanTransformer
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.codec import WanVAECodec
from tests import tiny_model

PROMPT = "a red ball"
# Relative to latents of size one; measured on CPU: 2e-6.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_model.make_checkpoint()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_pipeline(tiny_model.save_checkpoint(folder))


def generate(pipeline, prompt=PROMPT, **options):
    sampling = dataclasses.replace(tiny_model.SAMPLING, **options.pop("sampling", {}))
    return pipeline.generate(prompt, sampling, **options)


def plan_of(sparsity):
    """The paper's schedule; None is dense attention."""
    if sparsity is None:
        return AttentionPlan.dense()
    return AttentionPlan.draft(DraftConfig.paper(sparsity=sparsity))


@pytest.fixture(scope="module")
def dense(pipeline):
    return generate(pipeline)


def test_dense_run_follows_the_flow_equation(pipeline, dense):
    """The sampler's loop once more: one model call per prompt, guidance in NumPy."""
    sampling = tiny_model.SAMPLING
    latents = pipeline.start(PROMPT, sampling)[1].latents
    latents = np.asarray(latents)
    contexts = [pipeline.text_encoder.encode([text])[:2] for text in (PROMPT, "")]
    sigmas = 3 * np.linspace(1, 0, 5) / (1 + 2 * np.linspace(1, 0, 5))
    predict = nnx.jit(
        lambda model, latents, time, text: model(WanInputs(latents, time, *text))[0]
    )
    for sigma, next_sigma in itertools.pairwise(sigmas):
        time = jnp.full(1, 1000 * sigma, jnp.float32)
        velocities = [
            predict(pipeline.model, jnp.asarray(latents), time, text)
            for text in contexts
        ]
        positive, negative = (np.asarray(v) for v in velocities)
        velocity = negative + sampling.guidance * (positive - negative)
        latents = latents + (next_sigma - sigma) * velocity
    np.testing.assert_allclose(
        dense.latents, latents, rtol=0, atol=ROUNDING * np.abs(latents).max()
    )


def test_result_of_a_dense_run(dense):
    assert dense.video.shape == (1, 3, 32, 48, 3)
    assert dense.latents.shape == (1, 2, 8, 12, 16)
    assert dense.video.min() >= 0.0
    assert dense.video.max() <= 1.0
    assert dense.video.std() > 0.01
    np.testing.assert_array_equal(dense.kept_density, np.ones((4, 3)))
    assert dense.dense.all()
    # sigma 1, 3/4, 1/2, 1/4 with shift 3.
    np.testing.assert_allclose(dense.timesteps, [1000, 900, 750, 500])
    assert (dense.time_ms > 0).all()


@pytest.mark.parametrize("selection", ["percentile", "row_topk"])
def test_sparsity_zero_gives_the_dense_video(pipeline, dense, selection):
    draft = DraftConfig.paper(sparsity=0.0, selection=selection)
    attention = AttentionPlan.draft(draft, SparsitySchedule(dense_fraction=0.0))
    sparse = generate(pipeline, attention=attention)
    assert not sparse.dense.any()
    np.testing.assert_array_equal(sparse.kept_density, np.ones((4, 3)))
    np.testing.assert_allclose(sparse.video, dense.video, rtol=0, atol=ROUNDING)


@pytest.mark.nightly
def test_means_of_single_tokens_give_the_dense_video(pipeline, dense):
    """Nothing is left out then, with masks that are kept for a second step, too."""
    draft = DraftConfig.paper(
        sparsity=0.8,
        draft_tile=(1, 2),
        compensation=Compensation(sub_tile=(1, 1), frames=1),
        ranking="spread",
    )
    schedule = SparsitySchedule(dense_fraction=0.25, mask_refresh=2)
    sparse = generate(pipeline, attention=AttentionPlan.draft(draft, schedule))
    assert (sparse.kept_density[1:] < 0.4).all()
    np.testing.assert_allclose(sparse.video, dense.video, rtol=0, atol=ROUNDING)
    assert sparse.extra_work == 1.0
    assert sparse.work_share == pytest.approx(sparse.kept_density.mean() + 0.75)
    assert dense.work_share == 1.0


def test_schedule_and_kept_shares(pipeline, dense):
    """Half of 8 x 8 tile pairs, on the last three steps and but for layer 1."""
    schedule = SparsitySchedule(dense_fraction=0.25, dense_layers=(1,))
    attention = AttentionPlan.draft(DraftConfig.paper(sparsity=0.5), schedule)
    sparse = generate(pipeline, attention=attention)
    expected = np.zeros((4, 3), np.bool_)
    expected[0] = expected[:, 1] = True
    np.testing.assert_array_equal(sparse.dense, expected)
    np.testing.assert_array_equal(sparse.kept_density[expected], 1.0)
    kept = sparse.kept_density[~expected]
    # Tiles have 8 or 4 tokens, so a share of pairs is not exactly one of tokens.
    assert (kept > 0.3).all()
    assert (kept < 0.8).all()
    assert np.abs(sparse.video - dense.video).max() > 1e-3


@pytest.mark.nightly
def test_a_program_for_each_kind_of_step(pipeline):
    """Four sparse steps of two sparsities: budgets share programs."""
    pipeline = dataclasses.replace(pipeline)  # with nothing compiled
    config = DraftConfig.paper(sparsity=0.5)
    schedule = SparsitySchedule(
        sparsity=(0.5, 0.5, 0.6, 0.6), mask_refresh=2, dense_layers=(1,)
    )
    attention = AttentionPlan.draft(config, schedule)
    start = pipeline.start(PROMPT, tiny_model.SAMPLING, attention=attention)
    second_dense = (False, True, False)
    kinds = [StepKind(dense=second_dense, refresh=again) for again in (True, False)]
    assert start[0].kinds == kinds
    programs, compile_ms = pipeline.compile(*start)
    assert list(programs) == kinds
    assert compile_ms > 0
    for kind in kinds:
        assert " conditional(" not in programs[kind].as_text()
        # The state is given up: its latents and masks become the next state's.
        given_up = programs[kind].memory_analysis().alias_size_in_bytes
        assert given_up >= sum(x.nbytes for x in jax.tree.leaves(start[1]))
    # Another schedule of the same shapes compiles only what is new.
    schedule = SparsitySchedule(dense_fraction=0.25, dense_layers=(1,))
    attention = AttentionPlan.draft(config, schedule)
    start = pipeline.start(PROMPT, tiny_model.SAMPLING, attention=attention)
    before = dict(programs)
    again, _ = pipeline.compile(*start)
    assert start[0].kinds == [StepKind(dense=(True,) * 3, refresh=False), kinds[0]]
    assert again[kinds[0]] is before[kinds[0]]
    assert set(again) == {*kinds, start[0].kinds[0]}


def test_programs_are_kept_by_sharding(pipeline):
    """Arrays elsewhere need a program of their own; the first one refuses them."""
    pipeline = dataclasses.replace(pipeline)  # with nothing compiled
    start = pipeline.start(PROMPT, tiny_model.SAMPLING)
    first, _ = pipeline.compile(*start)
    again, compile_ms = pipeline.compile(*start)
    assert again is first
    assert compile_ms == 0.0
    mesh = jax.make_mesh((1,), ("devices",))
    spread = jax.NamedSharding(mesh, jax.P())
    sampler, state, inputs = start
    other, compile_ms = pipeline.compile(sampler, state, jax.device_put(inputs, spread))
    assert other is not first
    assert compile_ms > 0.0


def test_seed_decides_the_video(pipeline, dense):
    again = generate(pipeline)
    np.testing.assert_array_equal(again.video, dense.video)
    assert again.compile_ms == 0.0, "the second run must reuse the first's program"
    other = generate(pipeline, sampling={"seed": 1})
    assert np.abs(other.video - dense.video).max() > 0.05


def test_noise_stands_for_the_seed(pipeline, dense):
    start = pipeline.start(PROMPT, tiny_model.SAMPLING)
    noise = start[1].latents
    for _ in range(2):  # it is still there after a run
        result = generate(pipeline, noise=noise, sampling={"seed": 5})
        np.testing.assert_array_equal(result.latents, dense.latents)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 2, 8, 12, 16\); expec"):
        generate(pipeline, noise=jnp.concatenate([noise, noise]))


@pytest.mark.nightly
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "draft"])
def test_batch_items_do_not_influence_each_other(pipeline, sparsity):
    attention = plan_of(sparsity)
    alone = generate(pipeline, attention=attention)
    both = generate(pipeline, [PROMPT, "the blue sea"], attention=attention)
    assert both.video.shape[0] == 2
    np.testing.assert_allclose(both.video[0], alone.video[0], rtol=0, atol=ROUNDING)
    assert np.abs(both.video[1] - alone.video[0]).max() > 0.05


def test_guidance_of_one_does_not_run_the_negative_prompt(pipeline):
    results = [
        generate(pipeline, sampling={"guidance": 1.0, "negative_prompt": text})
        for text in ("", "boat")
    ]
    np.testing.assert_array_equal(results[0].video, results[1].video)
    sampling = dataclasses.replace(tiny_model.SAMPLING, guidance=1.0)
    inputs = pipeline.start(PROMPT, sampling)[2]
    assert inputs.context.embeddings.shape[0] == 1
    guided = [
        generate(pipeline, sampling={"negative_prompt": text}) for text in ("", "boat")
    ]
    assert np.abs(guided[0].video - guided[1].video).max() > 1e-3


@pytest.mark.parametrize(
    ("guidance", "batching", "rows"),
    [
        (1.0, "one_call", (3, 2)),
        (5.0, "one_call", (3, 4)),
        (5.0, "two_calls", (2, 3, 2)),
    ],
)
def test_first_masks_have_a_row_for_each_prompt_of_a_call(
    pipeline, guidance, batching, rows
):
    """Two prompts and three layers; with guidance each has a negative prompt."""
    sampling = dataclasses.replace(tiny_model.SAMPLING, guidance=guidance)
    masks = pipeline.start(
        [PROMPT, "a boat"],
        sampling,
        attention=plan_of(0.5),
        guidance_batching=batching,
    )[1].masks
    for leaf in jax.tree.leaves(masks):
        assert leaf.shape[:-1] == (*rows, tiny_model.CONFIG.num_heads)


@pytest.mark.nightly
def test_unipc_run_follows_its_solver(pipeline):
    """The loop once more: one model call per prompt, guidance in NumPy."""
    solver = FlowUniPC(num_steps=4, shift=3.0)
    by_name = generate(pipeline, sampling={"solver": "unipc"})
    by_object = generate(pipeline, sampling={"solver": solver, "shift": 1.0})
    np.testing.assert_array_equal(by_name.latents, by_object.latents)
    np.testing.assert_array_equal(by_name.timesteps, solver.timesteps)
    state = pipeline.start(PROMPT, tiny_model.SAMPLING)[1]
    latents = state.latents
    history = solver.initial_history(latents)
    contexts = [pipeline.text_encoder.encode([text])[:2] for text in (PROMPT, "")]
    predict = nnx.jit(
        lambda model, latents, time, text: model(WanInputs(latents, time, *text))[0]
    )
    for index, timestep in enumerate(solver.timesteps):
        time = jnp.full(1, timestep, jnp.float32)
        positive, negative = (
            predict(pipeline.model, latents, time, text) for text in contexts
        )
        velocity = negative + tiny_model.SAMPLING.guidance * (positive - negative)
        latents, history = solver.update(
            latents, velocity, history, solver.coefficients(index)
        )
    np.testing.assert_allclose(
        by_name.latents, latents, rtol=0, atol=ROUNDING * np.abs(latents).max()
    )


def test_solvers_do_not_share_a_program(pipeline, dense):
    unipc = generate(pipeline, sampling={"solver": "unipc"})
    assert np.abs(unipc.latents - dense.latents).max() > 1e-3
    again = generate(pipeline, sampling={"solver": "euler"})
    np.testing.assert_array_equal(again.latents, dense.latents)


@pytest.mark.nightly
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "draft"])
def test_guidance_in_two_calls_agrees_with_one(pipeline, sparsity):
    attention = plan_of(sparsity)
    one = generate(pipeline, attention=attention)
    two = generate(pipeline, attention=attention, guidance_batching="two_calls")
    scale = np.abs(one.latents).max()
    np.testing.assert_allclose(two.latents, one.latents, rtol=0, atol=ROUNDING * scale)
    np.testing.assert_allclose(two.kept_density, one.kept_density, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("without_jaxtyping")
def test_unknown_guidance_batching_is_named(pipeline):
    with pytest.raises(ValueError, match="guidance_batching='half' must be one of"):
        generate(pipeline, guidance_batching="half")


def test_callback_sees_every_step_and_may_stop_the_run(pipeline):
    reports = []
    result = generate(pipeline, callback=reports.append)
    assert [report.index for report in reports] == [0, 1, 2, 3]
    assert [report.num_steps for report in reports] == [4] * 4
    assert [report.timestep for report in reports] == pytest.approx(result.timesteps)
    assert [report.time_ms for report in reports] == list(result.time_ms)

    def stop(report):
        if report.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, callback=stop)


def stop_after(index, estimates=None):
    """A callback that ends the run after a step, and keeps what it saw."""

    def callback(report):
        if estimates is not None:
            estimates.append(np.asarray(report.estimate))
        if report.index == index:
            raise StopGeneration

    return callback


def test_a_stopped_run_keeps_what_was_computed(pipeline, dense):
    """Its video is what the latents would be without the noise that is left."""
    estimates = []
    result = generate(pipeline, callback=stop_after(1, estimates))
    assert result.stopped
    assert not dense.stopped
    assert len(result.time_ms) == len(result.kept_density) == len(result.dense) == 2
    np.testing.assert_array_equal(result.timesteps, dense.timesteps[:2])
    np.testing.assert_array_equal(result.latents, estimates[1])
    assert result.video.shape == dense.video.shape
    # Stopped after its last step, a run is whole.
    result = generate(pipeline, callback=stop_after(3))
    assert not result.stopped
    np.testing.assert_array_equal(result.video, dense.video)


def test_estimates_are_the_latents_without_their_noise(pipeline, dense):
    """Euler's step in NumPy: x' = x + (s' - s) v, and the estimate is x - s v."""
    estimates = []
    generate(pipeline, callback=stop_after(None, estimates))
    latents = np.asarray(pipeline.start(PROMPT, tiny_model.SAMPLING)[1].latents)
    sigmas = [1.0, 0.9, 0.75, 0.5, 0.0]
    for (sigma, next_sigma), estimate in zip(
        itertools.pairwise(sigmas), estimates, strict=True
    ):
        velocity = (latents - estimate) / sigma
        latents = latents + (next_sigma - sigma) * velocity
    atol = ROUNDING * np.abs(latents).max()
    np.testing.assert_allclose(latents, dense.latents, rtol=0, atol=atol)
    np.testing.assert_allclose(estimates[-1], dense.latents, rtol=0, atol=atol)


def test_seeds_that_were_finished_are_kept(pipeline, dense):
    finished = []

    def callback(report):
        finished.append(report.index)
        if finished == [0, 1, 2, 3, 0]:
            raise StopGeneration

    result = generate(pipeline, seeds=(0, 1, 2), callback=callback)
    assert finished == [0, 1, 2, 3, 0]
    assert result.stopped
    np.testing.assert_array_equal(result.video, dense.video)
    result = generate(pipeline, seeds=(0, 1), callback=stop_after(0))
    assert result.stopped
    assert len(result.video) == len(result.time_ms) == 1


def test_reports_tell_the_work_and_the_time_left(pipeline, monkeypatch):
    """One dense step of 8 ms, then sparse ones of 2 ms: the first sparse is a guess."""
    clock = iter([0.0, 0.008, 1.0, 1.002, 2.0, 2.002, 3.0, 3.002])
    attention = AttentionPlan.draft(
        DraftConfig.paper(), SparsitySchedule(dense_fraction=0.2)
    )
    started = pipeline.start(PROMPT, tiny_model.SAMPLING, attention=attention)
    programs, _ = pipeline.compile(*started)
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(sampler_module, "time", fake)
    seen = []
    _, reports = started[0].run_steps(programs, *started[1:], 4, seen.append)
    assert [report.work for report in seen] == ["dense", *["sparse"] * 3]
    left = [report.time_left_ms for report in seen]
    assert left == pytest.approx([24, 4, 2, 0])
    # Only the last one still holds an array as large as the latents.
    assert [report.estimate is None for report in reports] == [True] * 3 + [False]


def test_a_preview_is_the_middle_of_the_estimate(pipeline, dense, monkeypatch):
    """It is decoded as a first frame: alone, whatever came before it."""
    estimate = jnp.asarray(dense.latents)
    picture = pipeline.preview(estimate)
    expected = np.asarray(pipeline.codec.decode(estimate[:, 1:]))[:, 0]
    expected = np.clip(0.5 * (expected + 1), 0, 1)
    np.testing.assert_allclose(picture, expected, rtol=0, atol=1e-6)
    # 8 x 12 positions are too many: 2 x 2 become one.
    monkeypatch.setattr(pipeline_module, "PREVIEW_POSITIONS", 95)
    small = dense.latents[:, 1:].reshape(1, 1, 4, 2, 6, 2, 16).mean((3, 5))
    expected = np.asarray(pipeline.codec.decode(jnp.asarray(small)))[:, 0]
    picture = pipeline.preview(estimate)
    assert picture.shape == (1, 16, 24, 3)
    expected = np.clip(0.5 * (expected + 1), 0, 1)
    np.testing.assert_allclose(picture, expected, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_damaged_weights_are_named_with_the_step(checkpoint, pipeline):
    broken = nnx.merge(*nnx.split(checkpoint.transformer))  # a copy
    broken.proj_out.bias = type(broken.proj_out.bias)(jnp.full(64, jnp.nan))
    damaged = dataclasses.replace(pipeline, model=broken)
    with pytest.raises(FloatingPointError, match="not finite after step 1 of 4"):
        generate(damaged)


def test_unknown_words_are_told(pipeline):
    with pytest.warns(UnknownWordWarning, match="not trained on 'zebra'; it knows: a"):
        generate(pipeline, "a red zebra")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 50}, "width=50 must be a multiple of 8 for this model"),
        ({"height": 20}, "height=20 must be a multiple of 8"),
        ({"frames": 4}, "frames=4 must be 1 more than a multiple of 2"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_model_are_named(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, sampling=changes)


def test_context_stands_for_prompts(pipeline, dense):
    context = pipeline.encode([PROMPT])
    negative = pipeline.text_encoder.encode([""])
    freed = dataclasses.replace(pipeline, text_encoder=None)
    result = generate(freed, context, negative_context=negative)
    np.testing.assert_array_equal(result.latents, dense.latents)
    mixed = generate(pipeline, context)  # the negative prompt is encoded
    np.testing.assert_array_equal(mixed.latents, dense.latents)
    unguided = generate(freed, context, sampling={"guidance": 1.0})
    assert np.abs(unguided.latents - dense.latents).max() > 1e-3


def test_each_prompt_can_have_its_negative_context(pipeline):
    texts = ["", "boat"]
    both = generate(
        pipeline,
        [PROMPT, PROMPT],
        negative_context=pipeline.text_encoder.encode(texts),
    )
    shared = generate(
        pipeline, [PROMPT, PROMPT], sampling={"negative_prompt": texts[1]}
    )
    scale = np.abs(both.latents).max()
    np.testing.assert_allclose(
        both.latents[1], shared.latents[1], rtol=0, atol=ROUNDING * scale
    )
    assert np.abs(both.latents[0] - shared.latents[0]).max() > 1e-3


def test_missing_and_unfit_contexts_are_named(pipeline):
    freed = dataclasses.replace(pipeline, text_encoder=None)
    context = pipeline.encode([PROMPT, PROMPT])
    with pytest.raises(ValueError, match=r"no text encoder for prompts=\['a red ball"):
        generate(freed, PROMPT)
    with pytest.raises(ValueError, match=r"no text encoder for prompts=\[''\]"):
        generate(freed, context)
    short = TextContext(context.embeddings[:, :5], context.lengths)
    with pytest.raises(ValueError, match=r"prompts has .* shape \(2, 5, 8\)"):
        generate(pipeline, short)
    with pytest.raises(ValueError, match="negative_context has embeddings of shape"):
        generate(pipeline, context, negative_context=short)
    three = pipeline.encode([PROMPT] * 3)
    with pytest.raises(ValueError, match="has 3 items; expected 1 or 2, one"):
        generate(pipeline, context, negative_context=three)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_embedded_guidance_is_a_finite_number(value):
    with pytest.raises(ValueError, match=r"embedded_guidance=.* must be a finite num"):
        Sampling(embedded_guidance=value)


def test_embedded_guidance_is_for_models_that_take_it(pipeline, monkeypatch):
    sampling = {"embedded_guidance": 6.0}
    with pytest.raises(ValueError, match="embedded_guidance is given, but Wan models"):
        generate(pipeline, sampling=sampling)
    seen = []
    step_inputs = WanTransformer.step_inputs

    def note(self, latents, timestep, context, image, embedded_guidance=None):
        seen.append(embedded_guidance)
        return step_inputs(self, latents, timestep, context, image)

    monkeypatch.setattr(WanTransformer, "step_inputs", note)
    monkeypatch.setattr(WanConditioning, "check_guidance", lambda *_: None)
    fresh = dataclasses.replace(pipeline)  # without the compiled programs
    generate(fresh, sampling=sampling | {"num_steps": 1, "guidance": 1.0})
    (traced,) = seen  # an argument of the program, no constant
    assert isinstance(traced, jax.core.Tracer)
    _, _, inputs = fresh.start(PROMPT, Sampling(**sampling))
    assert float(inputs.embedded_guidance) == 6.0


class CausalCodec:
    """Sizes of Wan's VAE, with pixels that repeat the first three channels."""

    stride = (4, 8, 8)

    def latent_shape(self, *, frames, height, width):
        if frames % 4 != 1:
            raise ValueError(f"frames={frames} must be 1 more than a multiple of 4")
        return 1 + frames // 4, height // 8, width // 8, 16

    def encode(self, video):
        raise NotImplementedError

    def tiled(self, pixels):
        raise NotImplementedError

    def decode(self, latents):
        pixels = jnp.clip(latents[..., :3], -1, 1)
        pixels = pixels.repeat(8, axis=2).repeat(8, axis=3)
        return jnp.concatenate([pixels[:, :1], pixels[:, 1:].repeat(4, axis=1)], axis=1)


@pytest.mark.parametrize(
    ("size", "grid"), [("480p", (21, 30, 52)), ("720p", (21, 45, 80))]
)
def test_token_grids_of_the_published_sizes(pipeline, size, grid):
    causal = dataclasses.replace(pipeline, codec=CausalCodec())
    shape = causal.latent_shape(wan_sampling(size))
    assert shape == (grid[0], 2 * grid[1], 2 * grid[2], 16)
    got = pipeline.model.grid(shape)
    assert (got.frames, got.height, got.width) == grid


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("size", "rest", "turned"),
    [("480p", (6, 4), False), ("720p", (5, 0), True)],
    ids=["wide-480p", "tall-720p"],
)
def test_runs_at_the_published_sizes(pipeline, size, rest, turned):
    """One frame with Wan's own tile, which divides neither 30 x 52 nor 45 x 80."""
    config = dataclasses.replace(pipeline.model.config, tile=(8, 16))
    shapes = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.split(shapes)[0], nnx.state(pipeline.model))
    published = dataclasses.replace(pipeline, model=model, codec=CausalCodec())
    sides = dataclasses.asdict(wan_sampling(size))
    height, width = (sides[side] for side in ("height", "width"))
    assert (height // 16 % 8, width // 16 % 16) == rest
    if turned:
        height, width = width, height
    sampling = {"frames": 1, "height": height, "width": width, "num_steps": 2}
    dense = generate(published, sampling=sampling)
    whole = generate(
        published,
        sampling=sampling,
        attention=AttentionPlan.draft(
            DraftConfig.paper(sparsity=0.0), SparsitySchedule(dense_fraction=0.0)
        ),
    )
    sparse = generate(published, sampling=sampling, attention=plan_of(0.75))
    assert dense.video.shape == (1, 1, height, width, 3)
    np.testing.assert_allclose(whole.latents, dense.latents, rtol=0, atol=ROUNDING)
    assert np.isfinite(sparse.latents).all()
    assert (sparse.kept_density[1] < 0.5).all()


def test_a_causal_codec(pipeline):
    causal = dataclasses.replace(pipeline, codec=CausalCodec())
    sampling = {"frames": 5, "height": 48, "width": 80, "solver": "unipc"}
    result = generate(causal, sampling=sampling)
    assert result.latents.shape == (1, 2, 6, 10, 16)
    assert result.video.shape == (1, 5, 48, 80, 3)
    assert np.isfinite(result.video).all()
    for changes, message in (
        ({"frames": 6}, "frames=6 must be 1 more than a multiple of 4"),
        ({"height": 40}, "height=40 must be a multiple of 16 for this model"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(causal, sampling=sampling | changes)


def test_codec_and_transformer_must_agree_in_channels(pipeline):
    sizes = autoencoder_config(latent_channels=4)
    model = nnx.eval_shape(lambda: WanVAE(sizes, rngs=nnx.Rngs(0)))
    narrow = WanVAECodec(model=model)
    message = r"codec has 4 latent channels; the transformer makes 16"
    with pytest.raises(ValueError, match=message):
        generate(dataclasses.replace(pipeline, codec=narrow))


def test_no_prompt_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"prompts=\[\] must hold at least one prompt"):
        generate(pipeline, [])


@pytest.mark.parametrize("prompt", ["", " \n"], ids=repr)
def test_an_empty_prompt_is_no_text(pipeline, prompt):
    """Guided away from no text, no text stays where it is without guidance."""
    with pytest.warns(EmptyPromptWarning, match="a prompt is empty: the video is what"):
        guided = generate(pipeline, prompt)
    with pytest.warns(EmptyPromptWarning):
        free = generate(pipeline, prompt, sampling={"guidance": 1.0})
    largest = np.abs(free.latents).max()
    np.testing.assert_allclose(
        guided.latents, free.latents, rtol=0, atol=ROUNDING * largest
    )


def test_one_empty_prompt_of_several_is_told(pipeline):
    with pytest.warns(EmptyPromptWarning):
        context = pipeline.encode(["a ball", ""])
    np.testing.assert_array_equal(context.lengths, [2, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0 must be a positive integer"),
        ({"width": True}, "width=True must be a positive integer"),
        ({"num_steps": 0}, "num_steps=0 must be a positive integer"),
        ({"seed": -1}, r"seed=-1 must be an integer in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "seed=4294967296 must be an integer"),
        ({"guidance": float("nan")}, "guidance=nan must be a finite number"),
        ({"shift": 0.0}, "shift=0.0 must be a positive"),
        ({"solver": "heun"}, "solver='heun' must be one of"),
        ({"solver": FlowUniPC(num_steps=3)}, r"num_steps=16 must equal .*num_steps=3"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_sampling_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)
