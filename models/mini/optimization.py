"""AdamW and Muon as the trainings here use them, and how their states are stored."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from draft_jax.pytree import register_named_tuple
from models.files import whole_file
from models.mini.muon import scale_by_muon
from pallas_kernels.common import make_plain, register_configuration

STATE_FILE = "state.npz"
Parameters = Any  # pytree of arrays
OptimizerKind = Literal["adamw", "muon"]


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a loss is minimised. Hashable.

    Attributes:
      kind: "adamw", or "muon", which moves the kernels of a transformer's blocks by
        Muon and all else by AdamW.
      learning_rate: Peak of the rate of both.
      warmup_steps: Steps over which it rises from 0. It then falls as a cosine.
      weight_decay: Decay of matrices; biases, norms and tables have none.
      betas: AdamW's moments.
      momentum: Muon's.
      clip: Largest global norm of a gradient.

    Raises:
      ValueError: The kind is unknown, the decay or Muon's momentum is not in [0, 1), or
        a positive number is not positive.
    """

    kind: OptimizerKind = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 400
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        make_plain(self)
        if self.kind not in get_args(OptimizerKind):
            raise ValueError(f"kind={self.kind!r} must be 'adamw' or 'muon'")
        for name in ("weight_decay", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")


@register_named_tuple
class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: Steps done.
      parameters: The newest.
      ema: Their average, which is kept.
      optimizer: Its moments.
    """

    step: Int[Array, ""]
    parameters: Parameters
    ema: Parameters
    optimizer: optax.OptState

    @classmethod
    def first(
        cls, parameters: Parameters, optimizer: optax.GradientTransformation, step: int
    ) -> "TrainState":
        """Starts an optimizer afresh, and an average from the parameters.

        Args:
          parameters: Of the model.
          optimizer: From `make_optimizer`.
          step: Steps that were done before.
        """
        return cls(
            step=jnp.asarray(step, jnp.int32),
            parameters=parameters,
            ema=jax.tree.map(jnp.copy, parameters),
            optimizer=optimizer.init(parameters),
        )

    def after(
        self,
        gradients: Parameters,
        optimizer: optax.GradientTransformation,
        rate: Float[Array, ""],
        decay: float,
    ) -> "TrainState":
        """Returns the state after a step.

        Args:
          gradients: Of the loss, at these parameters. One broken video must not break
            the model: where a gradient is not finite, only the step is counted.
          optimizer: The one that the state began with.
          rate: Learning rate.
          decay: Of the average; see `move_average`.
        """
        updates, moments = optimizer.update(gradients, self.optimizer, self.parameters)
        parameters = step_down(self.parameters, updates, rate)
        ema = move_average(self.ema, parameters, self.step, decay)
        new, old = (parameters, ema, moments), self[1:]
        changed = choose_tree(is_usable(gradients), new, old)
        return TrainState(self.step + 1, *changed)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optimizer without its learning rate, which every step is given."""
    scale = optax.scale_by_adam(*config.betas)
    if config.kind == "muon":
        scale = optax.partition(
            {"adamw": scale, "muon": scale_by_muon(config.momentum)}, optimizer_kinds
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(parameters: Parameters) -> Parameters:
    """Marks the matrices, which weight decay pulls towards zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _leaf: "kernel" in _names(path), parameters
    )


def optimizer_kinds(parameters: Parameters) -> Parameters:
    """Says what moves each parameter where `OptimizerConfig.kind` is "muon".

    Muon moves the kernels of blocks. Embeddings, text, head, modulation, norms and
    biases are AdamW's.

    Raises:
      ValueError: No parameter would be Muon's.
    """

    def kind(path, _leaf) -> OptimizerKind:
        return "muon" if {"blocks", "kernel"} <= _names(path) else "adamw"

    kinds = jax.tree_util.tree_map_with_path(kind, parameters)
    if "muon" not in jax.tree.leaves(kinds):
        raise ValueError(
            "kind='muon' needs kernels of a transformer's blocks, which this model "
            "does not have; use kind='adamw'"
        )
    return kinds


def _names(path: Sequence[Any]) -> set[Any]:
    return {getattr(key, "key", None) for key in path}


def is_usable(gradients: Parameters) -> Bool[Array, ""]:
    """Returns whether all gradients are finite: whether a step may change anything."""
    # The norm that clipping needs, too: XLA then computes it once.
    return jnp.isfinite(optax.tree.norm(gradients))


def learning_rate_at(config: OptimizerConfig, steps: int, share: float) -> float:
    """Returns a rate that rises linearly, then falls to zero as a cosine.

    Args:
      config: Peak and length of the rise.
      steps: Steps done since the optimizer started.
      share: Share of the training that is over, by steps or by time.
    """
    rise = min(1.0, (steps + 1) / max(config.warmup_steps, 1))
    fall = 0.5 * (1.0 + np.cos(np.pi * min(max(share, 0.0), 1.0)))
    return float(config.learning_rate * rise * fall)


def step_down(
    parameters: Parameters, updates: Parameters, rate: Float[Array, ""]
) -> Parameters:
    """Moves parameters against the updates, times the learning rate."""
    return jax.tree.map(
        lambda value, update: value - rate * update, parameters, updates
    )


def move_average(
    average: Parameters, parameters: Parameters, step: Int[Array, ""], decay: float
) -> Parameters:
    """Moves an average of parameters towards the newest.

    Args:
      average: The average so far.
      parameters: The newest.
      step: Number of the step. Early on the average is short, or it would remember the
        start.
      decay: Weight of the average, at most.
    """
    share = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(
        lambda mean, value: share * mean + (1.0 - share) * value, average, parameters
    )


def choose_tree(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns the new tree where the condition holds, else the old one."""
    return jax.tree.map(lambda ours, its: jnp.where(condition, ours, its), new, old)


def save_state(folder: Path, state: Any, progress: dict[str, Any]) -> None:
    """Writes a file for `load_state`; half a file never replaces a whole one.

    Args:
      folder: Folder to write to, made if it does not exist.
      state: Everything a step changes.
      progress: JSON values, such as the losses so far.
    """
    leaves = jax.device_get(jax.tree.leaves(state))
    arrays = {f"leaf_{i:05}": leaf for i, leaf in enumerate(leaves)}
    with whole_file(folder / STATE_FILE) as temporary:
        np.savez(temporary, progress=np.array(json.dumps(progress)), **arrays)


def load_state(folder: Path, like: Any) -> tuple[Any, dict[str, Any]]:
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
