"""Two GPUs of one host: each computes the heads that it has, and sends nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from draft_jax import compute_mask
from tests.collectives import collectives
from tests.draft_jax.sharded_hopper_cases import (
    BY_HEADS,
    CALLS,
    CONFIGS,
    GRID,
    SHAPE,
    gradient,
)

pytestmark = pytest.mark.gpu

KINDS = ("automatic", "explicit", "manual")
BACKWARD = ("percentile", "means", "dense")  # the others' are XLA's alone
# An order of additions may follow from the number of heads: one step of bfloat16, of
# values up to the largest.
MOST_ERROR = 2**-7


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    if len(jax.devices()) < 2:
        pytest.skip(f"needs two GPUs; there is {len(jax.devices())}")


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [np.asarray(jax.random.normal(key, SHAPE, "bfloat16")) for key in keys]


def mesh_of(kind):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    devices = jax.devices()[:2]
    return jax.make_mesh((1, 2), ("x", "y"), (axis_type,) * 2, devices=devices)


def on_two(call, kind, qkv):
    """Results of a call on two GPUs, each with half of the heads."""
    mesh = mesh_of(kind)
    if kind == "manual":
        results = jax.eval_shape(call, *qkv)
        specs = jax.tree.map(
            lambda x: BY_HEADS if x.shape == SHAPE else P("x", "y"), results
        )
        call = jax.shard_map(call, mesh=mesh, in_specs=(BY_HEADS,) * 3, out_specs=specs)
    sharded = jax.device_put(tuple(qkv), NamedSharding(mesh, BY_HEADS))
    program = jax.jit(call).lower(*sharded).compile()
    assert collectives(program.as_text()) == []
    out = jax.tree.leaves(program(*sharded))
    for x in out:
        assert len({shard.index for shard in x.addressable_shards}) == 2
    return out


def check(call, kind, qkv, measured):
    expected = jax.tree.leaves(jax.jit(call)(*qkv))
    for got, want in zip(on_two(call, kind, qkv), expected, strict=True):
        got, want = (np.asarray(x).astype(np.float32) for x in (got, want))
        error = np.abs(got - want).max() / np.abs(want).max()
        measured("two_gpus", error)
        assert error <= MOST_ERROR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_one(name, kind, qkv, measured):
    check(CALLS[name][0], kind, qkv, measured)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_are_those_of_one(name, qkv, measured):
    check(gradient(CALLS[name][0]), "automatic", qkv, measured)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_are_those_of_one(name, kind, qkv):
    def lists(q, k, v):
        mask = compute_mask(q, k, grid=GRID, config=CONFIGS[name])
        return mask.row_offsets, mask.block_ids

    expected = jax.jit(lists)(*qkv)
    for got, want in zip(on_two(lists, kind, qkv), expected, strict=True):
        np.testing.assert_array_equal(got, want)
