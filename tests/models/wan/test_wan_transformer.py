"""What the transformer promises beside parity: order, scan, gradients, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.transformer import attention as self_attention
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer, kept_density

TINY = WanConfig(
    dim=24,
    ffn_dim=48,
    num_heads=2,
    num_layers=3,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    text_length=5,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)
LATENT_SHAPE = (2, 3, 10, 14, 4)
ATTENTION = {
    "dense": AttentionPlan.dense(),
    "draft": AttentionPlan.draft(DraftConfig.paper()),
}
SPARSE = AttentionPlan.draft(DraftConfig.paper(sparsity=0.7))


def make_model(seed=0, **changes):
    """A model whose output layer is random: it starts at zero otherwise."""
    return nnx.merge(*_split_model(seed, **changes))


@functools.cache
def _split_model(seed, **changes):
    """Initialised once for each configuration; merging makes a new model of it."""
    model = WanTransformer(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(seed))
    kernel = model.proj_out.kernel
    kernel[...] = jax.random.normal(jax.random.key(seed), kernel.shape) / 5
    return nnx.split(model)


def make_inputs(seed=0, shape=LATENT_SHAPE):
    rng = np.random.default_rng(seed)
    batch = shape[0]
    return WanInputs(
        latents=jnp.asarray(rng.normal(size=shape), jnp.float32),
        timesteps=jnp.asarray(rng.uniform(0, 1000, batch), jnp.float32),
        context=jnp.asarray(rng.normal(size=(batch, 5, 10)), jnp.float32),
        context_lengths=jnp.asarray([3, 5][:batch], jnp.int32),
    )


@functools.partial(nnx.jit, static_argnames="attention")
def run(model, inputs, step=None, masks=None, attention=ATTENTION["dense"]):
    return model(inputs, attention=attention, step=step, masks=masks)


run_sparse = functools.partial(run, attention=SPARSE)


def item(inputs, index):
    return jax.tree.map(lambda value: value[index : index + 1], inputs)


@pytest.mark.nightly
@pytest.mark.parametrize("attention", ["dense", "draft"])
def test_batch_items_do_not_influence_each_other(attention):
    model, inputs, attention = make_model(), make_inputs(), ATTENTION[attention]
    both, _ = run(model, inputs, attention=attention)
    for index in range(2):
        alone, _ = run(model, item(inputs, index), attention=attention)
        np.testing.assert_allclose(both[index], alone[0], rtol=0, atol=2e-6)


def test_text_past_its_length_is_ignored():
    model, inputs = make_model(), make_inputs()
    before, _ = run(model, inputs)
    context = inputs.context.at[0, 3:].set(7.0)  # item 0 has 3 rows of text
    after, _ = run(model, inputs._replace(context=context))
    np.testing.assert_array_equal(before, after)
    context = inputs.context.at[0, 2].set(7.0)
    after, _ = run(model, inputs._replace(context=context))
    assert np.abs(after[0] - before[0]).max() > 1e-3


def test_the_untrained_model_predicts_zero():
    velocity, _ = WanTransformer(TINY, rngs=nnx.Rngs(0))(make_inputs())
    np.testing.assert_array_equal(velocity, np.zeros(LATENT_SHAPE, np.float32))


def scheduled(model, **rules):
    """A plan of three steps for `SPARSE`."""
    return SparsitySchedule(**rules).plan(
        np.array([900.0, 600.0, 300.0]),
        num_layers=3,
        grid=model.grid(LATENT_SHAPE),
        config=SPARSE.config,
    )


def test_masks_pass_from_step_to_step():
    model = make_model()
    first, second = make_inputs(0), make_inputs(1)
    plan = scheduled(model, dense_layers=(1,), mask_refresh=2)
    _, masks = run_sparse(model, first, plan.step(0))
    _, reused = run_sparse(model, second, plan.step(1), masks)
    jax.tree.map(np.testing.assert_array_equal, masks, reused)
    _, renewed = run_sparse(model, second, plan.step(2), masks)
    assert (renewed.block_ids != masks.block_ids).any()
    density = kept_density(masks, plan.step(0))
    assert density.shape == (3, 2, 2)
    np.testing.assert_array_equal(density[1], np.ones((2, 2)))
    assert (density[0] < 0.5).all()


def test_steps_do_not_recompile():
    model = make_model()
    plan = SparsitySchedule(dense_fraction=0.5).plan(
        np.linspace(1000.0, 100.0, 4),
        num_layers=3,
        grid=model.grid(LATENT_SHAPE),
        config=SPARSE.config,
    )
    traces = 0

    @jax.jit
    def run_counted(inputs, step, masks):
        nonlocal traces
        traces += 1
        return model(inputs, attention=SPARSE, step=step, masks=masks)

    inputs = make_inputs()
    _, masks = run_counted(inputs, plan.step(0), None)
    traces = 0
    for index in range(1, 4):
        _, masks = run_counted(inputs, plan.step(index), masks)
    assert traces == 1


@pytest.mark.parametrize(
    ("dense_layers", "index", "remat"),
    [
        pytest.param((), 0, False, id="sparse", marks=pytest.mark.nightly),
        pytest.param((0,), 0, True, id="first-remat", marks=pytest.mark.nightly),
        pytest.param((1,), 1, False, id="middle-reused", marks=pytest.mark.nightly),
        pytest.param((0, 2), 1, False, id="ends-reused"),
        pytest.param((0, 1, 2), 0, False, id="dense", marks=pytest.mark.nightly),
    ],
)
def test_known_steps_need_no_conditional(dense_layers, index, remat):
    """Layers in runs that do the same, against one scan that looks at each flag."""
    model = make_model()
    plan = scheduled(model, dense_layers=dense_layers, mask_refresh=2)
    structure, parameters = nnx.split(model)
    _, masks = run_sparse(model, make_inputs(1), plan.step(0))

    def traced(parameters, inputs, masks, step):
        merged = nnx.merge(structure, parameters)
        return merged(inputs, attention=SPARSE, step=step, masks=masks, remat=remat)

    def known(parameters, inputs, masks):
        return traced(parameters, inputs, masks, plan.step(index))

    arguments = (parameters, make_inputs(), masks)
    jaxpr = str(jax.make_jaxpr(traced)(*arguments, plan.step(index)))
    assert " cond[" in jaxpr
    assert " cond[" not in str(jax.make_jaxpr(known)(*arguments))
    got = jax.jit(known)(*arguments)
    expected = jax.jit(traced)(*arguments, plan.step(index))
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])


@pytest.mark.nightly
def test_captured_layers_of_several_runs_stay_in_order():
    model = make_model()
    step = scheduled(model, dense_layers=(0, 2)).step(0)

    @nnx.jit
    def traced(model, inputs, step):
        return model.capture_qk(inputs, attention=SPARSE, step=step)

    known = nnx.jit(
        functools.partial(WanTransformer.capture_qk, attention=SPARSE, step=step)
    )
    expected = traced(model, make_inputs(), step)
    for ours, theirs in zip(known(model, make_inputs()), expected, strict=True):
        assert ours.shape[0] == 3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.nightly
def test_gradient_of_layers_in_runs():
    model = make_model()
    step = scheduled(model, dense_layers=(1,)).step(0)
    structure, parameters = nnx.split(model)

    def loss(parameters, step):
        model = nnx.merge(structure, parameters)
        velocity, _ = model(make_inputs(), attention=SPARSE, step=step)
        return jnp.square(velocity).mean()

    got = jax.jit(jax.grad(lambda parameters: loss(parameters, step)))(parameters)
    expected = jax.jit(jax.grad(loss))(parameters, step)
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_same_model_runs_dense_and_sparse():
    model, inputs = make_model(), make_inputs()
    expected, _ = run(model, inputs)
    everything = AttentionPlan.draft(DraftConfig.paper(sparsity=0.0))
    got, masks = run(model, inputs, attention=everything)
    np.testing.assert_array_equal(kept_density(masks), np.ones((3, 2, 2)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.nightly
def test_capture_qk_gives_what_attention_sees(monkeypatch):
    """One layer, unrolled by hand, against what the stand-in attention receives."""
    model, inputs = make_model(num_layers=1), make_inputs()
    seen = []

    def spy(q, k, v, **_):
        jax.debug.callback(lambda *arrays: seen.append(arrays), q, k, v)
        return v

    monkeypatch.setattr(self_attention, "dense_attention", spy)
    q, k = model.capture_qk(inputs)
    _, qkv = model.map_qkv(lambda *arrays: arrays, inputs)
    jax.effects_barrier()
    assert q.shape == k.shape == (1, 2, 3 * 5 * 7, 2, 12)
    for captured, arrays in zip(((q, k), qkv), seen, strict=True):
        for ours, theirs in zip(captured, arrays, strict=False):
            np.testing.assert_array_equal(ours[0], theirs)


@pytest.mark.nightly
def test_captured_queries_are_in_tiled_order():
    shape = (1, 1, 4, 16, 4)  # tokens: 1 x 2 x 8, tiles of 2 x 4
    captured = []
    for tile in ((2, 4), (1, 8)):  # (1, 8) is raster order
        model = make_model(num_layers=1, tile=tile)
        captured.append(model.capture_qk(make_inputs(shape=shape))[0])
    raster_position = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    tiled, raster = captured
    np.testing.assert_allclose(tiled, raster[:, :, raster_position], rtol=0, atol=1e-6)


# ------------------------------------------------------------- the traced program


def equations(jaxpr):
    """All equations of a jaxpr, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr has one
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def trace(model, inputs, attention):
    structure, state = nnx.split(model)

    def call(state):
        return nnx.merge(structure, state)(inputs, attention=attention)

    return jax.make_jaxpr(call)(state)


@pytest.mark.parametrize("attention", ["dense", "draft"])
def test_layers_do_not_reorder_tokens(attention, monkeypatch):
    """A stand-in takes draft attention's place: inside it, blocks are gathered."""
    monkeypatch.setattr(
        self_attention, "scheduled_attention", lambda q, k, v, *, mask, **_: (v, mask)
    )
    model, inputs = make_model(), make_inputs()
    program = trace(model, inputs, ATTENTION[attention])
    num_tokens = model.grid(LATENT_SHAPE).num_tokens
    scans = [e for e in program.eqns if e.primitive.name == "scan"]
    (blocks,) = (e for e in scans if e.params["length"] == 3)
    reordering = {"gather", "scatter", "sort", "take", "dynamic_gather"}

    def touches_tokens(equation):
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        return any(num_tokens in shape for shape in shapes)

    inside = [
        e.primitive.name
        for e in equations(blocks.params["jaxpr"].jaxpr)
        if e.primitive.name in reordering and touches_tokens(e)
    ]
    assert inside == []
    outside = [
        e
        for e in equations(program.jaxpr)
        if e.primitive.name == "gather" and touches_tokens(e)
    ]
    # Patches, cosines, sines; and the output on its way back.
    assert len(outside) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("attention", ["dense", "draft"])
def test_the_program_does_not_grow_with_depth(attention):
    def program_size(num_layers):
        structure, state = nnx.split(make_model(num_layers=num_layers))
        inputs, plan = make_inputs(), ATTENTION[attention]

        def call(state):
            return nnx.merge(structure, state)(inputs, attention=plan)[0]

        lowered = jax.jit(call).lower(state)
        return len(lowered.as_text().splitlines())

    assert program_size(2) == program_size(8)


# --------------------------------------------------------------------- training


def loss_of(model, inputs, **options):
    velocity, _ = model(inputs, **options)
    return jnp.mean(jnp.square(velocity - 1.0))


@pytest.mark.nightly
def test_remat_changes_neither_loss_nor_gradient():
    model, inputs = make_model(), make_inputs()

    def loss_and_gradients(remat):
        loss = functools.partial(loss_of, remat=remat)
        return nnx.jit(nnx.value_and_grad(loss))(model, inputs)

    loss, gradients = loss_and_gradients(remat=False)
    loss_remat, gradients_remat = loss_and_gradients(remat=True)
    np.testing.assert_allclose(loss, loss_remat, rtol=1e-6)
    for one, other in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(gradients_remat), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_learns(dtype):
    model, inputs = make_model(dtype=dtype), make_inputs()
    gradients = nnx.jit(nnx.grad(loss_of))(model, inputs)
    for path, gradient in nnx.to_flat_state(gradients):
        gradient = np.asarray(gradient[...])
        assert gradient.dtype == np.float32, path
        assert np.isfinite(gradient).all(), path
        # Adding one number to all keys changes no softmax: to_k's bias matters
        # only through the norm, and still does.
        assert np.abs(gradient).max() > 0, path


@pytest.mark.nightly
def test_gradient_matches_a_finite_difference():
    model, inputs = make_model(), make_inputs()
    structure, state = nnx.split(model)
    loss = jax.jit(lambda state: loss_of(nnx.merge(structure, state), inputs))
    gradient = jax.grad(loss)(state)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), state
    )
    step = 3e-5  # the direction is 170 long; slope measured within 0.2 %
    ahead, behind = (
        loss(jax.tree.map(lambda x, d: x + sign * step * d, state, direction))  # noqa: B023
        for sign in (1, -1)
    )
    slope = sum(
        np.vdot(g, d)
        for g, d in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
        )
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-2)


@pytest.mark.nightly
def test_gradient_descent_lowers_the_loss():
    model, inputs = make_model(), make_inputs()

    @nnx.jit
    def descend(model):
        loss, gradients = nnx.value_and_grad(loss_of)(model, inputs)
        state = jax.tree.map(
            lambda p, g: p - 0.02 * g, nnx.state(model, nnx.Param), gradients
        )
        nnx.update(model, state)
        return loss

    losses = [float(descend(model)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


# ----------------------------------------------------------------- bad input table


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"latents": jnp.zeros((2, 3, 10, 14, 5))}, {}, "latents have 5 channels"),
        ({"latents": jnp.zeros((2, 3, 9, 14, 4))}, {}, r"multiples of patch_size"),
        ({"context": jnp.zeros((2, 4, 10))}, {}, r"expected \[batch, text_length"),
        ({"context": jnp.zeros((1, 5, 10))}, {}, r"context has shape \(1, 5, 10\)"),
        ({"timesteps": jnp.zeros(3)}, {}, r"timesteps has shape \(3,\)"),
        (
            {"context_lengths": jnp.zeros(1, jnp.int32)},
            {},
            r"context_lengths has shape \(1,\); expected \(2,\)",
        ),
        ({}, {"num_layers": 2}, r"step.dense has shape \(3,\); .* of the 2 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_inputs_are_named(changes, options, message):
    model = make_model(**options)
    plan = SparsitySchedule().plan(
        np.array([500.0]),
        num_layers=3,
        grid=model.grid(LATENT_SHAPE),
        config=SPARSE.config,
    )
    with pytest.raises(ValueError, match=message):
        model(make_inputs()._replace(**changes), attention=SPARSE, step=plan.step(0))


def test_dense_attention_takes_no_step():
    model = make_model()
    step = scheduled(model).step(0)
    with pytest.raises(ValueError, match="step and masks belong to draft attention"):
        model(make_inputs(), step=step)


def test_masks_of_another_grid_are_refused():
    model = make_model()
    _, masks = run_sparse(model, make_inputs(shape=(2, 2, 10, 14, 4)))
    with pytest.raises(ValueError, match=r"masks.grid=.* must equal the latents'"):
        model(make_inputs(), attention=SPARSE, masks=masks)


def test_grid_takes_latents_with_and_without_batch():
    model = make_model()
    assert model.grid((2, 3, 10, 14, 4)) == model.grid((3, 10, 14, 4))
    assert model.grid((3, 10, 14, 4)).num_tokens == 3 * 5 * 7
    with pytest.raises(ValueError, match="latent_shape"):
        model.grid((3, 10, 14))
