"""Low-rank adapters (LoRA), merged into a checkpoint's weights as they are loaded.

An adapter stores two thin matrices for a weight W of [out, in]; the merged weight is

    W + scale * alpha / rank * (up @ down)

Files differ in how they spell the names; see `_ROLES` and `_PREFIXES`. Each weight is
merged when it is read, on the device. So a model that is loaded array by array needs no
memory for its adapters.

Source: Hu et al., arXiv 2106.09685; the spellings are those of diffusers and PEFT,
of kohya's sd-scripts and musubi-tuner, and of the original models' own names.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints.conversion import ConversionError, file_of
from models.checkpoints.safetensors_io import CheckpointError, load_safetensors

# What a key's ending says of its tensor. `diff` and `diff_b` are whole differences
# of a weight and a bias, which some files hold beside thin matrices.
_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
_PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
)
_METADATA_KEY = "lora_adapter_metadata"  # diffusers writes PEFT's settings there


class _Part(NamedTuple):
    """One tensor of an adapter."""

    key: str
    module: str  # as the key spells it
    value: Any


_Parts = Mapping[str, _Part]  # of one module of the model, by role


class _Delta(NamedTuple):
    """The term added to one weight: `factor * up @ down`, or `factor * diff`."""

    factor: float
    up: Any
    down: Any | None  # None if `up` is the whole difference


class MergedArray:
    """A weight with its adapters, merged in float32 when it is read.

    Attributes:
      shape: Shape of the weight.
      dtype: float32, whatever the weight's is.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, weight: Any, deltas: Sequence[_Delta]) -> None:
        self.shape = tuple(weight.shape)
        self._weight = weight
        self._deltas = tuple(deltas)

    def __jax_array__(self) -> jax.Array:
        merged = jnp.asarray(self._weight).astype(jnp.float32)
        for delta in self._deltas:
            merged = _add(merged, delta)
        return merged

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.__jax_array__(), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The strength of an adapter whose file has no `alpha` tensors."""

    alpha: float | None = None  # the rank if None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()  # exceptions by module
    by_root: bool = False  # divide by the root of the rank, not by the rank

    def alpha_of(self, module: str, rank: int) -> float:
        for pattern, alpha in self.patterns:
            if pattern.fullmatch(module):
                return alpha
        return float(rank) if self.alpha is None else self.alpha


@dataclasses.dataclass(frozen=True)
class MergedWeights(Mapping[str, Any]):
    """A checkpoint's weights with adapters; see `merge_lora`.

    Attributes:
      weights: The weights before the adapters.
      deltas: The terms that adapters add, by key of `weights`.
    """

    weights: Mapping[str, Any]
    deltas: Mapping[str, Sequence[_Delta]]

    def __getitem__(self, key: str) -> Any:
        weight = self.weights[key]
        return MergedArray(weight, self.deltas[key]) if key in self.deltas else weight

    def file_of(self, key: str) -> Path | None:
        """Returns the file of the weight, if `weights` knows it."""
        return file_of(self.weights, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def merge_lora(
    weights: Mapping[str, Any],
    lora: str | os.PathLike | Mapping[str, Any],
    names: Mapping[str, str],
    *,
    scale: float = 1.0,
) -> MergedWeights:
    """Adds an adapter to a checkpoint's weights.

    Args:
      weights: Arrays by key, as published: linear layers are [out, in]. Another
        `MergedWeights` adds one adapter to others.
      lora: The adapter's `.safetensors` file, or arrays by key.
      names: For each way to spell a module or a parameter, the one in `weights`, up
        to ".weight" and ".bias".
      scale: Strength of the adapter; 0 leaves the weights as they are, 1 is what it
        was trained for.

    Returns:
      The same keys. Weights that the adapter changes are `MergedArray`s.

    Raises:
      CheckpointError: The file is missing or damaged, or its settings are.
      ConversionError: Lists every key that belongs to no weight or is of an unknown
        kind, every half without the other, and every wrong shape.
      ValueError: `scale` is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be a finite number")
    origin = "the adapter"
    metadata: Mapping[str, str] = {}
    if not isinstance(lora, Mapping):
        origin = f"the adapter {os.fspath(lora)}"
        lora = load_safetensors(lora)
        metadata = lora.metadata
    modules, problems = _group(lora, names)
    settings = _read_settings(metadata, origin)
    deltas: dict[str, list[_Delta]] = {}
    for base, parts in modules.items():
        for found, wrong in (
            _differences(base, parts, weights),
            _low_rank(base, parts, weights, settings),
        ):
            problems += wrong
            for key, delta in found:
                scaled = delta._replace(factor=scale * delta.factor)
                deltas.setdefault(key, []).append(scaled)
    if not problems and not deltas:
        problems.append("it holds nothing")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise ConversionError(
            f"{origin} does not fit the weights; {len(problems)} problems in "
            f"{len(lora)} keys:{lines}"
        )
    return MergedWeights(weights, deltas)


def _group(
    lora: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, dict[str, _Part]], list[str]]:
    """Sorts tensors by module and role; returns the keys that have none as problems."""
    modules: dict[str, dict[str, _Part]] = {}
    problems = []
    for key, value in lora.items():
        suffix = max(filter(key.endswith, _ROLES), key=len, default=None)
        if suffix is None:
            problems.append(f"unknown kind: {key} ends with none of {list(_ROLES)}")
            continue
        spelled = key.removesuffix(suffix)
        module = next(
            (
                bare
                for prefix in _PREFIXES
                if spelled.startswith(prefix)
                and (bare := spelled.removeprefix(prefix)) in names
            ),
            None,
        )
        if module is None:
            problems.append(f"unmatched: {key} belongs to no weight of the model")
            continue
        parts = modules.setdefault(names[module], {})
        role = _ROLES[suffix]
        if role in parts:
            problems.append(f"twice: {parts[role].key} and {key} mean the same")
        parts[role] = _Part(key, module, value)
    return modules, problems


def _differences(
    base: str, parts: _Parts, weights: Mapping[str, Any]
) -> tuple[list[tuple[str, _Delta]], list[str]]:
    """Returns whole differences of a module's weight and bias, and their problems."""
    deltas, problems = [], []
    for role, target in (
        ("diff", _weight_key(base, weights)),
        ("diff_b", f"{base}.bias"),
    ):
        if role not in parts:
            continue
        key, _, value = parts[role]
        if target not in weights:
            problems.append(f"unmatched: {key} belongs to no weight of the model")
        elif problem := _misfit(key, value, weights[target].shape):
            problems.append(problem)
        else:
            deltas.append((target, _Delta(1.0, value, None)))
    return deltas, problems


def _low_rank(
    base: str, parts: _Parts, weights: Mapping[str, Any], settings: _Settings
) -> tuple[list[tuple[str, _Delta]], list[str]]:
    """Returns the product of a module's two matrices, and their problems."""
    halves = [role for role in ("down", "up", "alpha") if role in parts]
    if not halves or (halves == ["alpha"] and "diff" in parts):
        return [], []
    if not {"down", "up"} <= parts.keys():
        matrices = "matrices" if halves == ["alpha"] else "other matrix"
        return [], [f"half: {parts[halves[0]].key} stands without its {matrices}"]
    (down_key, module, down), (up_key, _, up) = parts["down"], parts["up"]
    target = _weight_key(base, weights)
    if target not in weights or len(weights[target].shape) < 2:
        return [], [f"unmatched: {down_key} belongs to no matrix of the model"]
    rows, *columns = weights[target].shape
    rank = max((1, *down.shape[:1]))
    # The second of two convolutions has size 1 in every direction.
    ones = (1,) * (len(columns) - 1)
    misfits = (
        _misfit(down_key, down, (rank, *columns)),
        _misfit(up_key, up, (rows, rank, *ones)),
    )
    problems = [problem for problem in misfits if problem is not None]
    alpha = settings.alpha_of(module, rank)
    if "alpha" in parts:
        key, _, value = parts["alpha"]
        if np.size(value) != 1 or not np.isfinite(alpha := float(np.ravel(value)[0])):
            problems.append(f"alpha: {key} must be one finite number")
    if problems:
        return [], problems
    factor = alpha / (math.sqrt(rank) if settings.by_root else rank)
    return [(target, _Delta(factor, up, down))], []


def _weight_key(base: str, weights: Mapping[str, Any]) -> str:
    """Returns a module's key; a table has nothing behind its name."""
    return base if base in weights else f"{base}.weight"


def _misfit(key: str, value: Any, expected: Sequence[int]) -> str | None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"dtype: {key} is {value.dtype}; expected floating-point numbers"
    if tuple(value.shape) != tuple(expected):
        return f"shape: {key} is {tuple(value.shape)}; expected {tuple(expected)}"
    return None


def _read_settings(metadata: Mapping[str, str], origin: str) -> _Settings:
    """Reads PEFT's settings as diffusers stores them; alpha is the rank by default."""
    if _METADATA_KEY not in metadata:
        return _Settings()
    try:
        stored = {
            key.removeprefix("transformer."): value
            for key, value in json.loads(metadata[_METADATA_KEY]).items()
        }
        alpha = stored.get("lora_alpha")
        patterns = stored.get("alpha_pattern") or {}
        return _Settings(
            alpha=None if alpha is None else float(alpha),
            patterns=tuple(
                (re.compile(rf"(.*\.)?({pattern})"), float(value))
                for pattern, value in patterns.items()
            ),
            by_root=bool(stored.get("use_rslora")),
        )
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{origin} has damaged settings, {_METADATA_KEY}: {error!r}"
        ) from error


def _add(weight: jax.Array, delta: _Delta) -> jax.Array:
    if delta.down is None:
        return _add_difference(weight, jnp.asarray(delta.up), delta.factor)
    up, down = jnp.asarray(delta.up), jnp.asarray(delta.down)
    return _add_product(weight, up, down, delta.factor)


@jax.jit
def _add_difference(weight: jax.Array, difference: jax.Array, factor: Any) -> jax.Array:
    return weight + factor * difference.astype(jnp.float32)


@jax.jit
def _add_product(
    weight: jax.Array, up: jax.Array, down: jax.Array, factor: Any
) -> jax.Array:
    up = up.astype(jnp.float32).reshape(up.shape[:2])
    down = down.astype(jnp.float32).reshape(down.shape[0], -1)
    product = jnp.matmul(up, down, precision="highest")
    return weight + factor * product.reshape(weight.shape)
