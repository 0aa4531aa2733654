"""A step that reuses its mask runs neither pooling nor selection."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from draft_jax import (
    DraftConfig,
    VideoGrid,
    constant_step,
    initial_mask,
    scheduled_attention,
)

GRID = VideoGrid(2, 8, 16, tile=(4, 8), text_length=5)
# Only the ranking looks at the bits of scores, and only the draft multiplies
# S x D by D x S for all heads at once.
RANKING = "bitcast_convert_type"
DRAFT = (1, 2, GRID.num_visual_blocks, GRID.num_visual_blocks)


def inner_jaxprs(equation):
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    ):
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def conditions_around(jaxpr, is_wanted, path=()):
    """For each wanted equation, the `cond` equations around it and their branches."""
    for equation in jaxpr.eqns:
        if is_wanted(equation):
            yield path
        for number, inner in enumerate(inner_jaxprs(equation)):
            is_cond = equation.primitive.name == "cond"
            step = ((equation, number),) if is_cond else ()
            yield from conditions_around(inner, is_wanted, path + step)


def is_ranking(equation):
    return equation.primitive.name == RANKING


def is_draft(equation):
    shapes = [v.aval.shape for v in equation.outvars]
    return equation.primitive.name == "dot_general" and shapes == [DRAFT]


def is_pooling(equation):
    """Sums over the tokens of a tile, or anything that makes [B, S, N, D]."""
    pooled = (1, GRID.num_visual_blocks, 2, 8)
    return any(v.aval.shape == pooled for v in equation.outvars)


@pytest.fixture(scope="module")
def program():
    config = DraftConfig.paper(sparsity=0.5)
    mask = initial_mask(GRID, config, batch=1, num_heads=2)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, GRID.num_tokens, 2, 8))

    def layer(step, mask):
        return scheduled_attention(
            q, k, v, grid=GRID, config=config, step=step, mask=mask, order="tiled"
        )

    return layer, constant_step(GRID, config), mask


@pytest.mark.parametrize("is_wanted", [is_ranking, is_draft, is_pooling])
def test_only_a_refresh_pools_and_selects(program, is_wanted):
    layer, step, mask = program
    jaxpr = jax.make_jaxpr(layer)(step, mask).jaxpr
    paths = list(conditions_around(jaxpr, is_wanted))
    assert paths
    for path in paths:
        assert len(path) == 2, "inside the sparse branch and the refreshing one"
        equation, branch = path[-1]
        other = equation.params["branches"][1 - branch].jaxpr
        assert not other.eqns, "the branch that reuses the mask computes nothing"


@pytest.mark.parametrize("is_wanted", [is_ranking, is_draft, is_pooling])
def test_a_known_reuse_has_no_trace_of_a_new_mask(program, is_wanted):
    """A step whose values are known: closed over, where another is an argument."""
    layer, step, mask = program
    reuse = dataclasses.replace(step, refresh=np.asarray(False))
    for known, num_expected in ((step, 1), (reuse, 0)):
        jaxpr = jax.make_jaxpr(functools.partial(layer, known))(mask).jaxpr
        paths = list(conditions_around(jaxpr, is_wanted))
        assert min(len(paths), 1) == num_expected
        assert not any(paths), "no conditional either way"


def test_a_known_reuse_returns_its_mask_untouched(program):
    layer, step, mask = program
    reuse = dataclasses.replace(step, refresh=np.asarray(False))
    jaxpr = jax.make_jaxpr(functools.partial(layer, reuse))(mask).jaxpr
    assert jaxpr.outvars[1:] == jaxpr.invars


def test_both_branches_survive_compilation(program):
    """XLA may turn a small conditional into a select, which would run both sides."""
    layer, step, mask = program
    text = jax.jit(layer).lower(step, mask).compile().as_text()
    assert text.count(" conditional(") == 2


def test_a_reused_mask_is_returned_and_used(program):
    layer, step, mask = program
    run = jax.jit(layer)
    out, new = run(step, mask)
    reuse = dataclasses.replace(step, refresh=np.asarray(False))
    again, kept = run(reuse, new)
    chex.assert_trees_all_equal(kept, new)
    np.testing.assert_array_equal(out, again)
    other, kept = run(reuse, mask)
    chex.assert_trees_all_equal(kept, mask)
    assert not np.array_equal(out, other)
    assert run._cache_size() == 1
