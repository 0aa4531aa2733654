"""Training of the small model's codec: its loss, its state and one step.

A step renders a batch of videos and moves the autoencoder so that it restores them
better. At the end the latents of other videos are measured, so that every channel that
the transformer sees has mean 0 and variance 1.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from models.files import whole_file
from models.media.metrics import psnr
from models.media.video import write_json
from models.mini.autoencoder import (
    autoencoder_config,
    describe_autoencoder,
    load_autoencoder,
    save_autoencoder,
    with_statistics,
)
from models.mini.compilation import Compiled, Programs
from models.mini.data_parallel import (
    SAME,
    SHARED,
    DataParallel,
    mean_gradients,
    own_key,
)
from models.mini.feed import Draw, Feed
from models.mini.linear_start import start_linear
from models.mini.optimization import (
    OptimizerConfig,
    TrainState,
    learning_rate_at,
    make_optimizer,
)
from models.mini.renderer import SceneBatch, render_scenes
from models.mini.stages import VideoSize
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.config import WanVAEConfig
from pallas_kernels.common import make_plain, register_configuration

HELD_OUT_SEED = 1_000_003  # apart from every training's
CODEC_FILE = "codec.safetensors"
KINDS = ("procedural", "pictures", "clips")
# Batches in [-1, 1], and the kind of each video: a name of `KINDS`.
Videos = Sequence[tuple[Float[np.ndarray, "B T Y X 3"], list[str]]]


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The loss of an autoencoder and how it is minimised. Hashable.

    Attributes:
      model: Sizes of the autoencoder.
      optimizer: AdamW's settings.
      ema: Decay of the averaged parameters, which are the ones kept.
      edges: Weight of the error of differences between neighbours, in frames, rows
        and columns, beside the errors of pixels.
      divergence: Weight of the Kullback-Leibler divergence of latents from unit
        Gaussians. It keeps them smooth enough for a transformer to make.
      seed: Seed of parameters, noise, and scenes.

    Raises:
      ValueError: A weight is negative, or the decay is not in [0, 1).
    """

    model: WanVAEConfig = dataclasses.field(
        default_factory=lambda: autoencoder_config(attention_dtype="bfloat16")
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-4, warmup_steps=300, weight_decay=0.0
        )
    )
    ema: float = 0.999
    edges: float = 0.5
    divergence: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("edges", "divergence"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema={self.ema!r} must be in [0, 1)")


@dataclasses.dataclass(frozen=True, eq=False)
class CodecTrainer:
    """The fixed parts of a codec's training.

    Args:
      config: The loss and how it is minimised.
      sources: From `models.mini.renderer.device_sources`.
      devices: Those that share the videos of a step.
    """

    config: CodecConfig
    sources: dict[str, Array]
    devices: DataParallel = dataclasses.field(default_factory=DataParallel.of)

    @functools.cached_property
    def structure(self) -> Any:
        """The graph definition of the autoencoder."""
        return nnx.graphdef(nnx.eval_shape(lambda: self._module(0)))

    @functools.cached_property
    def fixed(self) -> dict[str, Array]:
        """The sources, on all devices."""
        return self.devices.place(self.sources)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer; see `make_optimizer`."""
        return make_optimizer(self.config.optimizer)

    @functools.cached_property
    def videos_of_statistics(self) -> Videos:
        """Videos whose latents are measured; rendered once."""
        size = VideoSize(frames=9, height=96, width=128, batch=16)
        return held_out_videos(self.sources, size, batches=4, offset=100)

    def initial_state(self) -> TrainState:
        """Makes a codec that is nearly linear; see `start_linear`."""
        videos = np.concatenate([batch for batch, _ in self.videos_of_statistics])
        return self._state_of(start_linear(self._module(self.config.seed), videos), 0)

    def state_of_weights(self, folder: Path, step: int) -> TrainState:
        """Starts afresh from what `save` wrote.

        Args:
          folder: Its `codec.safetensors` is read.
          step: Steps that were done; the next draws follow theirs.

        Raises:
          ConversionError: The weights are of other sizes.
        """
        codec = load_autoencoder(folder / CODEC_FILE, self.config.model)
        return self._state_of(codec.model, step)

    def batch(self, draw: Draw) -> SceneBatch:
        """Leaves the captions of a drawn batch away."""
        _, *scenes = draw
        return SceneBatch(*scenes)

    def rate(self, steps: int, share: float) -> float:
        """Returns the learning rate; see `learning_rate_at`."""
        return learning_rate_at(self.config.optimizer, steps, share)

    def lower_step(
        self, state: TrainState, batch: SceneBatch, size: VideoSize
    ) -> Programs:
        """Returns the programs of a step for such batches, which are to be compiled."""

        def render(scenes, sources):
            return render_scenes(scenes, sources, size)

        rendering = self.devices.jit(render, (SHARED, SAME), SHARED)
        step = self.devices.jit(
            functools.partial(codec_step, self),
            (SAME, SHARED, SAME),
            (SAME, SAME),
            donate_argnums=0,
        )
        videos = jax.eval_shape(rendering, batch, self.fixed)
        arguments = (state, videos, np.float32(0))
        return rendering.lower(batch, self.fixed), step.lower(*arguments)

    def call(
        self, compiled: Compiled, state: TrainState, batch: SceneBatch, rate: float
    ) -> tuple[TrainState, Float[Array, ""]]:
        """Runs a compiled step; returns the new state and the loss before it."""
        render, step = compiled
        return step(state, render(batch, self.fixed), np.float32(rate))

    def module(self, state: TrainState) -> WanVAE:
        """Returns the autoencoder of the averaged parameters, in float32."""
        model = nnx.merge(self.structure, state.ema)
        exact = dataclasses.replace(
            self.config.model, dtype="float32", attention_dtype=None
        )
        return _with_config(model, exact)

    def save(self, state: TrainState, folder: Path) -> None:
        """Writes the codec with the statistics of its latents.

        codec.json has what "codec" has in the config.json of a checkpoint.
        """
        model = self.module(state)
        statistics = latent_statistics(model, self.videos_of_statistics)
        config = with_statistics(model, *statistics)
        write_json(folder / "codec.json", describe_autoencoder(config))
        with whole_file(folder / CODEC_FILE) as temporary:
            save_autoencoder(temporary, model)

    def _state_of(self, model: WanVAE, step: int) -> TrainState:
        return TrainState.first(nnx.state(model), self.optimizer, step)

    def _module(self, seed: int) -> WanVAE:
        return WanVAE(self.config.model, rngs=nnx.Rngs(seed))


def codec_step(
    trainer: CodecTrainer,
    state: TrainState,
    videos: Float[Array, "B T Y X 3"],
    learning_rate: Float[Array, ""],
) -> tuple[TrainState, Float[Array, ""]]:
    """Runs one step of AdamW on the loss of restored videos.

    Within `DataParallel.jit`: it sees the videos of one device.

    Args:
      trainer: Static parts.
      state: Parameters and moments.
      videos: Pixels in [-1, 1].
      learning_rate: Learning rate of this step.

    Returns:
      The state after the step, and the loss before it.
    """
    key = own_key(jax.random.fold_in(jax.random.key(trainer.config.seed), state.step))

    def loss_of(parameters):
        model = nnx.merge(trainer.structure, parameters)
        return restoration_loss(model, videos, key, trainer.config)

    loss, gradients = mean_gradients(loss_of, state.parameters)
    ema = trainer.config.ema
    return state.after(gradients, trainer.optimizer, learning_rate, ema), loss


def restoration_loss(
    model: WanVAE, videos: Float[Array, "B T Y X 3"], key: Array, config: CodecConfig
) -> Float[Array, ""]:
    """Returns the loss of videos that went through the autoencoder.

    The mean absolute and twice the mean squared error of pixels, the absolute error of
    differences between neighbours, and the divergence of the latents.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114, for
    the divergence and the noise on latents.
    """
    mean, log_variance, _ = model.moments(videos)
    log_variance = jnp.clip(log_variance, -30.0, 20.0)
    noise = jax.random.normal(key, mean.shape)
    latents = mean + jnp.exp(0.5 * log_variance) * noise
    restored, _ = model.pixels(latents)
    error = restored - videos
    pixels = jnp.abs(error).mean() + 2.0 * jnp.square(error).mean()
    steps = [jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2, 3)]
    divergence = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
    return (
        pixels
        + config.edges * sum(steps) / len(steps)
        + config.divergence * 0.5 * divergence.mean()
    )


def held_out_videos(
    sources: dict[str, Array],
    size: VideoSize,
    *,
    batches: int,
    offset: int = 0,
    seed: int = HELD_OUT_SEED,
) -> Videos:
    """Renders videos that no training draws.

    Args:
      sources: From `device_sources`.
      size: Frames, sides and videos of each batch.
      batches: Number of batches.
      offset: Number of the first batch.
      seed: Seed of the scenes.

    Returns:
      Videos in [-1, 1], and the kind of each: a name of `KINDS`.
    """
    render = jax.jit(functools.partial(render_scenes, size=size))
    rendered = []
    with Feed(seed, workers=0) as feed:
        for index in range(batches):
            _, *scenes = feed.get(offset + index, lambda step: size)
            counts = [len(next(iter(kind.values()), ())) for kind in scenes]
            kinds = np.repeat(KINDS, counts).tolist()
            videos = render(SceneBatch(*scenes), sources)
            rendered.append((np.asarray(videos), kinds))
    return rendered


def latent_statistics(
    model: WanVAE, videos: Videos
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Returns mean and standard deviation of the latents, by channel."""
    latents = np.concatenate([np.asarray(_encode(model, batch)) for batch, _ in videos])
    axes = tuple(range(latents.ndim - 1))
    return latents.mean(axes), latents.std(axes)


def measure_codec(model: WanVAE, videos: Videos) -> dict[str, Any]:
    """Returns the PSNR in dB of restored videos: of all, the worst, and by kind.

    Args:
      model: The autoencoder.
      videos: From `held_out_videos`.
    """
    decibels: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for batch, kinds in videos:
        restored = np.asarray(_restore(model, batch))
        for ours, theirs, kind in zip(restored, batch, kinds, strict=True):
            decibels[kind].append(psnr(ours / 2 + 0.5, theirs / 2 + 0.5))
    everything = [value for values in decibels.values() for value in values]
    return {
        "videos": len(everything),
        "psnr_db_mean": float(np.mean(everything)),
        "psnr_db_min": float(np.min(everything)),
        "psnr_db": {
            kind: float(np.mean(values)) for kind, values in decibels.items() if values
        },
    }


@nnx.jit
def _encode(model: WanVAE, videos: Array | np.ndarray) -> Array:
    return model.encode_frames(jnp.asarray(videos))[0]


@nnx.jit
def _restore(model: WanVAE, videos: Array | np.ndarray) -> Array:
    return model.decode_frames(_encode(model, videos))[0]


def _with_config(model: WanVAE, config: WanVAEConfig) -> WanVAE:
    """Returns a model of the same parameters that computes as another config says."""
    fresh = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(fresh), nnx.state(model))
