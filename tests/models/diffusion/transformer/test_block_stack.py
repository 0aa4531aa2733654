"""Stacks of blocks against loops in Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import DraftConfig, VideoGrid, constant_step, initial_mask
from models.diffusion.transformer.block_stack import (
    run_blocks,
    runs_of_layers,
    scan_blocks,
    stack_blocks,
)

GRID, CONFIG = VideoGrid(2, 4, 8, tile=(2, 4)), DraftConfig.paper(sparsity=0.5)


class Affine(nnx.Module):
    """x -> x * scale + shared, or - shared in a dense layer; sparse ones use masks."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jax.random.uniform(rngs.params(), (), jnp.float32))

    def __call__(self, x, shared, step=None, mask=None):
        if step is None:
            return x * self.scale[...] + shared, mask
        sign = jnp.where(step.dense, -1.0, 1.0)
        ids = jnp.where(step.dense, mask.block_ids, mask.block_ids + 1)
        mask = dataclasses.replace(mask, block_ids=ids)
        return x * self.scale[...] + sign * shared, mask


class Plain(Affine):
    def __call__(self, x, shared):
        return x * self.scale[...] + shared


def test_scan_is_a_loop():
    blocks = stack_blocks(Plain, 4, nnx.Rngs(0))
    scales = np.asarray(blocks.scale[...], np.float64)
    assert len(set(scales.tolist())) == 4
    expected = 2.0
    for scale in scales:
        expected = expected * scale + 0.5
    np.testing.assert_allclose(scan_blocks(blocks, 2.0, 0.5), expected, rtol=1e-6)


def entry(*dense):
    return dataclasses.replace(constant_step(GRID, CONFIG), dense=np.array(dense))


@pytest.mark.parametrize(
    ("dense", "layers", "runs"),
    [
        ((1, 1, 0, 0, 0), range(5), [(range(2), True), (range(2, 5), False)]),
        ((1, 1, 0, 0, 0), range(2, 5), [(range(2, 5), False)]),
        ((1, 0, 0, 1, 1), range(2, 5), [(range(2, 3), False), (range(3, 5), True)]),
    ],
    ids=["all", "one-kind", "two-kinds"],
)
def test_runs_of_layers_of_one_stack(dense, layers, runs):
    assert runs_of_layers(entry(*map(bool, dense)), layers) == runs
    assert runs_of_layers(None, layers) == [(layers, None)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
def test_masks_and_steps_are_flat_over_stacks(known):
    """Stacks of two and of three layers; the step is that of all five."""
    dense = (True, False, False, True, False)
    stacks = [
        stack_blocks(Affine, count, nnx.Rngs(seed)) for seed, count in ((0, 2), (1, 3))
    ]
    mask = initial_mask(GRID, CONFIG, batch=1, num_heads=1)
    masks = jax.tree.map(
        lambda leaf: jnp.stack([leaf + 10 * i for i in range(5)]), mask
    )

    def run(step, masks):
        x = jnp.float32(2.0)
        for first, blocks in zip((0, 2), stacks, strict=True):
            x, masks, _ = run_blocks(
                blocks, x, jnp.float32(0.5), step=step, masks=masks, first=first
            )
        return x, masks

    step = entry(*dense)
    x, got = run(step, masks) if known else jax.jit(run)(step, masks)
    expected = 2.0
    scales = np.concatenate([np.asarray(b.scale[...], np.float64) for b in stacks])
    for scale, is_dense in zip(scales, dense, strict=True):
        expected = expected * scale + (-0.5 if is_dense else 0.5)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    for layer, is_dense in enumerate(dense):
        added = 0 if is_dense else 1
        np.testing.assert_array_equal(
            got.block_ids[layer], masks.block_ids[layer] + added
        )


@pytest.mark.parametrize(
    ("unrolled", "remat"),
    [(False, False), (True, False), (True, True)],
    ids=["scanned", "unrolled", "unrolled-remat"],
)
def test_gradient_of_a_stack(unrolled, remat):
    blocks = stack_blocks(Affine, 3, nnx.Rngs(0))
    structure, parameters = nnx.split(blocks)

    def run(parameters):
        x, _, _ = run_blocks(
            nnx.merge(structure, parameters),
            jnp.float32(2.0),
            jnp.float32(0.5),
            step=None,
            masks=None,
            remat=remat,
            unrolled=unrolled,
        )
        return x

    gradient = jax.jit(jax.grad(run))
    assert ("stablehlo.while" in gradient.lower(parameters).as_text()) != unrolled
    scales = np.asarray(blocks.scale[...], np.float64)
    entered = [2.0]
    for scale in scales:
        entered.append(entered[-1] * scale + 0.5)
    expected = [entered[i] * np.prod(scales[i + 1 :]) for i in range(3)]
    np.testing.assert_allclose(gradient(parameters)["scale"][...], expected, rtol=1e-6)
