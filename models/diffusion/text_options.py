"""Options of how prompts become embeddings."""

import dataclasses
from pathlib import Path

import jax

from models.checkpoints.memory_map import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of how a model's prompts become embeddings.

    Attributes:
      prompts: Encoded before the transformer is loaded, after which the text encoder
        (of 11 or 16 GB) is freed; `generate` then takes these alone, and what
        `embeddings` has. Negative prompts count. None keeps the encoder in memory for
        any prompt.
      embeddings: A folder that keeps embeddings: the encoder is loaded for prompts
        that are not in it yet, stores them, and is freed. Or a file that
        `GivenTextEncoder.save` wrote: no encoder is needed.
      device: Where the encoder runs; JAX's default device if None.
    """

    prompts: tuple[str, ...] | None = None
    embeddings: Path | None = None
    device: jax.Device | None = None

    @property
    def given(self) -> bool:
        """Whether embeddings come from a file, which needs no text encoder.

        Raises:
          CheckpointError: The path looks like a file, but there is none.
        """
        path = self.embeddings
        if path is not None and path.suffix == ".safetensors" and not path.exists():
            raise CheckpointError(f"embeddings={str(path)!r} does not exist")
        return path is not None and path.is_file()
