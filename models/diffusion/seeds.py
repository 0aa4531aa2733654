"""Items of a batch that have seeds of their own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models.diffusion.contexts import as_prompts
from models.diffusion.interfaces import ImageCondition, Images, TextContext
from models.diffusion.results import GenerationResult
from models.diffusion.sampling import Sampling, check_seed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One video of a batch.

    Attributes:
      prompts: A prompt, or its context.
      sampling: Settings, with the item's own seed.
      image: First frame or its condition; None without.
      negative_context: Context of the negative prompt; None for that of `sampling`.
    """

    prompts: str | TextContext
    sampling: Sampling
    image: Images | ImageCondition | None
    negative_context: TextContext | None


def items_of_seeds(
    seeds: Sequence[int],
    prompts: str | Sequence[str] | TextContext,
    sampling: Sampling,
    *,
    image: Images | ImageCondition | None = None,
    negative_context: TextContext | None = None,
) -> list[Item]:
    """Returns an item for each seed.

    Raises:
      ValueError: There is no seed, one is not an integer in [0, 2**32), or there are
        neither as many prompts, images or negative contexts as seeds, nor one.
    """
    if not seeds:
        raise ValueError(f"{seeds=} must hold at least one seed")
    for index, seed in enumerate(seeds):
        check_seed(f"seeds[{index}]", seed)
    texts = _split(prompts) if isinstance(prompts, TextContext) else as_prompts(prompts)
    one_image = isinstance(image, jax.Array | np.ndarray) and image.ndim == 3
    images = [image] if image is None or one_image else _split(image)
    negative = [None] if negative_context is None else _split(negative_context)
    columns = (
        _for_each_seed(len(seeds), "prompts", texts),
        _for_each_seed(len(seeds), "images", images),
        _for_each_seed(len(seeds), "negative contexts", negative),
    )
    return [
        Item(
            prompts=text,
            sampling=dataclasses.replace(sampling, seed=seed),
            image=image,
            negative_context=context,
        )
        for seed, text, image, context in zip(seeds, *columns, strict=True)
    ]


def _for_each_seed(count: int, name: str, values: list) -> list:
    """Returns as many values as seeds: they are as many already, or there is one."""
    if len(values) not in (1, count):
        raise ValueError(
            f"there are {len(values)} {name} for {count} seeds; expected {count}, or "
            "one for all"
        )
    return values if len(values) == count else values * count


def _split(batch: Any) -> list:
    """Returns the items of a batch, as batches of one."""
    size = len(jax.tree.leaves(batch)[0])
    return [
        jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], batch)
        for place in range(size)
    ]


def join_results(results: Sequence[GenerationResult]) -> GenerationResult:
    """Returns the results of items as that of a batch: times are sums.

    A last one that was stopped is left out, unless it is the only one. A step counts
    as skipped where all items skipped it.
    """
    stopped = results[-1].stopped
    results = results[:-1] if stopped and len(results) > 1 else results
    first = results[0]
    return dataclasses.replace(
        first,
        video=np.concatenate([result.video for result in results]),
        latents=np.concatenate([result.latents for result in results]),
        time_ms=np.sum([result.time_ms for result in results], axis=0),
        compile_ms=sum(result.compile_ms for result in results),
        decode_ms=sum(result.decode_ms for result in results),
        kept_density=np.mean([result.kept_density for result in results], axis=0),
        dense=np.any([result.dense for result in results], axis=0),
        stopped=stopped,
    )
