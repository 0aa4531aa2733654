"""The step cache that the options stand for."""

import argparse

from models.cli.cache_options import CacheRequest
from models.cli.speed import name_option
from models.diffusion.caches import (
    EasyCache,
    MagCache,
    MagRatios,
    StepCache,
    read_ratios,
)
from models.diffusion.experts import expert_names, first_steps
from models.diffusion.family import ModelInfo
from models.diffusion.sampling import Sampling


def cache_from(
    arguments: argparse.Namespace, info: ModelInfo, sampling: Sampling
) -> StepCache | None:
    """Returns the cache that the options describe; None to compute every step.

    Raises:
      OSError: The file of ratios cannot be read.
      ValueError: A constant is out of range, the file holds no ratios, there are none
        for the model, or they are given without a rule that takes them.
    """
    request: CacheRequest | None = getattr(arguments, "cache", None)
    file = getattr(arguments, "cache_ratios", None)
    if file is not None and (request is None or request.rule != "mag"):
        raise ValueError(f"--cache-ratios {file} fits --cache mag only: give both")
    if request is None:
        return None
    constants = dict(request.constants)
    try:
        if request.rule == "easy":
            return EasyCache(**constants)
        ratios = _ratios(arguments, info, sampling)
        return MagCache(ratios=ratios, **constants)
    except ValueError as error:
        raise ValueError(f"{name_option(arguments, 'cache')}: {error}") from error


def describe_cache(
    arguments: argparse.Namespace, cache: StepCache | None, sampling: Sampling
) -> list[str]:
    """Returns lines on what is skipped, and whose ratios it goes by."""
    if cache is None:
        return []
    skipped = int(cache.skippable(sampling.num_steps, expert_starts(sampling)).sum())
    if not isinstance(cache, MagCache):
        return [f"cache: EasyCache, at most {skipped} of {sampling.num_steps} steps"]
    ratios = cache.ratios
    lines = [
        f"cache: MagCache skips {skipped} of {sampling.num_steps} steps, by ratios of "
        f"{ratios.model}"
    ]
    if ratios.num_layers is None and arguments.lora:
        lines.append(
            "cache: the ratios were measured without adapters; `draft-video calibrate` "
            "measures them with yours"
        )
    name = checkpoint_name(arguments)
    is_given = arguments.cache_ratios is not None  # others belong to the model
    if is_given and ratios.model != name:
        lines.append(f"cache: the ratios are of another checkpoint than {name}")
    return lines


def expert_starts(sampling: Sampling) -> tuple[int, ...]:
    """Returns the first step of each of a model's transformers."""
    if sampling.boundary is None:
        return (0,)
    timesteps = sampling.make_solver().timesteps
    return first_steps(expert_names(timesteps, sampling.boundary))


def checkpoint_name(arguments: argparse.Namespace) -> str:
    """Returns how ratios and reports name the model that is run."""
    return "shipped" if arguments.checkpoint is None else str(arguments.checkpoint)


def _ratios(
    arguments: argparse.Namespace, info: ModelInfo, sampling: Sampling
) -> MagRatios:
    """Returns the ratios of the file, or those that there are for the model."""
    if arguments.cache_ratios is not None:
        return read_ratios(arguments.cache_ratios)
    ratios = info.mag_ratios(sampling, from_image=arguments.image is not None)
    if ratios is None:
        raise ValueError(
            "no ratios are published for this model: measure them with `draft-video "
            "calibrate` and give its file with --cache-ratios, or take --cache easy or "
            "--cache none"
        )
    return ratios
