"""Exported functions of our pytrees: what jax.export writes, another process reads."""

import json
import subprocess
import sys

import flax.nnx  # noqa: F401  before models that need it
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from draft_jax import (
    QKV,
    AttentionPlan,
    BlockMask,
    DraftConfig,
    QKNorm,
    SparsitySchedule,
    StepKind,
    VideoGrid,
    constant_step,
    initial_mask,
    norm_rope_pool,
    scheduled_attention,
)
from models.diffusion.caches import CacheState
from models.diffusion.caches.easy import Computed
from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.sampler import SamplerState, StepInputs
from models.diffusion.sampling import Sampling
from models.diffusion.schedulers import FlowUniPC, UniPCCoefficients, UniPCHistory
from models.diffusion.step_programs import StepArrays, StepNumbers
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.layers import JointBlockInputs
from models.mini.codec_training import CodecConfig
from models.mini.optimization import OptimizerConfig, TrainState
from models.mini.renderer import SceneBatch
from models.mini.training import Batch, TrainConfig
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.layers import BlockInputs
from pallas_kernels.common import configuration
from tests.draft_jax import naive_draft

GRID = VideoGrid(2, 4, 8, tile=(2, 4), text_length=3)
CONFIG = DraftConfig.paper(sparsity=0.5)
PLAN = AttentionPlan.draft(CONFIG, SparsitySchedule(sparsity=(0.5, 0.75)))


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


def pooled():
    q = ones(1, GRID.num_tokens, 1, 4)
    config = DraftConfig.paper(pooling="mean+max")
    return norm_rope_pool(q, q, grid=GRID, config=config)[2]


TEXT = TextContext(embeddings=ones(1, 4, 8), lengths=jnp.asarray([3]))
IMAGE = ImageCondition(latents=ones(1, 1, 2, 2, 4), tokens=None)
MASK = BlockMask.full(grid=GRID, batch=1, num_heads=2)
EASY = Computed(ones(1, 1, 2, 2, 4), ones(2, 1, 2, 2, 4), rate=ones())
HISTORY = UniPCHistory(sample=ones(2), clean=ones(2), earlier=ones(2))
TREES = {
    "mask": lambda: MASK,
    "pooled": pooled,
    "parts": lambda: QKV(ones(1, 3, 1, 4), ones(1, 3, 1, 4), ones(1, 3, 1, 4)),
    "step": lambda: constant_step(GRID, CONFIG),
    "plan": lambda: PLAN.steps(np.array([900, 100]), num_layers=2, grid=GRID),
    "configurations": lambda: (
        ones(1),
        GRID,
        PLAN,
        StepKind(dense=(True, False), refresh=True),
        QKNorm(over="head"),
        Sampling(solver=FlowUniPC(num_steps=16)),
        TrainConfig(model=WanConfig.mini()),
    ),
    "sampler": lambda: (
        SamplerState(
            latents=ones(1, 2, 2, 2, 4),
            masks=MASK,
            history=HISTORY,
            cache=CacheState(kept=EASY, score=ones(), owes_masks=True),
        ),
        (
            StepNumbers(ones(), ones(), ones()),
            StepArrays(ones(2), jnp.ones((), jnp.bool_), ones(1, 1, 2, 2, 4)),
        ),
        StepInputs(context=TEXT, guidance=ones(), image=IMAGE),
        UniPCCoefficients(sigma=ones(), corrector=ones(5), predictor=ones(3)),
    ),
    "wan": lambda: (
        WanInputs(
            latents=ones(1, 2, 4, 4, 16), timesteps=ones(1), context=ones(1, 4, 8)
        ),
        BlockInputs(
            text=ones(1, 4, 8),
            image=None,
            modulation=ones(1, 6, 8),
            rope=(ones(4, 2), ones(4, 2)),
            grid=GRID,
            draft=CONFIG,
        ),
    ),
    "hunyuan": lambda: (
        HunyuanInputs(
            latents=ones(1, 2, 4, 4, 16),
            timesteps=ones(1),
            context=ones(1, 4, 8),
            context_mask=jnp.ones((1, 4), jnp.bool_),
            pooled=ones(1, 6),
        ),
        JointBlockInputs(
            conditioning=ones(1, 8),
            rope=(ones(4, 2), ones(4, 2)),
            text_lengths=jnp.asarray([3]),
            grid=GRID,
            draft=CONFIG,
        ),
    ),
    "training": lambda: (
        TrainState(
            step=jnp.asarray(1),
            parameters={"a": ones(1)},
            ema={"a": ones(1)},
            optimizer=(),
        ),
        Batch(
            ids=np.ones((1, 4), np.int32),
            lengths=np.ones(1, np.int32),
            scenes=SceneBatch({}, {"path": ones(1, 2, 3)}, {}),
        ),
        CodecConfig(),
        OptimizerConfig(),
    ),
}


def written_and_read(function, *arguments, **named):
    exported = export.export(jax.jit(function))(*arguments, **named)
    return export.deserialize(exported.serialize())


@pytest.mark.parametrize("name", TREES)
def test_trees_pass_through_exported_functions(name):
    """The static parts, such as a grid, are in the file: the structure is the same."""
    tree = TREES[name]()
    back = written_and_read(lambda tree: tree, tree)
    got = back.call(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(leaf, want)


READ = """
import sys
import jax, numpy as np
import draft_jax
from draft_jax import DraftConfig, VideoGrid, constant_step, initial_mask

folder = sys.argv[1]
grid = VideoGrid(2, 4, 8, tile=(2, 4), text_length=3)
config = DraftConfig.paper(sparsity=0.5)
qkv = np.load(f"{folder}/qkv.npy")
layer = jax.export.deserialize(open(f"{folder}/layer", "rb").read())
mask = initial_mask(grid, config, batch=1, num_heads=2)
step = constant_step(grid, config)
out, mask = layer.call(*qkv, mask, step, grid, config)
assert mask.grid == grid and mask.capacity == mask.block_ids.shape[-1]
try:
    layer.call(*qkv, mask, step, grid, DraftConfig.paper(sparsity=0.75))
except ValueError:
    print("another configuration is another program")
np.save(f"{folder}/out.npy", out)
"""


@pytest.mark.nightly
def test_another_process_reads_exported_attention(tmp_path):
    shape = (3, 1, GRID.num_tokens, 2, 8)
    q, k, v = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "qkv.npy", np.stack([q, k, v]))

    @jax.jit
    def layer(q, k, v, mask, step, grid, config):
        return scheduled_attention(
            q, k, v, grid=grid, config=config, step=step, mask=mask
        )

    mask = initial_mask(GRID, CONFIG, batch=1, num_heads=2)
    step = constant_step(GRID, CONFIG)
    exported = export.export(layer)(q, k, v, mask, step, GRID, CONFIG)
    (tmp_path / "layer").write_bytes(exported.serialize())
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "another configuration" in done.stdout
    kept = naive_draft.percentile_mask(q, k, GRID, 0.5)
    expected = naive_draft.attention(q, k, v, kept, GRID)
    out = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=5e-6)


def test_descriptions_of_another_version_are_refused():
    description = json.loads(configuration.describe(GRID))
    description["version"] = 2
    with pytest.raises(ValueError, match="version 2; this release reads 1: export the"):
        configuration.read(json.dumps(description).encode())


def test_an_unknown_class_is_named():
    description = configuration.describe(GRID).replace(b"VideoGrid", b"SphereGrid")
    with pytest.raises(ValueError, match=r"draft_jax\.SphereGrid is not known here"):
        configuration.read(description)


def test_descriptions_are_checked_as_on_construction():
    description = configuration.describe(GRID).replace(b'"frames": 2', b'"frames": 0')
    with pytest.raises(ValueError, match="frames=0 must be a positive integer"):
        configuration.read(description)


def test_trees_with_other_fields_are_refused():
    """As a file of an older release may have them."""
    serialized = export.export(jax.jit(lambda tree: tree))(MASK).serialize()
    changed = bytes(serialized).replace(b"row_offsets", b"row_starts_")
    with pytest.raises(ValueError, match=r"BlockMask with the fields .*row_starts_"):
        export.deserialize(bytearray(changed))


def test_what_can_not_be_written_is_named():
    class Own:
        num_steps, sigmas, timesteps = 16, (1.0,), (1.0,)

    with pytest.raises(TypeError, match=r"Own.* can't be written with an exported"):
        configuration.describe((GRID, Own()))
