"""AdamW as all trainings here use it, and how their states are stored."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from models.files import whole_file
from pallas_kernels.common import make_plain, register_configuration

STATE_FILE = "state.npz"
Parameters = Any  # pytree of arrays


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a loss is minimised. Hashable.

    Attributes:
      learning_rate: Peak of AdamW's.
      warmup_steps: Steps over which it rises from 0. It then falls as a cosine.
      weight_decay: Decay of matrices; biases, norms and tables have none.
      betas: AdamW's moments.
      clip: Largest global norm of a gradient.

    Raises:
      ValueError: The decay is not in [0, 1), or a positive number is not positive.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 400
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0

    def __post_init__(self) -> None:
        make_plain(self)
        if not 0.0 <= self.weight_decay < 1.0:
            raise ValueError(f"{self.weight_decay=!r} must be in [0, 1)")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns AdamW without its learning rate, which every step is given."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(parameters: Parameters) -> Parameters:
    """Marks the matrices, which weight decay pulls towards zero."""

    def is_matrix(path, _leaf) -> bool:
        return any(getattr(key, "key", None) == "kernel" for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)


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
