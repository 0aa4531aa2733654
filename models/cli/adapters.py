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
        strengths = [sampling.guidance]
        flags = ["--guidance"]
        if sampling.low_guidance is not None:
            strengths.append(sampling.low_guidance)
            flags.append("--low-guidance")
        if found is None or all(
            found.suits(sampling.num_steps, strength) for strength in strengths
        ):
            continue
        suited = " ".join(f"{flag} {found.guidance:g}" for flag in flags)
        own = " and ".join(f"{strength:g}" for strength in strengths)
        warnings.warn(
            f"{file.name} was made for few steps ({found.reason}): --steps "
            f"{found.num_steps} {suited} suit it; this run has {sampling.num_steps} "
            f"steps and guidance {own}",
            stacklevel=2,
        )
