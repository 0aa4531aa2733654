"""Wan2.2's pairs: a transformer for high noise and one for low, of one architecture."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.adapters import Lora, split_expert
from models.diffusion.experts import (
    ExpertName,
    Experts,
    ResidentExperts,
    StreamedExperts,
)
from models.diffusion.folders.scheduler_settings import SchedulerSettings
from models.diffusion.sampling import Sampling
from models.wan.config import WanConfig
from models.wan.sampling import WAN_BOUNDARIES
from models.wan.transformer import WanTransformer

# What names a transformer of a pair: anywhere, and in the names of files.
_NAMED = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_TABLES = (".modulation", "scale_shift_table")  # small arrays, in all blocks


class SchedulerWarning(UserWarning):
    """A folder's scheduler has other settings than the model's own code."""


class AdapterWarning(UserWarning):
    """An adapter's name says another transformer of a pair than it is given for."""


def boundary_of(config: WanConfig) -> float:
    """Returns the noise level, of 1, at which a pair's transformers change."""
    return WAN_BOUNDARIES["image" if config.takes_image else "text"]


def note_other_settings(
    own: Sampling,
    scheduler: SchedulerSettings,
    *,
    config: WanConfig,
    boundary_ratio: float | None,
) -> None:
    """Warns where a folder's files differ from the settings of Wan's own code.

    Args:
      own: The settings that are taken.
      scheduler: What the folder's scheduler says; its defaults in the original layout.
      config: Sizes of the transformers.
      boundary_ratio: What diffusers' file of the pipeline says; None if nothing.
    """
    notes = []
    if scheduler.grid == "diffusers" and scheduler.shift != own.shift:
        notes.append(
            f"its scheduler has a shift of {scheduler.shift:g}; Wan's own code has "
            f"{own.shift:g}, which is taken (--shift sets another)"
        )
    boundary = boundary_of(config)
    if boundary_ratio not in (None, boundary):
        notes.append(
            f"it has boundary_ratio={boundary_ratio}; {boundary} is taken (--boundary "
            "sets another, of 1000)"
        )
    if notes:
        warnings.warn(
            f"of a folder of Wan2.2: {'; '.join(notes)}",
            SchedulerWarning,
            stacklevel=2,
        )


def check_pair(
    high: Mapping[str, Any],
    low: Mapping[str, Any],
    files: Mapping[ExpertName, Iterable[Path]],
) -> None:
    """Checks that two transformers are a pair, by names and by their smallest weights.

    Args:
      high: Weights for high noise by key.
      low: Weights for low noise by key.
      files: The files of each.

    Raises:
      CheckpointError: Names of files, or what lies beside them, say that they are
        swapped, or both are equal.
    """
    for name, paths in files.items():
        for place, said in _marks(paths):
            if said != name:
                raise CheckpointError(
                    f"{place} is of the transformer for {name} noise, but names the "
                    "other: the two are swapped"
                )
    tables = [key for key in high if key.endswith(_TABLES) and key in low]
    if tables and all(
        np.array_equal(np.asarray(high[key]), np.asarray(low[key])) for key in tables
    ):
        raise CheckpointError(
            f"the transformers for high and low noise are equal: {len(tables)} tables "
            "of modulation have the same values; expected two of a pair"
        )


def _marks(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yields what names one of a pair, and which: names of files, and texts beside."""
    texts: dict[Path, None] = {}
    for path in paths:
        real = path.resolve()
        for name in (real.name, path.name):
            if (said := named_in(name)) is not None:
                yield f"{path}, whose file is {name!r},", said
        if match := _NAMED.search(real.parent.name):
            yield f"{path}, which lies in {real.parent.name!r},", match[1].lower()
        texts |= dict.fromkeys(sorted(path.parent.glob("*.json")))
    for file in texts:
        text = file.read_text("utf-8", errors="replace")
        found = {word.lower() for word in _NAMED.findall(text)}
        if len(found) == 1:
            yield f"{file}", found.pop()


def named_in(name: str) -> ExpertName | None:
    """Returns which of a pair the name of a file says it is for, if it says one.

    As in "wan2.2_t2v_low_noise_14B.safetensors", or "Wan2_2-T2V-A14B_HIGH.safetensors".
    """
    for pattern in (_NAMED, _WORD):
        found = {word.lower() for word in pattern.findall(name)}
        if len(found) == 1:
            return found.pop()  # type: ignore[return-value]
    return None


def note_named_adapters(loras: Iterable[Lora]) -> None:
    """Warns of adapters that are named for one of a pair, and given to the other."""
    for given, _ in loras:
        expert, file = split_expert(given)
        said = named_in(file.name)
        if said not in (None, expert):
            warnings.warn(
                f"{file.name} is named for {said} noise, and given for "
                f"{'both' if expert is None else expert}: {said}:{file.name} merges it "
                "into that transformer alone",
                AdapterWarning,
                stacklevel=2,
            )


def make_experts(
    config: WanConfig,
    load: Mapping[ExpertName, Callable[[], WanTransformer]],
    *,
    streamed: bool | None = None,
) -> tuple[Any, Experts]:
    """Loads both transformers.

    Args:
      config: Sizes of each.
      load: Functions that return a transformer on JAX's default device.
      streamed: Whether the weights of one wait in the host's memory; None for what
        suits: in FP8 and on a CPU both are on the device.

    Returns:
      A transformer to start with, and both.
    """
    boundary = 1000 * boundary_of(config)
    if streamed is None:
        streamed = jax.default_backend() != "cpu" and config.linears != "float8"
    if not streamed:
        experts = ResidentExperts(load["high"](), load["low"](), boundary=boundary)
        return experts.model, experts
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        structure, state = nnx.split(load["high"]())
    resident = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf), copy=True), state)
    del state  # the host is to hold no third copy
    model: WanTransformer = nnx.merge(structure, resident)
    with jax.default_device(host):
        low = nnx.state(load["low"]())
    return model, StreamedExperts(model, low, resident="high", boundary=boundary)
