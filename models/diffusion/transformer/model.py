"""A video transformer: what all families make of one run of their blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep

_DENSE = AttentionPlan.dense()

Velocity = Float[Array, "B F H W C_out"]


class Results(NamedTuple):
    """Results of a run; compiled programs make those that are read."""

    velocity: Velocity
    masks: BlockMask | None
    found: Any  # what was captured of each stack of blocks; None without capturing
    residual: Float[Array, "B V E"]


class VideoTransformer(nnx.Module):
    """Methods that follow from `_run` and `map_qkv`, which each family writes."""

    def _run(
        self,
        inputs: Any,
        attention: AttentionPlan,
        step: DraftStep | None,
        masks: BlockMask | None,
        *,
        remat: bool = False,
        capture: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Results:
        """Runs the model; `found` is what `capture` returns."""
        raise NotImplementedError

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
        results = self._run(inputs, attention, step, masks)
        return results.velocity, results.masks, results.residual

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
