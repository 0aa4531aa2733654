"""Schedules against the published rules, worked out by hand or by a loop."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    SparsitySchedule,
    StepKind,
    VideoGrid,
    constant_step,
    initial_mask,
    mask_capacity,
    scheduled_attention,
)
from tests.draft_jax import naive_draft

GRID = VideoGrid(2, 5, 7, tile=(2, 4), text_length=5)  # S = 12, 1 text block
CONFIG = DraftConfig.paper(sparsity=0.6)  # 58 of 144 pairs
LINEAR = np.linspace(1000, 50, 20)


def timesteps_of(num_steps, shift):
    """Wan's and Hunyuan's samplers: a linear grid shifted towards high noise."""
    sigma = 1.0 - np.arange(num_steps) / num_steps
    return 1000 * shift * sigma / (1 + (shift - 1) * sigma)


def plan_of(schedule, timesteps=LINEAR, num_layers=3, config=CONFIG):
    return schedule.plan(
        np.asarray(timesteps), num_layers=num_layers, grid=GRID, config=config
    )


@pytest.mark.parametrize(
    ("preset", "num_steps", "shift", "dense_steps", "dense_layers"),
    [
        (SparsitySchedule.wan_published, 50, 5.0, 15, [0]),
        (SparsitySchedule.wan_published, 50, 3.0, 10, [0]),
        (SparsitySchedule.hunyuan_published, 50, 7.0, 15, [0, 1]),
        (SparsitySchedule.hunyuan_custom_published, 30, 13.0, 8, [0, 1]),
        (SparsitySchedule.paper, 50, 5.0, 13, []),  # a quarter is 12.5
        (SparsitySchedule.paper, 16, 3.0, 4, []),
        (SparsitySchedule.paper, 1, 3.0, 1, []),
    ],
)
def test_presets(preset, num_steps, shift, dense_steps, dense_layers):
    plan = plan_of(preset(), timesteps_of(num_steps, shift), 4, DraftConfig.paper())
    expected = np.zeros((num_steps, 4), bool)
    expected[:dense_steps] = True
    expected[:, dense_layers] = True
    np.testing.assert_array_equal(plan.dense, expected)
    assert len(plan) == num_steps


LOW = SparsitySchedule(dense_fraction=0.4, sparsity=0.8, mask_refresh=2)


@pytest.mark.nightly
@pytest.mark.parametrize("start", [0, 15, 20])
def test_a_second_transformer_has_rules_of_its_own(start):
    """The first one's count the whole run; masks are made anew with the second."""
    first = SparsitySchedule(dense_fraction=0.25, mask_refresh=4)
    both = dataclasses.replace(first, low_noise=LOW)
    plan = both.plan(
        LINEAR, num_layers=3, grid=GRID, config=CONFIG, low_noise_from=start
    )
    whole = plan_of(first)
    for name in ("dense", "sparsity", "budget", "refresh"):
        got, expected = (getattr(each, name) for each in (plan, whole))
        np.testing.assert_array_equal(got[:start], expected[:start])
    if start == 15:  # of the 5 steps 2 are dense
        assert plan.dense[15:].all(1).tolist() == [True, True, False, False, False]
        assert plan.refresh[15:].tolist() == [False, False, True, False, True]
        assert plan.sparsity[15:].tolist() == [0.8] * 5
        assert plan.budget[19] < plan.budget[14]


def test_the_published_rule_is_that_of_each_of_two():
    """At shift 12 half of 40 steps are above 925; 26 are those of high noise."""
    times, grid = timesteps_of(40, 12.0), {"num_layers": 2, "grid": GRID}
    plan = SparsitySchedule.wan_pair_published().plan(
        times, low_noise_from=26, config=DraftConfig.paper(), **grid
    )
    assert plan.dense[:, 0].all()
    assert plan.dense[:, 1].sum() == plan.dense[:20, 1].sum() == 20


@pytest.mark.nightly
@pytest.mark.parametrize("start", [None, 21])
def test_rules_for_low_noise_need_a_second_transformer(start):
    with pytest.raises(ValueError, match="first step of the second, 0 to 20; with"):
        SparsitySchedule(low_noise=LOW).plan(
            LINEAR, num_layers=3, grid=GRID, config=CONFIG, low_noise_from=start
        )
    with pytest.raises(ValueError, match="at most two transformers"):
        SparsitySchedule(low_noise=SparsitySchedule(low_noise=LOW))
    with pytest.raises(TypeError, match="low_noise is float; expected a Sparsity"):
        SparsitySchedule(low_noise=0.5)


@pytest.mark.parametrize(
    ("preset", "sparsity"),
    [
        ("paper", 0.5),
        ("wan_published", 0.75),
        ("hunyuan_published", 0.9),
        ("hunyuan_custom_published", 0.9),
    ],
)
def test_presets_set_the_published_sparsity(preset, sparsity):
    schedule = getattr(SparsitySchedule, preset)()
    plan = plan_of(schedule, config=DraftConfig.paper(sparsity=0.5))
    np.testing.assert_array_equal(plan.sparsity, sparsity)
    # S x S = 144 pairs.
    np.testing.assert_array_equal(plan.budget, {0.5: 72, 0.75: 36, 0.9: 15}[sparsity])


def test_the_threshold_itself_is_sparse():
    plan = plan_of(SparsitySchedule(dense_above_timestep=925.0), [925.1, 925.0, 10.0])
    np.testing.assert_array_equal(plan.dense[:, 0], [True, False, False])


def test_fraction_is_read_as_a_decimal():
    plan = plan_of(SparsitySchedule(dense_fraction=0.7), LINEAR[:10])
    assert plan.dense[:, 0].sum() == 7  # 0.7 * 10 is 7.000000000000001


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_fraction_of_none_and_all(fraction):
    plan = plan_of(SparsitySchedule(dense_fraction=fraction))
    assert (plan.dense == bool(fraction)).all()
    assert plan.refresh.any() != bool(fraction)


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_masks_are_refreshed_from_the_first_sparse_step(every):
    schedule = SparsitySchedule(dense_fraction=0.25, mask_refresh=every)
    expected = np.zeros(20, bool)
    expected[5::every] = True
    np.testing.assert_array_equal(plan_of(schedule).refresh, expected)


def test_sparsity_of_each_step():
    schedule = SparsitySchedule(sparsity=(0.6, 0.75, 0.9))
    plan = plan_of(schedule, LINEAR[:3])
    np.testing.assert_array_equal(plan.budget, [58, 36, 15])  # ceil of 57.6, 36, 14.4
    per_row = DraftConfig.paper(selection="row_topk", sparsity=0.6)
    plan = plan_of(schedule, LINEAR[:3], config=per_row)
    np.testing.assert_array_equal(plan.budget, [5, 3, 2])  # ceil of 4.8, 3, 1.2


def test_steps_are_arrays_of_one_structure():
    plan = plan_of(SparsitySchedule(dense_fraction=0.25, dense_layers=(2,)))
    steps = list(plan)
    assert len({jax.tree.structure(step) for step in steps}) == 1
    stacked = plan.stacked()
    for index, step in enumerate(steps):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, i=index: x[i], stacked), step
        )
    assert [bool(steps[9].for_layer(n).dense) for n in range(3)] == [False, False, True]
    assert bool(steps[9].with_dense(stacked.dense[9, 2]).dense)
    with pytest.raises(IndexError):
        plan[20]


def test_kinds_of_steps():
    schedule = SparsitySchedule(
        dense_fraction=0.25,
        dense_layers=(2,),
        sparsity=(0.6,) * 5 + (0.75,) * 3,
        mask_refresh=2,
    )
    plan = plan_of(schedule, LINEAR[:8])
    kinds = [plan.kind(index) for index in range(8)]
    dense, sparse = (True, True, True), (False, False, True)
    made = functools.partial(StepKind, dense=sparse)
    assert (
        kinds
        == [StepKind(dense=dense, refresh=False)] * 2
        + [
            made(refresh=True),
            made(refresh=False),
        ]
        * 3
    )
    assert len(set(kinds)) == 3
    for index, kind in enumerate(kinds):
        step = kind.step(plan.budget[index])
        np.testing.assert_array_equal(step.dense, plan[index].dense)
        assert int(step.budget) == plan[index].budget
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(step))
    everywhere = plan_of(SparsitySchedule(dense_layers=(0, 1, 2)))
    assert bool(everywhere.refresh[0])
    nothing_to_refresh = StepKind(dense=dense, refresh=False)
    assert everywhere.kind(0) == nothing_to_refresh


def test_a_kind_is_a_static_argument():
    plan = plan_of(SparsitySchedule(sparsity=(0.6, 0.75, 0.9)), LINEAR[:3])

    @functools.partial(jax.jit, static_argnames="kind")
    def look(budget, kind):
        step = kind.step(budget)
        assert not step.for_layer(1).dense
        assert step.refresh
        return step.budget

    budgets = [int(look(plan.budget[i], plan.kind(i))) for i in range(3)]
    assert budgets == plan.budget.tolist()
    assert look._cache_size() == 1


def test_schedule_is_hashable():
    assert hash(SparsitySchedule.paper()) == hash(SparsitySchedule(dense_fraction=0.25))
    assert SparsitySchedule.paper() != SparsitySchedule.wan_published()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_fraction": 1.2}, r"dense_fraction=1.2 must be None or in \[0, 1\]"),
        ({"dense_fraction": "all"}, "dense_fraction='all' must be None or in"),
        ({"dense_above_timestep": -1.0}, r"dense_above_timestep=-1.0 must be None or"),
        ({"dense_layers": (-1,)}, r"dense_layers=\(-1,\) must be a tuple of integers"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be a number in \[0, 1\)"),
        ({"sparsity": (0.5, -0.1)}, r"sparsity\[1\]=-0.1 must be a number in \[0, 1\)"),
        ({"mask_refresh": 0}, "mask_refresh=0 must be an integer >= 1"),
        ({"mask_refresh": 1.5}, "mask_refresh=1.5 must be an integer >= 1"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_schedule(fields, message):
    with pytest.raises(ValueError, match=message):
        SparsitySchedule(**fields)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ({}, {"timesteps": []}, r"timesteps has shape \(0,\); expected \[steps\], at"),
        ({}, {"timesteps": [[1.0]]}, r"timesteps has shape \(1, 1\); expected"),
        ({}, {"timesteps": [1001.0]}, r"timesteps=\[1001.0\] must lie in 0 to 1000"),
        ({}, {"timesteps": [np.nan]}, r"timesteps=\[nan\] must lie in 0 to 1000"),
        ({}, {"num_layers": 0}, "num_layers=0 must be a positive integer"),
        (
            {"dense_layers": (1, 7)},
            {},
            r"names layers \[7\]; the model has num_layers=3",
        ),
        ({"sparsity": (0.6, 0.7)}, {}, "sparsity has 2 values; there are 20 timesteps"),
        ({"sparsity": 0.5}, {}, "sparsity=0.5 of the schedule must be at least config"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_annotations")
def test_schedule_that_does_not_fit_the_run(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_of(SparsitySchedule(**schedule), **arguments)


def random_qkv(seed, batch=2, heads=2, dim=8):
    shape = (3, batch, GRID.num_tokens, heads, dim)
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


@pytest.mark.parametrize("order", ["raster", "tiled"])
def test_a_whole_run_compiles_once_and_reuses_masks(order):
    """Steps: dense, dense, new mask, reused, new mask at a higher sparsity, reused."""
    schedule = SparsitySchedule(
        dense_above_timestep=700.0,
        mask_refresh=2,
        sparsity=(0.6, 0.6, 0.6, 0.6, 0.9, 0.9),
    )
    plan = plan_of(schedule, [1000, 800, 600, 400, 200, 100], 1)
    lengths = (5, 2)
    chex.clear_trace_counter()  # it counts by name, over the whole session

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(q, k, v, step, mask):
        return scheduled_attention(
            q,
            k,
            v,
            grid=GRID,
            config=CONFIG,
            step=step,
            mask=mask,
            text_lengths=jnp.asarray(lengths),
            order=order,
        )

    mask = initial_mask(GRID, CONFIG, batch=2, num_heads=2)
    everything = np.ones((2, 2, GRID.num_blocks, GRID.num_blocks), bool)
    kept = None
    for index, sparsity in enumerate([0, 0, 0.6, None, 0.9, None]):
        q, k, v = random_qkv(seed=index)  # inputs change from step to step
        if sparsity:
            kept = naive_draft.percentile_mask(q, k, GRID, sparsity)
        inputs = [x[:, GRID.tile_order] if order == "tiled" else x for x in (q, k, v)]
        out, mask = run(*inputs, plan[index].for_layer(0), mask)
        want = naive_draft.attention(
            q, k, v, everything if sparsity == 0 else kept, GRID, lengths
        )
        want = want[:, GRID.tile_order] if order == "tiled" else want
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=3e-6)
        if index >= 2:
            np.testing.assert_array_equal(mask.to_dense(), kept)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["dense", "new-mask", "old-mask"])
def test_known_steps_need_no_conditional(index):
    schedule = SparsitySchedule(dense_fraction=0.25, mask_refresh=2)
    step = plan_of(schedule, [900, 600, 400, 200]).step(index).for_layer(0)
    q, k, v = map(jnp.asarray, random_qkv(0))
    mask = initial_mask(GRID, CONFIG, batch=2, num_heads=2)

    def traced(q, k, v, mask, step):
        return scheduled_attention(
            q, k, v, grid=GRID, config=CONFIG, step=step, mask=mask
        )

    def known(q, k, v, mask):
        return traced(q, k, v, mask, step)

    assert " cond[" in str(jax.make_jaxpr(traced)(q, k, v, mask, step))
    assert " cond[" not in str(jax.make_jaxpr(known)(q, k, v, mask))
    got, expected = jax.jit(known)(q, k, v, mask), jax.jit(traced)(q, k, v, mask, step)
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)


def test_gradient_flows_through_dense_and_sparse_steps():
    q, k, v = map(jnp.asarray, random_qkv(0, batch=1))
    mask = initial_mask(GRID, CONFIG, batch=1, num_heads=2)
    kept = naive_draft.percentile_mask(np.asarray(q), np.asarray(k), GRID, 0.6)
    everything = np.ones_like(kept)

    @jax.jit
    def gradient(step):
        def loss(q):
            out, _ = scheduled_attention(
                q, k, v, grid=GRID, config=CONFIG, step=step, mask=mask
            )
            return jnp.sin(out).sum()

        return jax.grad(loss)(q)

    for dense, pairs in ((True, everything), (False, kept)):
        allowed = jnp.asarray(
            [[naive_draft.token_mask(head, GRID) for head in item] for item in pairs]
        )

        def plain_loss(q, allowed=allowed):
            out = jax.nn.dot_product_attention(q, k, v, mask=allowed)
            return jnp.sin(out).sum()

        got = gradient(constant_step(GRID, CONFIG, dense=dense))
        np.testing.assert_allclose(got, jax.grad(plain_loss)(q), rtol=1e-4, atol=2e-5)


def test_initial_mask_attends_to_the_own_tile_and_text():
    mask = initial_mask(GRID, CONFIG, batch=2, num_heads=3)
    expected = naive_draft.add_text(np.eye(12, dtype=bool), GRID)
    np.testing.assert_array_equal(
        mask.to_dense(), np.broadcast_to(expected, (2, 3, 13, 13))
    )
    assert mask.capacity == mask_capacity(GRID, CONFIG)


def test_constant_step():
    step = constant_step(GRID, CONFIG)
    assert (bool(step.dense), int(step.budget), bool(step.refresh)) == (False, 58, True)


def test_scheduled_attention_names_a_bad_step_or_mask():
    q, k, v = map(jnp.asarray, random_qkv(0))
    mask = initial_mask(GRID, CONFIG, batch=2, num_heads=2)

    def run(step, mask):
        scheduled_attention(q, k, v, grid=GRID, config=CONFIG, step=step, mask=mask)

    whole = plan_of(SparsitySchedule()).step(0)
    with pytest.raises(ValueError, match=r"step.dense has shape \(3,\); expected a sc"):
        run(whole, mask)
    step = constant_step(GRID, CONFIG)
    sparser = initial_mask(GRID, DraftConfig.paper(sparsity=0.9), batch=2, num_heads=2)
    with pytest.raises(ValueError, match=r"mask has capacity \d+; .* need \d+: start"):
        run(step, sparser)
    one_head = initial_mask(GRID, CONFIG, batch=2, num_heads=1)
    with pytest.raises(ValueError, match=r"mask.row_offsets has shape .* 2 heads"):
        run(step, one_head)
