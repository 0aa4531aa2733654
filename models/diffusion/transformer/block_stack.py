"""Stacks of blocks of one structure, which share one traced block.

Their parameters are stacked along a leading layer axis and scanned, so the program and
its compile time do not grow with depth. Layers that a step is known to treat in another
way than their neighbours are a scan of their own.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from draft_jax import BlockMask, DraftStep
from models.diffusion.capture import call_and_capture


def stack_blocks[Block: nnx.Module](
    make: Callable[[nnx.Rngs], Block], num_layers: int, rngs: nnx.Rngs
) -> Block:
    """Returns one block module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> Block:
        return make(rngs)

    return make_all(rngs)


def scan_blocks(blocks: nnx.Module, x: Any, *shared: Any) -> Any:
    """Runs a stack of blocks: x = block(x, *shared) for one after the other."""
    structure, parameters = nnx.split(blocks)

    def run_block(x, layer_parameters):
        return nnx.merge(structure, layer_parameters)(x, *shared), None

    x, _ = jax.lax.scan(run_block, x, parameters)
    return x


def run_blocks(
    blocks: nnx.Module,
    x: Any,
    shared: Any,
    *,
    step: DraftStep | None,
    masks: BlockMask | None,
    first: int = 0,
    remat: bool = False,
    unrolled: bool = False,
    capture: Callable[[dict[str, Any]], Any] | None = None,
    gather: Callable[[Any], Any] | None = None,
) -> tuple[Any, BlockMask | None, Any]:
    """Runs a stack of blocks with self-attention, dense or by a schedule.

    A block is called as `block(x, shared, step, mask)`, with its layer's part of the
    schedule and its mask; it returns x and the mask in use.

    Args:
      blocks: One block module whose parameters have a leading layer axis.
      x: The residual stream; several are a tuple.
      shared: Inputs that all blocks of the call share.
      step: The schedule's entry, of all layers of the model; None with dense attention.
      masks: Masks of all layers of the model; None with dense attention.
      first: Number of the model's layers before this stack: the index of its first
        block in step and masks.
      remat: Recompute each block in the backward pass.
      unrolled: Compile each layer for itself, which takes longer. A backward pass is
        faster: a scan copies all that it needs to arrays of all layers, and back.
        Without `gather` only.
      capture: Called in each block with what it has sown, in nested dictionaries.
      gather: Makes the whole parameters of a layer from a device's part of them. It is
        called for each layer while the one before runs.

    Returns:
      The residual stream, the masks of all layers of the model, and what `capture` has
      returned for these blocks, stacked; None without.
    """
    structure, parameters = nnx.split(blocks)

    def run_layer(known_dense, carry, layer):
        x, masks = carry
        index, layer_parameters = layer
        layer_step = None
        if step is not None:
            dense = step.dense[index] if known_dense is None else known_dense
            layer_step = step.with_dense(dense)

        def run_block(x, layer_parameters, mask):
            block = nnx.merge(structure, layer_parameters)
            arguments = x, shared, layer_step, mask
            if capture is None:
                return block(*arguments), None
            result, sown = call_and_capture(block, *arguments)
            return result, capture(sown)

        if remat:
            # Inside a scan the backward pass cannot merge with the forward one.
            run_block = jax.checkpoint(run_block, prevent_cse=unrolled)
        mask = jax.tree.map(lambda leaf: leaf[index], masks)
        (x, mask), sown = run_block(x, layer_parameters, mask)
        # In place: the masks of all layers may take a gigabyte.
        masks = jax.tree.map(lambda old, new: old.at[index].set(new), masks, mask)
        return (x, masks), sown

    carry, sown_of_runs = (x, masks), []
    stack = range(first, first + len(jax.tree.leaves(parameters)[0]))
    for layers, known_dense in runs_of_layers(step, stack):
        body = functools.partial(run_layer, known_dense)
        if gather is None:
            carry, sown = _scan_layers(
                body, carry, parameters, layers, stack, unrolled=unrolled
            )
        else:
            carry, sown = _scan_ahead(body, carry, parameters, layers, stack, gather)
        sown_of_runs.append(sown)
    x, masks = carry
    sown = jax.tree.map(lambda *runs: jnp.concatenate(runs), *sown_of_runs)
    return x, masks, sown


def runs_of_layers(
    step: DraftStep | None, layers: range
) -> list[tuple[range, bool | None]]:
    """Returns layers that follow each other and do the same, and if that is dense.

    One run of all the layers, and None, where that is not known before the program
    runs.

    Args:
      step: The schedule's entry, of all layers of the model.
      layers: The layers in question, which follow each other.
    """
    if step is None or isinstance(step.dense, jax.core.Tracer):
        return [(layers, None)]
    dense = np.asarray(step.dense)
    changes = 1 + np.flatnonzero(np.diff(dense[layers.start : layers.stop]))
    bounds = [layers.start, *(layers.start + changes).tolist(), layers.stop]
    return [
        (range(first, last), bool(dense[first]))
        for first, last in itertools.pairwise(bounds)
    ]


def _scan_layers(
    body: Callable,
    carry: Any,
    stacked: Any,
    layers: range,
    stack: range,
    *,
    unrolled: bool,
) -> tuple[Any, Any]:
    """Scans over some layers of stacked arrays; `body` also gets their indices."""
    indices = jnp.arange(layers.start, layers.stop)
    if layers == stack:
        return jax.lax.scan(body, carry, (indices, stacked), unroll=unrolled)

    # Each is looked up: a slice of some layers would be a copy of their weights.
    def look_up(carry, index):
        place = index - stack.start
        return body(carry, (index, jax.tree.map(lambda leaf: leaf[place], stacked)))

    return jax.lax.scan(look_up, carry, indices, unroll=unrolled)


def _scan_ahead(
    body: Callable,
    carry: Any,
    stacked: Any,
    layers: range,
    stack: range,
    gather: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """Scans over some layers; each is gathered while the one before it runs.

    So two layers are whole at once. Nothing that a layer computes is needed for the
    next one's gathering, which XLA may run beside it.
    """

    def gather_at(index):
        place = jnp.minimum(index, layers.stop - 1) - stack.start
        return gather(jax.tree.map(lambda leaf: leaf[place], stacked))

    def run(carry, index):
        inner, whole = carry
        upcoming = gather_at(index + 1)
        inner, sown = body(inner, (index, whole))
        return (inner, upcoming), sown

    first = jnp.asarray(layers.start)
    indices = jnp.arange(layers.start, layers.stop)
    (carry, _), sown = jax.lax.scan(run, (carry, gather_at(first)), indices)
    return carry, sown
