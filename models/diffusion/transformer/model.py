"""A video transformer: what all families make of one run of their blocks."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep
from models.diffusion.transformer.token_shards import TokenShards
from models.diffusion.transformer.weight_shards import WeightShards

_DENSE = AttentionPlan.dense()

Velocity = Float[Array, "B F H W C_out"]


class Results(NamedTuple):
    """Results of a run; compiled programs make those that are read."""

    velocity: Velocity
    masks: BlockMask | None
    found: Any  # what was captured of each stack of blocks; None without capturing
    residual: Float[Array, "B V E"]


class MapsLayers(nnx.Module):
    """Methods that follow from `map_qkv`."""

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Velocity, Any]:
        """Calls a function of every layer's q, k, v; see `VideoModel.map_qkv`."""
        raise NotImplementedError

    def map_qk(
        self,
        function: Callable[[Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Velocity, Any]:
        """Calls a function of every layer's q and k; see `VideoModel.map_qk`."""
        return self.map_qkv(
            lambda q, k, _: function(q, k),
            inputs,
            attention=attention,
            step=step,
            masks=masks,
        )

    def capture_qk(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Float[Array, "layers B T N D"], Float[Array, "layers B T N D"]]:
        """Returns queries and keys that every layer's self-attention sees.

        Takes what `__call__` takes. All layers are held at once, so it is for small
        models or short videos.

        Returns:
          q and k after norm and rotary embedding: visual tokens in tiled order, then
          the text where it is in the sequence.
        """
        _, captured = self.map_qk(
            lambda q, k: (q, k), inputs, attention=attention, step=step, masks=masks
        )
        return captured


class VideoTransformer(MapsLayers):
    """Methods that follow from `run` and `map_qkv`, which each family writes.

    Attributes:
      stacks: Attributes of stacks of blocks, whose parameters have a leading layer axis
        and which `run_blocks` runs.
    """

    stacks: ClassVar[tuple[str, ...]]

    def run(
        self,
        inputs: Any,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool = False,
        capture: Callable[[dict[str, Any]], Any] | None = None,
        shards: TokenShards | None = None,
        weights: WeightShards | None = None,
    ) -> Results:
        """Runs the model; see `__call__` of the families.

        Args:
          inputs: The model's own.
          attention: Dense or draft attention.
          step: The schedule's entry for this step.
          masks: Masks that the step before returned.
          remat: Recompute each block in the backward pass.
          capture: Called in each block with what it has sown.
          shards: Within `jax.shard_map`, the device's part of the tokens; inputs are
            whole, masks are those of the device's heads, and so are q and k that
            `capture` sees. The residual is that of the device's tokens. None for
            whole sequences.
          weights: How the weights of stacks lie on devices; None if they are whole.

        Returns:
          Results, of which `found` is what `capture` returns for each stack.
        """
        raise NotImplementedError

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        shards: TokenShards | None = None,
        weights: WeightShards | None = None,
    ) -> tuple[Velocity, Any]:
        """Calls a function of every layer's q, k, v; see `VideoModel.map_qkv`.

        With `shards` they are of the device's heads; see `run`.
        """
        raise NotImplementedError

    def call_with_residual(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Velocity, BlockMask | None, Float[Array, "B V E"]]:
        """Returns velocity, masks and residual; see `KeepsResidual`.

        The residual is that of the video's tokens, without a reference and the text.
        """
        results = self.run(inputs, attention, step, masks)
        return results.velocity, results.masks, results.residual
