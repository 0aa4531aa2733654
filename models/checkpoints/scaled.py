"""Weights in FP8 with scales, as files store them.

FP8 has three or two bits of fraction and a small range. So files store `weight / scale`
in it, with the scale beside; the weight is their product. Two spellings are common:

    blocks.0.ffn.0.scale_weight   musubi-tuner, older files of ComfyUI, which a key
                                  `scaled_fp8` marks
    blocks.0.ffn.0.weight_scale   newer files of ComfyUI, LightX2V; `comfy_quant` beside
                                  it, or the file's metadata, name the format

Weights are multiplied by their scales in float32 where they are read, unless they are
for products in FP8: these take them as they are; see `float8_weights`. `scale_input`
and `input_scale` are of activations, which our products measure themselves. FP8 without
scales is only narrow.

Source: ComfyUI `comfy/utils.py` (`convert_old_quants`) and QUANTIZATION.md;
musubi-tuner `fp8_optimization_utils.py`, whose scales may also be those of blocks.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints.conversion import file_of
from models.checkpoints.listing import list_problems, shorten
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.views import name_of
from models.float8.rows import FLOAT8 as E4M3
from models.float8.rows import ScaledRows

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
MARKER = "scaled_fp8"
_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_FORMAT = ".comfy_quant"  # JSON as bytes
_METADATA_KEY = "_quantization_metadata"
_LONGEST_FORMAT = 2**12  # bytes; published ones have under a hundred


class ScaledArray:
    """A weight times its scale, in float32, made when it is read.

    Attributes:
      shape: Shape of the weight.
      dtype: float32.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, weight: Any, scale: Any) -> None:
        self.shape = tuple(weight.shape)
        self._weight = weight
        self._scale = scale

    def __jax_array__(self) -> jax.Array:
        return _multiply(jnp.asarray(self._weight), jnp.asarray(self._scale))

    def scaled_rows(self) -> ScaledRows | None:
        """Returns the weight as it is stored, with a scale for each row.

        None if it is not in e4m3, or has several scales in a row.
        """
        if len(self.shape) != 2 or self._weight.dtype != E4M3:
            return None
        if self._scale.ndim == 3 and self._scale.size != 1:
            return None
        scale = jnp.asarray(self._scale).astype(jnp.float32).reshape(-1)
        rows = jnp.broadcast_to(scale, self.shape[:1])
        return ScaledRows(jnp.asarray(self._weight), rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.__jax_array__(), dtype)


@dataclasses.dataclass(frozen=True)
class ScaledWeights(Mapping[str, Any]):
    """A checkpoint whose scaled weights are `ScaledArray`s; see `apply_scales`.

    Attributes:
      source: The checkpoint as it is stored.
      scales: Key of the scale by key of the weight.
      beside: Keys of `source` that are no weights.
    """

    source: Mapping[str, Any]
    scales: Mapping[str, str]
    beside: frozenset[str]

    def __getitem__(self, key: str) -> Any:
        if key in self.beside:
            raise KeyError(key)
        if key in self.scales:
            return ScaledArray(self.source[key], self.source[self.scales[key]])
        return self.source[key]

    def file_of(self, key: str) -> Path | None:
        """Returns the file of a key, if `source` knows it."""
        return file_of(self.source, key)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.source if key not in self.beside)

    def __len__(self) -> int:
        return len(self.source) - len(self.beside)


def apply_scales(
    source: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    tables: Collection[str] = (),
) -> Mapping[str, Any]:
    """Returns a checkpoint's weights with their scales; nothing is read.

    Args:
      source: Arrays by key. Scales are scalars, one value for each row, or one for
        each block of a row ([rows, blocks, 1]).
      metadata: Texts that the file carries.
      tables: Keys of token tables, which have no scale in any convention.

    Returns:
      `source` itself if it has neither scales nor a marker.

    Raises:
      CheckpointError: Weights are in a quantised format other than FP8, a scale
        stands without its weight or does not fit it, or an FP8 weight lacks a scale
        in a file that has others. The first of them are listed.
    """
    problems = _check_metadata(metadata or {})
    scales: dict[str, str] = {}
    beside = {key for key in source if key == MARKER}
    for key in source:
        module, dot, kind = key.rpartition(".")
        ending = dot + kind
        weight = f"{module}.weight"
        if ending == _FORMAT:
            beside.add(key)
            problems += _check_format(key, source[key])
        elif ending in _SCALES:
            beside.add(key)
            if weight in scales:
                both = " and ".join(sorted((scales[weight], key)))
                problems.append(f"{both} are scales of one weight")
            elif problem := _check_scale(key, weight, source):
                problems.append(problem)
            scales[weight] = key
    for key in source:
        module, dot, kind = key.rpartition(".")
        if dot + kind in _INPUT_SCALES:
            beside.add(key)
            if f"{module}.weight" not in scales:
                problems.append(f"{key} belongs to no scaled weight")
    if beside:
        problems += [
            f"{key} is {source[key].dtype} without a scale, in a file with scales"
            for key in source
            if key.endswith(".weight")
            and key not in scales
            and key not in tables
            and len(source[key].shape) == 2
            and source[key].dtype.name in FLOAT8
        ]
    if problems:
        raise CheckpointError(
            f"{name_of(source)} has scaled weights that cannot be read; "
            f"{len(problems)} problems:{list_problems(problems)}"
        )
    return ScaledWeights(source, scales, frozenset(beside)) if beside else source


def _check_scale(key: str, weight: str, source: Mapping[str, Any]) -> str | None:
    """Returns the problem of a scale; None if there is none."""
    if weight not in source:
        return f"{key} is a scale without its weight, {weight}"
    stored, scale = source[weight], source[key]
    if stored.dtype.name not in FLOAT8:
        return f"{key} scales {weight}, which is {stored.dtype}; expected {FLOAT8}"
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        return f"{key} is {scale.dtype}; expected floating-point numbers"
    if not _fits(tuple(scale.shape), tuple(stored.shape)):
        return (
            f"{key} of shape {tuple(scale.shape)} does not fit {weight} of shape "
            f"{tuple(stored.shape)}; expected one value, or one for each row or block"
        )
    return None


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if all(size == 1 for size in scale):
        return True
    rows = weight[:1]
    match scale:
        case (_,):
            return scale == rows
        case (_, 1):
            return scale[:1] == rows
        case (_, blocks, 1) if len(weight) == 2:
            return scale[:1] == rows and blocks > 0 and weight[1] % blocks == 0
    return False


def _check_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Returns the problems of the formats that a file's metadata names."""
    if _METADATA_KEY not in metadata:
        return []
    try:
        layers = json.loads(metadata[_METADATA_KEY])["layers"]
        formats = {name: settings["format"] for name, settings in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{_METADATA_KEY} is damaged: {error!r}"]
    return [
        _other_format(name, found)
        for name, found in formats.items()
        if found not in FLOAT8
    ]


def _check_format(key: str, value: Any) -> list[str]:
    """Returns the problem of a layer's own description."""
    if value.dtype != np.uint8 or value.size > _LONGEST_FORMAT:
        return [f"{key} is no description of a format"]
    try:
        found = json.loads(np.asarray(value).tobytes())["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{key} is damaged: {error!r}"]
    return [] if found in FLOAT8 else [_other_format(key, found)]


def _other_format(name: str, found: Any) -> str:
    return f"{name} is in the format {shorten(repr(found))}; expected {FLOAT8}"


@jax.jit
def _multiply(weight: jax.Array, scale: jax.Array) -> jax.Array:
    weight, scale = weight.astype(jnp.float32), scale.astype(jnp.float32)
    if scale.size == 1:
        return weight * scale.reshape(())
    if scale.ndim == 3:
        blocks = weight.reshape(*scale.shape[:2], -1)
        return (blocks * scale).reshape(weight.shape)
    return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
