"""Flow matching for the small model: its state and one step.

A step renders a batch of videos, encodes them and mixes them with noise. It moves the
parameters so that the model predicts `noise - clean` better. The host only draws scene
parameters (`models.mini.feed`). Rendering and the rest are two programs, which compile
side by side.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from draft_jax.pytree import register_named_tuple
from models.diffusion.schedulers import MAX_TIMESTEP
from models.mini.checkpoint import MiniCheckpoint
from models.mini.compilation import Compiled, Programs
from models.mini.data_parallel import (
    SAME,
    SHARED,
    DataParallel,
    mean_gradients,
    own_key,
)
from models.mini.feed import Draw
from models.mini.optimization import (
    OptimizerConfig,
    Parameters,
    TrainState,
    learning_rate_at,
    make_optimizer,
)
from models.mini.renderer import SceneBatch, render_scenes
from models.mini.stages import VideoSize
from models.mini.text import TextEmbedding, Vocabulary
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from pallas_kernels.common import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loss and how it is minimised. Hashable.

    Attributes:
      model: Sizes of the transformer, which attends densely in training.
      optimizer: Settings of AdamW or Muon.
      ema: Decay of the averaged parameters, which are the ones kept.
      caption_dropout: Share of videos trained without caption, for guidance.
      shift: Noise levels are drawn as the sampler with this shift visits them.
      remat: Recompute blocks in the backward pass instead of storing what they
        computed; the result is the same.
      seed: Seed of parameters, noise, and scenes.

    Raises:
      ValueError: A share is not in [0, 1), or the shift is not positive.
    """

    model: WanConfig = dataclasses.field(default_factory=WanConfig.mini)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: float = 0.999
    caption_dropout: float = 0.1
    shift: float = 3.0
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("ema", "caption_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if not self.shift > 0:
            raise ValueError(f"shift={self.shift!r} must be positive")


@register_named_tuple
class Batch(NamedTuple):
    """The data that the host hands to a step."""

    ids: Int[np.ndarray, "B L"]
    lengths: Int[np.ndarray, " B"]
    scenes: SceneBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The fixed parts of a training: structure, codec, sources, and optimizer.

    Args:
      config: The loss and how it is minimised.
      vocabulary: Numbers the captions.
      codec: Trained already.
      sources: From `models.mini.renderer.device_sources`.
      devices: Those that share the videos of a step.
    """

    config: TrainConfig
    vocabulary: Vocabulary
    codec: WanVAECodec
    sources: dict[str, Array]
    devices: DataParallel = dataclasses.field(default_factory=DataParallel.of)

    @functools.cached_property
    def structure(self) -> tuple[Any, Any]:
        """The graph definitions of transformer and text embedding."""
        transformer, text = nnx.eval_shape(lambda: self._modules(0))
        return nnx.graphdef(transformer), nnx.graphdef(text)

    @functools.cached_property
    def fixed(self) -> tuple[Any, dict[str, Array]]:
        """The parameters of the codec and the sources, on all devices."""
        return self.devices.place((nnx.state(self.codec.model), self.sources))

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer; see `make_optimizer`."""
        return make_optimizer(self.config.optimizer)

    def initial_state(self) -> TrainState:
        """Makes random parameters, and averages that start from them."""
        transformer, text = self._modules(self.config.seed)
        return self._state_of(transformer, text, 0)

    def state_from(self, checkpoint: MiniCheckpoint, step: int) -> TrainState:
        """Starts afresh from the averages that a checkpoint has.

        Args:
          checkpoint: Weights of this model's sizes and vocabulary.
          step: Steps that were done; the next draws follow theirs.

        Raises:
          ValueError: It has other sizes or words.
        """
        for name, ours, theirs in (
            ("transformer", self.config.model, checkpoint.transformer.config),
            ("vocabulary", self.vocabulary, checkpoint.vocabulary),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint's {name} is {theirs}; this training needs {ours}"
                )
        return self._state_of(checkpoint.transformer, checkpoint.text_embedding, step)

    def state_of_weights(self, folder: Path, step: int) -> TrainState:
        """Starts afresh from what `save` wrote; see `state_from`."""
        dtype = self.config.model.dtype
        checkpoint = MiniCheckpoint.load(folder / "weights", dtype=dtype)
        return self.state_from(checkpoint, step)

    def batch(self, draw: Draw) -> Batch:
        """Replaces the captions of a drawn batch by their ids."""
        captions, *scenes = draw
        ids, lengths, _ = self.vocabulary.encode(captions)
        return Batch(ids, lengths, SceneBatch(*scenes))

    def rate(self, steps: int, share: float) -> float:
        """Returns the learning rate; see `learning_rate_at`."""
        return learning_rate_at(self.config.optimizer, steps, share)

    @functools.cached_property
    def step(self) -> Any:
        """`train_step` on the devices, jitted; a state's memory is given away."""
        return self.devices.jit(
            functools.partial(train_step, self),
            (SAME, SHARED, SHARED, SHARED, SAME),
            (SAME, SAME),
            donate_argnums=0,
        )

    def lower_step(self, state: TrainState, batch: Batch, size: VideoSize) -> Programs:
        """Returns the programs of a step for such batches, which are to be compiled."""
        graph = nnx.graphdef(self.codec.model)

        def encode(scenes, weights, sources):
            videos = render_scenes(scenes, sources, size)
            latents, _ = nnx.merge(graph, weights).encode_frames(videos)
            return latents

        encoding = self.devices.jit(encode, (SHARED, SAME, SAME), SHARED)
        given = (batch.scenes, *self.fixed)
        latents = jax.eval_shape(encoding, *given)
        arguments = (state, batch.ids, batch.lengths, latents, np.float32(0))
        return encoding.lower(*given), self.step.lower(*arguments)

    def call(
        self, compiled: Compiled, state: TrainState, batch: Batch, rate: float
    ) -> tuple[TrainState, Float[Array, ""]]:
        """Runs a compiled step; returns the new state and the loss before it."""
        encode, step = compiled
        latents = encode(batch.scenes, *self.fixed)
        return step(state, batch.ids, batch.lengths, latents, np.float32(rate))

    def checkpoint(self, parameters: Parameters) -> MiniCheckpoint:
        """Makes a small model of these parameters, ready to be saved."""
        transformer, text = self.structure
        return MiniCheckpoint(
            transformer=nnx.merge(transformer, parameters["transformer"]),
            text_embedding=nnx.merge(text, parameters["text"]),
            vocabulary=self.vocabulary,
            codec=self.codec,
        )

    def save(self, state: TrainState, folder: Path) -> None:
        """Writes the averaged weights to the folder `weights`, all of them or none."""
        partial, whole = folder / "weights.partial", folder / "weights"
        shutil.rmtree(partial, ignore_errors=True)
        self.checkpoint(state.ema).save(partial)
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)

    def _state_of(
        self, transformer: WanTransformer, text: TextEmbedding, step: int
    ) -> TrainState:
        parameters = {"transformer": nnx.state(transformer), "text": nnx.state(text)}
        return TrainState.first(parameters, self.optimizer, step)

    def _modules(self, seed: int) -> tuple[WanTransformer, TextEmbedding]:
        rngs = nnx.Rngs(seed)
        vocabulary, model = self.vocabulary, self.config.model
        return WanTransformer(model, rngs=rngs), TextEmbedding(
            vocabulary.size, vocabulary.max_length, model.text_dim, rngs=rngs
        )


def train_step(
    trainer: Trainer,
    state: TrainState,
    ids: Int[Array | np.ndarray, "B L"],
    lengths: Int[Array | np.ndarray, " B"],
    latents: Float[Array, "B F H W C"],
    learning_rate: Float[Array, ""],
) -> tuple[TrainState, Float[Array, ""]]:
    """Runs one step of the optimizer on the flow-matching loss.

    Within `DataParallel.jit`: it sees the videos of one device.

    Args:
      trainer: Static parts.
      state: Parameters, their averages, moments.
      ids: Words of the captions.
      lengths: Their numbers.
      latents: The videos.
      learning_rate: Learning rate of this step.

    Returns:
      The state after the step, and the loss before it.
    """
    config = trainer.config
    loss_of = functools.partial(
        flow_matching_loss,
        trainer=trainer,
        latents=latents,
        ids=ids,
        lengths=lengths,
        key=own_key(jax.random.fold_in(jax.random.key(config.seed), state.step)),
    )
    loss, gradients = mean_gradients(loss_of, state.parameters)
    after = state.after(gradients, trainer.optimizer, learning_rate, config.ema)
    return after, loss


def flow_matching_loss(
    parameters: Parameters,
    *,
    trainer: Trainer,
    latents: Float[Array, "B F H W C"],
    ids: Int[Array | np.ndarray, "B L"],
    lengths: Int[Array | np.ndarray, " B"],
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Returns the mean squared error of the velocity at random noise levels.

    Source: Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747.
    """
    config = trainer.config
    drop_key, level_key, noise_key = jax.random.split(key, 3)
    batch = latents.shape[0]
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (batch,))
    lengths = jnp.where(dropped, 0, lengths)
    sigma = sample_noise_levels(level_key, batch, config.shift)
    noise = jax.random.normal(noise_key, latents.shape)
    share = sigma[:, None, None, None, None]
    noisy = (1.0 - share) * latents + share * noise
    transformer_graph, text_graph = trainer.structure
    text = nnx.merge(text_graph, parameters["text"])
    transformer = nnx.merge(transformer_graph, parameters["transformer"])
    velocity, _ = transformer(
        WanInputs(noisy, MAX_TIMESTEP * sigma, text(ids, lengths), lengths),
        remat=config.remat,
        unrolled=True,
    )
    return jnp.mean(jnp.square(velocity - (noise - latents)))


def sample_noise_levels(
    key: PRNGKeyArray, batch: int, shift: float
) -> Float[Array, " B"]:
    """Draws noise levels where a sampler of this shift spends its steps.

    Half of them are uniform over the sampler's steps, half logit-normal, which is
    denser in the middle, where the prediction is hardest. Both are stratified over
    the batch.

    Source: Esser et al., arXiv 2403.03206, sections 3.1 and 5.3.2.
    """
    uniform_key, choice_key, order_key = jax.random.split(key, 3)
    offsets = jnp.arange(batch) + jax.random.uniform(uniform_key, (batch,))
    uniform = jnp.clip(offsets / batch, 1e-4, 1.0 - 1e-4)
    normal = jax.nn.sigmoid(jax.scipy.special.ndtri(uniform))
    level = jnp.where(jax.random.bernoulli(choice_key, 0.5, (batch,)), uniform, normal)
    level = jax.random.permutation(order_key, level)
    return shift * level / (1.0 + (shift - 1.0) * level)
