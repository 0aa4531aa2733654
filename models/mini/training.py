"""Flow matching for the small model: its state, one step, and how both are stored.

A step renders a batch of videos, encodes them and mixes them with noise. It moves the
parameters so that the model predicts `noise - clean` better. All of it is one compiled
program; the host only draws scene parameters (`models.mini.feed`).
"""

import dataclasses
import functools
import json
from collections.abc import Callable
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
from models.mini.codec import LinearCodec
from models.mini.feed import Draw, Feed
from models.mini.renderer import render_batch
from models.mini.text import TextEmbedding, Vocabulary
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer
from pallas_kernels.common import make_plain, register_configuration

STATE_FILE = "state.npz"
FIT_BATCHES, FIT_BATCH, FIT_FRAMES = 8, 32, 8  # videos that the codec is fitted to
FIT_SEED = 1_000_003  # apart from every training step's
Parameters = Any  # {"transformer": nnx.State, "text": nnx.State}


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loss and how it is minimised. Hashable.

    Attributes:
      model: Sizes of the transformer, which attends densely in training.
      height: Rows of pixels of the training videos.
      width: Columns of pixels.
      learning_rate: Peak of AdamW's.
      warmup_steps: Steps over which it rises from 0. It then falls as a cosine.
      weight_decay: Decay of matrices; biases, norms and tables have none.
      betas: AdamW's moments.
      clip: Largest global norm of a gradient.
      ema: Decay of the averaged parameters, which are the ones kept.
      caption_dropout: Share of videos trained without caption, for guidance.
      shift: Noise levels are drawn as the sampler with this shift visits them.
      whitening: See `LinearCodec.fit`.
      remat: Recompute blocks in the backward pass instead of storing what they
        computed; the result is the same.
      seed: Seed of parameters, noise, and scenes.

    Raises:
      ValueError: A share is not in [0, 1), or a positive number is not positive.
    """

    model: WanConfig = dataclasses.field(default_factory=WanConfig.mini)
    height: int = 96
    width: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 400
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    caption_dropout: float = 0.1
    shift: float = 3.0
    whitening: float = 0.5
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("ema", "caption_dropout", "weight_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        for name in ("height", "width", "learning_rate", "clip", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")


@register_named_tuple
class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    parameters: Parameters
    ema: Parameters
    optimizer: optax.OptState


@register_named_tuple
class Batch(NamedTuple):
    """The data that the host hands to a step."""

    ids: Int[np.ndarray, "B L"]
    lengths: Int[np.ndarray, " B"]
    procedural: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    clips: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The fixed parts of a training: structure, codec, sources, and optimizer.

    Args:
      config: The loss and how it is minimised.
      vocabulary: Numbers the captions.
      codec: Fitted already.
      sources: From `models.mini.renderer.device_sources`.
    """

    config: TrainConfig
    vocabulary: Vocabulary
    codec: LinearCodec
    sources: dict[str, Array]

    @functools.cached_property
    def structure(self) -> tuple[Any, Any]:
        """The graph definitions of transformer and text embedding."""
        transformer, text = nnx.eval_shape(lambda: self._modules(0))
        return nnx.graphdef(transformer), nnx.graphdef(text)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer: AdamW without its learning rate, which every step is given."""
        config = self.config
        return optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.scale_by_adam(*config.betas),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
        )

    def initial_state(self) -> TrainState:
        """Makes random parameters, and averages that start from them."""
        transformer, text = self._modules(self.config.seed)
        parameters = {"transformer": nnx.state(transformer), "text": nnx.state(text)}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=parameters,
            ema=jax.tree.map(jnp.copy, parameters),
            optimizer=self.optimizer.init(parameters),
        )

    def batch(self, draw: Draw) -> Batch:
        """Replaces the captions of a drawn batch by their ids."""
        captions, *scenes = draw
        ids, lengths, _ = self.vocabulary.encode(captions)
        return Batch(ids, lengths, *scenes)

    def compile_step(self, state: TrainState, batch: Batch) -> Callable:
        """Compiles the step for batches shaped as this one; see `train_step`."""

        def step(state, batch, learning_rate, codec, sources):
            return train_step(self, state, batch, learning_rate, codec, sources)

        compiled = (
            jax.jit(step, donate_argnums=0)
            .lower(state, batch, jnp.float32(0), self.codec, self.sources)
            .compile()
        )

        def run(state: TrainState, batch: Batch, learning_rate: float):
            rate = jnp.float32(learning_rate)
            return compiled(state, batch, rate, self.codec, self.sources)

        return run

    def checkpoint(self, parameters: Parameters) -> MiniCheckpoint:
        """Makes a small model of these parameters, ready to be saved."""
        transformer, text = self.structure
        return MiniCheckpoint(
            transformer=nnx.merge(transformer, parameters["transformer"]),
            text_embedding=nnx.merge(text, parameters["text"]),
            vocabulary=self.vocabulary,
            codec=self.codec,
        )

    def _modules(self, seed: int) -> tuple[WanTransformer, TextEmbedding]:
        rngs = nnx.Rngs(seed)
        vocabulary, model = self.vocabulary, self.config.model
        return WanTransformer(model, rngs=rngs), TextEmbedding(
            vocabulary.size, vocabulary.max_length, model.text_dim, rngs=rngs
        )


def decayed(parameters: Parameters) -> Parameters:
    """Marks the matrices, which weight decay pulls towards zero."""

    def is_matrix(path, _leaf) -> bool:
        return any(getattr(key, "key", None) == "kernel" for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)


def train_step(
    trainer: Trainer,
    state: TrainState,
    batch: Batch,
    learning_rate: Float[Array, ""],
    codec: LinearCodec,
    sources: dict[str, Array],
) -> tuple[TrainState, Float[Array, ""]]:
    """Runs one step of AdamW on the flow-matching loss.

    Args:
      trainer: Static parts.
      state: Parameters, their averages, moments.
      batch: Captions and scenes.
      learning_rate: Learning rate of this step.
      codec: `trainer.codec`, as an argument so that it is no compiled constant.
      sources: `trainer.sources`, likewise.

    Returns:
      The state after the step, and the loss before it.
    """
    config = trainer.config
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    videos = render_batch(
        batch.procedural,
        batch.pictures,
        batch.clips,
        sources,
        height=config.height,
        width=config.width,
    )
    latents = codec.encode(videos)
    loss_of = functools.partial(
        flow_matching_loss,
        trainer=trainer,
        latents=latents,
        ids=batch.ids,
        lengths=batch.lengths,
        key=key,
    )
    loss, gradients = jax.value_and_grad(loss_of)(state.parameters)
    updates, optimizer = trainer.optimizer.update(
        gradients, state.optimizer, state.parameters
    )
    parameters = jax.tree.map(
        lambda value, update: value - learning_rate * update, state.parameters, updates
    )
    # Early on the average is short, or it would remember the random start.
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(
        lambda mean, value: decay * mean + (1.0 - decay) * value, state.ema, parameters
    )
    # One broken video must not break the model: such a step changes nothing.
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradients)]
    usable = jnp.isfinite(sum(squares))
    new, old = (parameters, ema, optimizer), state[1:]
    changed = jax.tree.map(
        lambda ours, theirs: jnp.where(usable, ours, theirs), new, old
    )
    return TrainState(state.step + 1, *changed), loss


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


def learning_rate_at(config: TrainConfig, step: int, share: float) -> float:
    """Returns a rate that rises linearly, then falls to zero as a cosine.

    Args:
      config: Peak and length of the rise.
      step: Steps done.
      share: Share of the training that is over, by steps or by time.
    """
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = 0.5 * (1.0 + np.cos(np.pi * min(max(share, 0.0), 1.0)))
    return float(config.learning_rate * rise * fall)


def fit_codec(config: TrainConfig, sources: dict[str, Array]) -> LinearCodec:
    """Fits the codec's components to videos like those of the training."""
    render = jax.jit(
        functools.partial(render_batch, height=config.height, width=config.width)
    )
    with Feed(config.seed, workers=0) as feed:
        draws = [
            feed.get(FIT_SEED + index, batch=FIT_BATCH, frames=FIT_FRAMES)
            for index in range(FIT_BATCHES)
        ]
    return LinearCodec.fit(
        (render(*draw[1:], sources) for draw in draws),
        channels=config.model.in_channels,
        whitening=config.whitening,
    )


def save_state(folder: Path, state: TrainState, progress: dict[str, Any]) -> None:
    """Writes a file for `load_state`; half a file never replaces a whole one.

    Args:
      folder: Folder to write to, made if it does not exist.
      state: Everything a step changes.
      progress: JSON values, such as the losses so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.device_get(jax.tree.leaves(state))
    arrays = {f"leaf_{i:05}": leaf for i, leaf in enumerate(leaves)}
    partial = folder / f".{STATE_FILE}.partial.npz"
    np.savez(partial, progress=np.array(json.dumps(progress)), **arrays)
    partial.replace(folder / STATE_FILE)


def load_state(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads a file that `save_state` wrote.

    Args:
      folder: Folder that it lies in.
      like: A state of the same model, such as `Trainer.initial_state`.

    Raises:
      FileNotFoundError: The folder holds no state.
      ValueError: The state is of a model of other sizes.
    """
    leaves, structure = jax.tree.flatten(like)
    with np.load(folder / STATE_FILE) as arrays:
        names = sorted(name for name in arrays.files if name != "progress")
        stored = [arrays[name] for name in names]
        progress = json.loads(str(arrays["progress"]))
    if [leaf.shape for leaf in stored] != [leaf.shape for leaf in leaves]:
        raise ValueError(
            f"{folder / STATE_FILE} belongs to another configuration: the shapes of "
            f"its {len(stored)} arrays differ from those of this model's {len(leaves)}"
        )
    state = [
        jnp.asarray(value, leaf.dtype)
        for value, leaf in zip(stored, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, state), progress
