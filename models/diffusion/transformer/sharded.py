"""A transformer on several devices, as a model that sampler and pipeline know.

Each device runs the model's own code on its part: rows of the batch, tokens in tiled
order, and in attention heads. All that devices send each other stands in
`token_shards` and `weight_shards`. What goes in and out (latents, text, velocity) is on
all devices; masks are where the heads are, residuals where the tokens are.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from draft_jax import AttentionPlan, BlockMask, DraftStep, VideoGrid
from models.checkpoints.conversion import ChooseShardings
from models.diffusion.interfaces import Conditioning, ImageCondition, TextContext
from models.diffusion.mesh import AXES, GUIDANCE, SEQUENCE, DeviceMesh
from models.diffusion.transformer.model import MapsLayers, Velocity, VideoTransformer
from models.diffusion.transformer.token_shards import TokenShards
from models.diffusion.transformer.weight_shards import WeightShards, state_paths

_ROWS = P(GUIDANCE)
_MASKS = P(None, GUIDANCE, SEQUENCE)  # layers, rows, heads
_TOKENS = P(GUIDANCE, SEQUENCE)  # rows, tokens
_DENSE = AttentionPlan.dense()


class ShardedTransformer(MapsLayers):
    """A video transformer whose work is spread over a mesh; a `KeepsResidual`."""

    def __init__(self, model: VideoTransformer, layout: DeviceMesh) -> None:
        """Puts a model's parameters where the mesh wants them.

        Args:
          model: The transformer. Its parameters are moved, unless they are there.
          layout: The mesh.

        Raises:
          ValueError: There are too few devices, or `sequence` does not divide the
            heads.
        """
        self.model: Any = model
        self.layout, self.mesh = layout, layout.make()
        layout.check_heads(self.num_heads)
        state = nnx.state(model)
        where = weight_shardings(
            {path: leaf.shape for path, leaf in state_paths(state).items()},
            layout,
            type(model).stacks,
        )
        shardings = [where[path] for path in state_paths(state)]
        leaves, tree = jax.tree.flatten(state)
        moved = [jax.device_put(x, s) for x, s in zip(leaves, shardings, strict=True)]
        nnx.update(model, jax.tree.unflatten(tree, moved))

    def __call__(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
        remat: bool = False,
    ) -> tuple[Velocity, BlockMask | None]:
        """Predicts the velocity; see `VideoModel`."""

        def run(model, parts, inputs, masks):
            results = model.run(inputs, attention, step, masks, remat=remat, **parts)
            return results.velocity, results.masks

        out = self._on_devices(run, (_ROWS, _MASKS), (_ROWS, _MASKS), inputs, masks)
        return self._everywhere(out[0]), out[1]

    def call_with_residual(
        self,
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Velocity, BlockMask | None, Float[Array, "B V E"]]:
        """Returns velocity, masks and residual; see `KeepsResidual`."""

        def run(model, parts, inputs, masks):
            results = model.run(inputs, attention, step, masks, **parts)
            return results.velocity, results.masks, results.residual

        velocity, masks, residual = self._on_devices(
            run, (_ROWS, _MASKS), (_ROWS, _MASKS, _TOKENS), inputs, masks
        )
        return self._everywhere(velocity), masks, residual

    def reuse_residual(self, inputs: Any, residual: Float[Array, "B V E"]) -> Velocity:
        """Returns the velocity that follows from a residual; see `KeepsResidual`."""

        def run(model, parts, inputs, residual):
            return model.reuse_residual(inputs, residual, shards=parts["shards"])

        out = self._on_devices(run, (_ROWS, _TOKENS), _ROWS, inputs, residual)
        return self._everywhere(out)

    def residual_shape(self, latent_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one item's residual, with padding."""
        of_model = self.model.residual_shape(latent_shape)
        shards = self._shards(latent_shape)
        if shards is None:
            return of_model
        tokens = shards.padded_tokens
        return jax.ShapeDtypeStruct((tokens, *of_model.shape[1:]), of_model.dtype)

    def map_qkv(
        self,
        function: Callable[[Array, Array, Array], Any],
        inputs: Any,
        *,
        attention: AttentionPlan = _DENSE,
        step: DraftStep | None = None,
        masks: BlockMask | None = None,
    ) -> tuple[Velocity, Any]:
        """Calls a function of every layer's q, k, v; see `VideoModel.map_qkv`.

        It sees whole arrays, which are gathered layer by layer for it. Rows are not
        shared out: each device of `sequence` computes all of them.
        """

        def run(model, parts, inputs, masks):
            shards = parts["shards"]

            def see_whole(*qkv):
                return function(*map(shards.all_heads, qkv))

            return model.map_qkv(
                function if shards is None else see_whole,
                inputs,
                attention=attention,
                step=step,
                masks=masks,
                **parts,
            )

        masks_whole = P(None, None, SEQUENCE)
        return self._on_devices(run, (P(), masks_whole), P(), inputs, masks)

    def put_everywhere(self, tree: Any) -> Any:
        """Puts arrays of a host on all devices; hosts have the same ones."""
        where = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), where), tree)

    def put_masks(self, masks: BlockMask | None) -> BlockMask | None:
        """Puts masks of layers, leaves [..., rows, heads, entries], on the devices."""

        def put(x):
            spec = P(*(None,) * (x.ndim - 3), GUIDANCE, SEQUENCE)
            return jax.device_put(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(put, masks)

    def put_residual(
        self, residual: Float[Array, "rows V E"]
    ) -> Float[Array, "rows V E"]:
        """Puts a residual of `residual_shape` on the devices."""
        return jax.device_put(residual, NamedSharding(self.mesh, _TOKENS))

    def step_inputs(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, ""] | float,
        context: TextContext,
        image: ImageCondition | None,
        embedded_guidance: Float[Array, ""] | None = None,
    ) -> Any:
        """Returns the model's own inputs for one step; see `VideoModel`."""
        return self.model.step_inputs(
            latents, timestep, context, image, embedded_guidance
        )

    @property
    def config(self) -> Hashable:
        """Sizes and dtypes, and the mesh."""
        return self.model.config, self.layout

    @property
    def num_layers(self) -> int:
        """Layers of self-attention."""
        return self.model.num_layers

    @property
    def num_heads(self) -> int:
        """Heads of each layer, those of all devices together."""
        return self.model.num_heads

    @property
    def conditioning(self) -> Conditioning:
        """Rules for requests."""
        return self.model.conditioning

    def grid(self, latent_shape: tuple[int, ...]) -> VideoGrid:
        """Returns the tokens of one latent; see `VideoModel.grid`."""
        return self.model.grid(latent_shape)

    def _shards(self, latent_shape: tuple[int, ...]) -> TokenShards | None:
        """Returns how tokens lie on the devices; None where they are whole."""
        tokens = self.grid(latent_shape).num_visual_tokens
        self.layout.check_tokens(tokens)
        if self.layout.sequence == 1:
            return None
        return TokenShards(axis=SEQUENCE, count=self.layout.sequence, num_tokens=tokens)

    def _on_devices(
        self, run: Callable, in_specs: tuple[P, P], out_specs: Any, *arguments: Any
    ) -> Any:
        """Runs `run(model, parts, *arguments)` on each device's part of all.

        `parts` are the arguments of `VideoTransformer.run` that say which part it is.
        """
        inputs, *others = arguments
        if in_specs[0] == _ROWS:
            self.layout.check_rows(len(inputs.latents))
            # Latents are joined to rows on each device, which then takes its own:
            # XLA would share out the copies and send the rows to where they belong.
            inputs = jax.tree.map(self._everywhere, inputs)
        structure, parameters = nnx.split(self.model)
        stacks = type(self.model).stacks
        paths = state_paths(parameters)
        shapes = {path: leaf.shape for path, leaf in paths.items()}
        weights = spread_weights(shapes, self.layout, stacks)
        specs = [P() if weights is None else weights.spec(path) for path in paths]
        parts = {"shards": self._shards(inputs.latents.shape), "weights": weights}

        def run_part(parameters, *arguments):
            if weights is not None:
                parameters = weights.gather_rest(parameters, stacks)
            return run(nnx.merge(structure, parameters), parts, *arguments)

        tree = jax.tree.structure(parameters)
        return jax.shard_map(
            run_part,
            mesh=self.mesh,
            in_specs=(jax.tree.unflatten(tree, specs), *in_specs),
            out_specs=out_specs,
            # Text is equal on all devices of `sequence`, which the types cannot say.
            check_vma=False,
        )(parameters, inputs, *others)

    def _everywhere(self, x: Array) -> Array:
        """Returns an array that all devices have."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))


def weight_shardings(
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    layout: DeviceMesh,
    stacks: tuple[str, ...],
) -> dict[tuple[str, ...], NamedSharding]:
    """Returns where a model's parameters lie, by their paths.

    Args:
      shapes: Shape of each by its path.
      layout: The mesh.
      stacks: Attributes of the model whose parameters have a leading layer axis.
    """
    mesh, weights = layout.make(), spread_weights(shapes, layout, stacks)
    return {
        path: NamedSharding(mesh, P() if weights is None else weights.spec(path))
        for path in shapes
    }


def shardings_of(
    layout: DeviceMesh | None, model: type[VideoTransformer]
) -> ChooseShardings | None:
    """Returns what tells `load_parameters` where the weights of a model lie."""
    if layout is None:
        return None
    return functools.partial(weight_shardings, layout=layout, stacks=model.stacks)


def spread_weights(
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    layout: DeviceMesh,
    stacks: tuple[str, ...],
) -> WeightShards | None:
    """Returns which axes of parameters are spread; None if none is."""
    if not layout.shard_weights:
        return None
    return WeightShards.of(
        shapes, stacks=stacks, mesh_axes=AXES, count=layout.num_devices
    )
