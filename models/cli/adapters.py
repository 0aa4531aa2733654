"""Notes about adapters, before anything is loaded."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from models.checkpoints.lora import find_few_steps
from models.diffusion.adapters import split_expert
from models.diffusion.sampling import Sampling


def suggest_few_steps(files: Iterable[Path], sampling: Sampling) -> None:
    """Suggests steps and guidance for adapters made for few steps; changes neither.

    Raises:
      CheckpointError: A file is missing or damaged.
    """
    for file in files:
        _, file = split_expert(file)
        found = find_few_steps(file)
        if found is None or found.suits(sampling.num_steps, sampling.guidance):
            continue
        warnings.warn(
            f"{file.name} was made for few steps ({found.reason}): --steps "
            f"{found.num_steps} --guidance {found.guidance:g} suit it; this run has "
            f"{sampling.num_steps} steps and guidance {sampling.guidance:g}",
            stacklevel=2,
        )
