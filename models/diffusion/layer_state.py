"""The state of self-attention over a model's layers: a step's entry, and masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from draft_jax import (
    AttentionPlan,
    BlockMask,
    DraftConfig,
    DraftStep,
    VideoGrid,
    constant_step,
    initial_mask,
)


def prepare_layer_state(
    attention: AttentionPlan,
    step: DraftStep | None,
    masks: BlockMask | None,
    *,
    grid: VideoGrid,
    num_layers: int,
    batch: int,
    num_heads: int,
) -> tuple[DraftStep | None, BlockMask | None]:
    """Returns step and masks as layers need them: with draft attention there are both.

    Raises:
      ValueError: As `check_layer_state`.
    """
    check_layer_state(attention, step, masks, grid=grid, num_layers=num_layers)
    if attention.config is None:
        return None, None
    if step is None:
        step = sparse_step(grid, attention.config, num_layers)
    if masks is None:
        masks = first_masks(
            grid,
            attention.config,
            num_layers=num_layers,
            batch=batch,
            num_heads=num_heads,
        )
    return step, masks


def check_layer_state(
    attention: AttentionPlan,
    step: DraftStep | None,
    masks: BlockMask | None,
    *,
    grid: VideoGrid,
    num_layers: int,
) -> None:
    """Checks that step and masks, where given, suit the attention and the model.

    Raises:
      ValueError: They are given with dense attention, or are of another number of
        layers or another grid.
    """
    if attention.is_dense:
        if step is not None or masks is not None:
            raise ValueError(
                "step and masks belong to draft attention, but attention="
                "AttentionPlan.dense(); pass AttentionPlan.draft(config, schedule)"
            )
        return
    if step is not None and step.dense.shape != (num_layers,):
        raise ValueError(
            f"step.dense has shape {step.dense.shape}; expected one entry for "
            f"each of the {num_layers} layers"
        )
    if masks is not None and masks.grid != grid:
        raise ValueError(f"{masks.grid=} must equal the latents' {grid=}")


def sparse_step(grid: VideoGrid, config: DraftConfig, num_layers: int) -> DraftStep:
    """Returns a step on which all layers are sparse and make new masks."""
    step = constant_step(grid, config)
    return dataclasses.replace(step, dense=np.broadcast_to(step.dense, num_layers))


def first_masks(
    grid: VideoGrid,
    config: DraftConfig,
    *,
    num_layers: int,
    batch: int,
    num_heads: int,
) -> BlockMask:
    """Returns masks to start from, stacked over layers, which share their memory."""
    mask = initial_mask(grid, config, batch=batch, num_heads=num_heads)
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_layers, *leaf.shape)), mask
    )
