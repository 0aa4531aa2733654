"""Configurations: equal ones are one to jax, and any transformation takes them."""

import dataclasses
import functools
import importlib.util
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import draft_jax
import models
import pallas_kernels
from draft_jax import (
    AttentionPlan,
    BlockMask,
    Compensation,
    Correction,
    DraftAttentionFn,
    DraftConfig,
    QKNorm,
    SparsitySchedule,
    StepKind,
    VideoGrid,
    compute_mask,
    constant_step,
    draft_attention,
    draft_scores,
    initial_mask,
    norm_rope_pool,
    pool_tokens,
    scheduled_attention,
    select_blocks,
)
from models.clip.config import CLIPVisionConfig
from models.diffusion.caches import EasyCache, MagCache, MagRatios
from models.diffusion.caches.calibration import MagCalibration
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowEuler, FlowUniPC
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.tiling import HunyuanTiling
from models.mini.codec_training import CodecConfig
from models.mini.optimization import OptimizerConfig
from models.mini.training import TrainConfig
from models.umt5.config import UMT5Config
from models.wan.config import WanConfig
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.tiling import Tiling as FrameTiling
from pallas_kernels import SubTiles, block_sparse_attention
from pallas_kernels.attention.blocks import ChunkConfig
from pallas_kernels.attention.sm90.plan import KernelConfig
from pallas_kernels.common import configuration
from pallas_kernels.pooling.interfaces import Tiling
from tests.draft_jax import naive_draft

pytestmark = pytest.mark.usefixtures("without_jaxtyping")  # which say Python's types

PACKAGES = (draft_jax, models, pallas_kernels)
GRID = VideoGrid(2, 4, 8, tile=(2, 4), text_length=3)
CONFIG = DraftConfig.paper(sparsity=0.5)
RATIOS = MagRatios(values=((1.0,),), model="a", source="b")

# Of each class: its fields in Python's types, and equal ones of other types.
EQUAL = {
    VideoGrid: (
        {"frames": 16, "height": 4, "width": 8, "tile": (2, 4), "text_length": 3},
        {
            "frames": np.uint8(16),
            "height": np.int16(4),
            "width": np.asarray(8),
            "tile": [np.uint8(2), 4],
            "text_length": np.uint8(3),
        },
    ),
    Compensation: (
        {"sub_tile": (2, 8), "frames": 4},
        {"sub_tile": np.array([2, 8]), "frames": np.uint8(4)},
    ),
    Correction: (
        {"samples": 64, "prior": 20.5},
        {"samples": np.uint8(64), "prior": np.float32(20.5)},
    ),
    DraftConfig: (
        {"sparsity": 0.9, "top_p": 0.7, "keep_own_tile": True},
        {
            "sparsity": np.float32(0.9),
            "top_p": np.float16(0.7),
            "keep_own_tile": np.True_,
        },
    ),
    SparsitySchedule: (
        {
            "dense_layers": (0, 1),
            "sparsity": (0.9, 0.95),
            "mask_refresh": 2,
            "low_noise": SparsitySchedule(dense_layers=(2,)),
        },
        {
            "dense_layers": range(2),
            "sparsity": np.array([0.9, 0.95], np.float32),
            "mask_refresh": np.int8(2),
            "low_noise": lambda: SparsitySchedule(dense_layers=[2]),
        },
    ),
    AttentionPlan: (
        {"config": CONFIG, "schedule": SparsitySchedule(dense_layers=(0,))},
        {
            "config": lambda: DraftConfig.paper(sparsity=np.float32(0.5)),
            "schedule": lambda: SparsitySchedule(dense_layers=[0]),
        },
    ),
    StepKind: (
        {"dense": (True, False), "refresh": False},
        {"dense": np.array([True, False]), "refresh": np.False_},
    ),
    DraftAttentionFn: (
        {
            "grid": GRID,
            "config": CONFIG,
            "order": "raster",
            "scale": 0.3,
            "backend": "auto",
        },
        {
            "grid": GRID,
            "config": CONFIG,
            "order": np.str_("raster"),
            "scale": np.float32(0.3),
            "backend": "auto",
        },
    ),
    QKNorm: (
        {"over": "head", "eps": 1e-5},
        {"over": np.str_("head"), "eps": np.float32(1e-5)},
    ),
    Tiling: (
        {"frames": 2, "height": 4, "width": 8, "tile": (2, 4), "order": "tiled"},
        {
            "frames": np.uint8(2),
            "height": np.int64(4),
            "width": np.int8(8),
            "tile": [2, 4],
            "order": np.str_("tiled"),
        },
    ),
    SubTiles: (
        {"frames": 2, "height": 4, "width": 8, "tile": (2, 4), "sub_tile": (1, 2)},
        {
            "frames": np.uint8(2),
            "height": np.int64(4),
            "width": np.int8(8),
            "tile": [2, 4],
            "sub_tile": [np.int8(1), 2],
        },
    ),
    KernelConfig: ({"num_slots": 6}, {"num_slots": np.uint8(6)}),
    ChunkConfig: (
        {"group_tokens": 512, "step_tokens": 128, "upcast": True},
        {
            "group_tokens": np.int32(512),
            "step_tokens": np.int16(128),
            "upcast": np.True_,
        },
    ),
    FlowEuler: (
        {"num_steps": 4, "shift": 3.1},
        {"num_steps": np.uint8(4), "shift": np.float32(3.1)},
    ),
    FlowUniPC: (
        {"num_steps": 4, "shift": 3.1},
        {"num_steps": np.uint8(4), "shift": np.float32(3.1)},
    ),
    MagRatios: (
        {"values": ((1.0, 0.9), (1.0, 0.8)), "model": "a", "source": "b", "shift": 3.1},
        {
            "values": np.array([[1.0, 0.9], [1.0, 0.8]]),
            "model": np.str_("a"),
            "source": "b",
            "shift": np.float32(3.1),
        },
    ),
    MagCache: (
        {"ratios": RATIOS, "threshold": 0.24, "max_skips": 6},
        {
            "ratios": lambda: MagRatios(values=[[1.0]], model="a", source="b"),
            "threshold": np.float32(0.24),
            "max_skips": np.uint8(6),
        },
    ),
    EasyCache: (
        {"threshold": 0.1, "first_steps": 5},
        {"threshold": np.float32(0.1), "first_steps": np.uint8(5)},
    ),
    MagCalibration: ({}, {}),
    Sampling: (
        {"frames": 9, "num_steps": 4, "guidance": 5.1, "seed": 7},
        {
            "frames": np.int32(9),
            "num_steps": np.uint8(4),
            "guidance": np.float32(5.1),
            "seed": np.int64(7),
        },
    ),
    WanConfig: (
        dataclasses.asdict(WanConfig.t2v_1_3b()),
        dataclasses.asdict(WanConfig.t2v_1_3b())
        | {"num_heads": np.uint8(12), "tile": [8, 16], "eps": np.float32(1e-6)},
    ),
    WanVAEConfig: (
        dataclasses.asdict(WanVAEConfig.wan2_1()),
        dataclasses.asdict(WanVAEConfig.wan2_1())
        | {"base_dim": np.uint8(96), "dim_mult": [1, 2, 4, 4]},
    ),
    FrameTiling: (
        {"size": (64, 64), "overlap": (16, 8)},
        {"size": [64, np.uint8(64)], "overlap": np.array([16, 8])},
    ),
    HunyuanConfig: (
        dataclasses.asdict(HunyuanConfig.video_13b()),
        dataclasses.asdict(HunyuanConfig.video_13b())
        | {"num_heads": np.uint8(24), "rope_channels": [16, 56, np.int32(56)]},
    ),
    HunyuanVAEConfig: (
        dataclasses.asdict(HunyuanVAEConfig.video()),
        dataclasses.asdict(HunyuanVAEConfig.video())
        | {"layers_per_block": np.uint8(2), "block_out_channels": [128, 256, 512, 512]},
    ),
    HunyuanTiling: (
        {"size": (64, 256, 256), "step": (48, 192, 192)},
        {"size": [64, np.int16(256), 256], "step": np.array([48, 192, 192])},
    ),
    UMT5Config: (
        dataclasses.asdict(UMT5Config.xxl()),
        dataclasses.asdict(UMT5Config.xxl()) | {"num_layers": np.uint8(24)},
    ),
    CLIPVisionConfig: (
        dataclasses.asdict(CLIPVisionConfig.vit_h_14()),
        dataclasses.asdict(CLIPVisionConfig.vit_h_14())
        | {"patch_size": np.uint8(14), "eps": np.float32(1e-5)},
    ),
    CodecConfig: (
        {"edges": 0.5, "seed": 3},
        {"edges": np.float32(0.5), "seed": np.int8(3)},
    ),
    OptimizerConfig: (
        {"warmup_steps": 9, "betas": (0.9, 0.99)},
        {"warmup_steps": np.int64(9), "betas": [np.float32(0.9), 0.99]},
    ),
    TrainConfig: (
        {"shift": 3.0, "remat": True},
        {"shift": np.float32(3.0), "remat": np.True_},
    ),
}
each_class = pytest.mark.parametrize("cls", EQUAL, ids=configuration.name_of)


def other(cls):
    """An equal configuration, made of NumPy's numbers and of lists."""
    fields = EQUAL[cls][1]
    made = {name: value() for name, value in fields.items() if callable(value)}
    return cls(**(fields | made))


def of_plain_types(value):
    """Whether it is of Python's types down to the last number."""
    if type(value) is tuple:
        return all(map(of_plain_types, value))
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return all(of_plain_types(getattr(value, field.name)) for field in fields)
    return value is None or type(value) in (bool, int, float, str)


@each_class
def test_equal_configurations_are_one(cls):
    """NumPy's numbers and lists become Python's, so that hashes agree as `==` does."""
    known, given = cls(**EQUAL[cls][0]), other(cls)
    assert known == given
    assert hash(known) == hash(given)
    assert repr(known) == repr(given)
    assert of_plain_types(given)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64])
def test_sizes_of_small_integers_do_not_overflow(dtype):
    grid = VideoGrid(dtype(16), dtype(16), dtype(40), tile=(dtype(16), dtype(20)))
    assert grid.num_tokens == 10_240
    assert grid.block_size == 320
    assert grid.block_lengths.tolist() == [320] * 32


NEED_GRADIO = ("models.app.page", "models.app.server")


def all_classes():
    skipped = ("__main__",)
    if importlib.util.find_spec("gradio") is None:
        skipped += NEED_GRADIO
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(skipped):
                module = importlib.import_module(found.name)
                yield from (
                    value
                    for value in vars(module).values()
                    if isinstance(value, type) and value.__module__ == found.name
                )


ENDINGS = ("Config", "Grid", "Schedule", "AttentionPlan", "AttentionFn")


def test_each_configuration_is_tested():
    """Of all three packages: classes that are hashable configurations by their name."""
    named = {
        cls
        for cls in all_classes()
        if dataclasses.is_dataclass(cls) and cls.__name__.endswith(ENDINGS)
    }
    assert named <= set(EQUAL)


def test_dataclasses_of_arrays_are_equal_by_identity():
    """Field by field, `==` of arrays has no single truth value, and none a hash."""
    wrong = [
        cls.__qualname__
        for cls in all_classes()
        if dataclasses.is_dataclass(cls)
        and not cls.__module__.startswith("pallas_kernels.attention.sm90")
        and any(holds_arrays(field.type) for field in dataclasses.fields(cls))
        and cls.__dataclass_params__.eq
    ]
    assert not wrong


def holds_arrays(annotation):
    written = str(annotation)
    return "Callable" not in written and ("Array," in written or "ndarray" in written)


@each_class
def test_any_transformation_takes_a_configuration(cls):
    """As a plain argument, which no name has to be made static."""
    config = cls(**EQUAL[cls][0])
    seen = []

    def double(x, config):
        seen.append(config)
        return 2.0 * x, config

    assert jax.jit(double)(1.0, config) == (2.0, config)
    jax.jit(double)(2.0, other(cls))
    assert len(seen) == 1, "an equal configuration is no new program"
    assert jax.jit(double, static_argnames="config")(1.0, config=config)[0] == 2.0
    np.testing.assert_array_equal(
        jax.vmap(double)(jnp.arange(3.0), config)[0], [0, 2, 4]
    )
    slope, same = jax.grad(jax.checkpoint(double), has_aux=True)(3.0, config)
    assert (slope, same) == (2.0, config)
    carried, _ = jax.lax.scan(
        lambda carry, _: (double(*carry), None), (1.0, config), length=3
    )
    assert carried == (8.0, config)
    assert jax.lax.cond(True, double, double, 1.0, config) == (2.0, config)
    assert all(value == config for value in seen)


def random_qkv(seed=0, heads=2, dim=8):
    rng = np.random.default_rng(seed)
    shape = (3, 1, GRID.num_tokens, heads, dim)
    return rng.normal(size=shape).astype(np.float32)


def test_jit_and_vmap_take_the_configuration_of_draft_attention():
    """With no static_argnames and no in_axes, against the NumPy method."""
    q, k, v = random_qkv()
    doubles = [x.astype(np.float64) for x in (q, k, v)]
    kept = naive_draft.percentile_mask(*doubles[:2], GRID, 0.5)
    expected = naive_draft.attention(*doubles, kept, GRID)
    got = jax.jit(draft_attention)(q, k, v, grid=GRID, config=CONFIG)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-6)
    stacked = (jnp.stack([x, x]) for x in (q, k, v))
    mapped = functools.partial(jax.vmap(draft_attention), grid=GRID, config=CONFIG)
    assert jax.eval_shape(mapped, *stacked).shape == (2, *q.shape)


q, k, v = random_qkv()
PUBLIC = {  # functions of a grid and a configuration, plain arguments
    "draft_scores": (draft_scores, (q, k), {"grid": GRID, "config": CONFIG}),
    "compute_mask": (compute_mask, (q, k), {"grid": GRID, "config": CONFIG}),
    "norm_rope_pool": (
        norm_rope_pool,
        (q, k),
        {
            "grid": GRID,
            "config": CONFIG,
            "norm": QKNorm(over="head"),
            "scales": (np.ones(8, np.float32),) * 2,
        },
    ),
    "pool_tokens": (pool_tokens, (q[:, GRID.visual_tokens], GRID), {}),
    "select_blocks": (
        select_blocks,
        (np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8),),
        {"grid": GRID, "config": CONFIG},
    ),
    "block_sparse_attention": (
        functools.partial(block_sparse_attention, order="raster"),
        (q, k, v, BlockMask.full(grid=GRID, batch=1, num_heads=2)),
        {"grid": GRID},
    ),
    "scheduled_attention": (
        scheduled_attention,
        (q, k, v),
        {
            "grid": GRID,
            "config": CONFIG,
            "step": constant_step(GRID, CONFIG),
            "mask": initial_mask(GRID, CONFIG, batch=1, num_heads=2),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_jit_takes_configurations_of_public_functions(name):
    """The program is that of a function of the arrays alone."""
    function, arguments, named = PUBLIC[name]
    arrays, structure = jax.tree.flatten((arguments, named))
    assert all(hasattr(array, "shape") for array in arrays)

    def of_arrays(*arrays):
        arguments, named = jax.tree.unflatten(structure, arrays)
        return function(*arguments, **named)

    plain = jax.jit(function).trace(*arguments, **named)
    assert str(plain.jaxpr) == str(jax.jit(of_arrays).trace(*arrays).jaxpr)


@pytest.mark.parametrize(
    "tree",
    [
        BlockMask.full(grid=GRID, batch=1, num_heads=2),
        constant_step(GRID, CONFIG),
        SparsitySchedule.paper().plan(
            np.array([900, 100]), num_layers=2, grid=GRID, config=CONFIG
        ),
        norm_rope_pool(*map(jnp.asarray, (q, k)), grid=GRID, config=CONFIG)[2],
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_trees_of_arrays_can_be_compared_and_hashed(tree):
    copy = jax.tree.map(jnp.asarray, tree)
    assert tree == tree
    assert tree != copy
    assert tree in {tree, copy}
    assert [tree, copy].index(copy) == 1


def test_a_plan_is_an_argument_of_jit():
    """Its steps then are traced, and an index may be."""
    plan = SparsitySchedule(sparsity=(0.5, 0.75, 0.8), dense_layers=(0,)).plan(
        np.array([900, 500, 100]), num_layers=2, grid=GRID, config=CONFIG
    )

    @jax.jit
    def budgets(plan, index):
        return plan[index].budget, [step.budget for step in plan]

    one, each = budgets(plan, 1)
    assert one == 16  # a quarter of 8 x 8
    assert [int(budget) for budget in each] == [32, 16, 13]
    assert jax.jit(lambda index: plan.step(index).budget)(2) == 13
    with pytest.raises(IndexError, match="step 3 is not one of the plan's 3"):
        plan.step(3)


def test_configurations_in_modules_are_no_state():
    """A module that holds them splits, merges and is compiled by their values."""

    class Layer(nnx.Module):
        def __init__(self, grid, config):
            self.grid, self.config = grid, config
            self.weight = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return self.weight[...] * x * self.grid.frames / self.config.sparsity

    graph, state = nnx.split(Layer(GRID, CONFIG))
    assert len(jax.tree.leaves(state)) == 1
    assert (
        graph == nnx.split(Layer(GRID, DraftConfig.paper(sparsity=np.float32(0.5))))[0]
    )
    assert graph != nnx.split(Layer(GRID, DraftConfig.paper(sparsity=0.75)))[0]
    merged = nnx.merge(graph, state)
    assert merged.config == CONFIG
    assert nnx.jit(lambda layer, x: layer(x))(merged, 1.0) == 4.0
