"""A family of models as loading and the command line know it.

Each family has a record in its `family.py`; `models.loading` lists them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from draft_jax import SparsitySchedule
from models.diffusion.caches import MagRatios
from models.diffusion.folders.part_files import PartFiles
from models.diffusion.interfaces import Codec, Conditioning, LatentSizes
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling


@runtime_checkable
class ModelInfo(Protocol):
    """Settings of a model, read from its folder or file without reading weights."""

    @property
    def path(self) -> Path:
        """The model's folder, of a repository that of one commit; or its file.

        To load exactly this model, give it in place of a name on the hub.
        """

    @property
    def files(self) -> PartFiles:
        """Parts that were given by themselves, as paths on this machine."""

    @property
    def model(self) -> str | None:
        """Name of a model that was told by its shapes, without a configuration."""

    @property
    def conditioning(self) -> Conditioning:
        """The family's rules for requests."""

    @property
    def codec(self) -> LatentSizes:
        """Sizes of the autoencoder."""

    @property
    def sampling(self) -> Sampling:
        """Settings that `generate` takes by default."""

    @property
    def published(self) -> SparsitySchedule | None:
        """Rule of the published code of DraftAttention for the model, if there is."""

    def sampling_at(self, height: int, width: int) -> Sampling:
        """Returns the settings for another size."""

    def mag_ratios(self, sampling: Sampling, *, from_image: bool) -> MagRatios | None:
        """Returns the ratios that came with the model, or were published for it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Models of one architecture, and the folders they are stored in.

    Attributes:
      name: Name for people.
      owns: Tells whether a path holds a model of the family, by what lies in it.
      describe: Makes a `ModelInfo`. It takes a path and the keywords `text`, `files`
        and `revision` of `load_pipeline`.
      load: Makes a pipeline; takes the arguments of `load_pipeline`.
      load_codec: Loads the codec alone; takes a path and the keywords `files` and
        `revision`.
      expected: Contents of the family's folders, in words.
      takes: Arguments of `load_pipeline` that have a meaning for the family, such as
        "loras" and "files.vae"; likewise "tiles" and "codec_dtype" of the codec.
      hub_signs: Small files of a repository that tell whether it is the family's.
      describe_neighbour: Says what to give in place of a folder that lies in, or
        around, that of a model; None if there is no such model.
      text_beside_jax: Whether text encoders run in a process of their own, which is to
        find the device free: JAX is not used before they are done.
      refused: What cannot be loaded, by classes that a folder names, or by patterns
        of files: relatives of the family's models, each with the reason.
    """

    name: str
    owns: Callable[[Path], bool]
    describe: Callable[..., ModelInfo]
    load: Callable[..., VideoPipeline]
    load_codec: Callable[..., Codec]
    expected: str
    takes: frozenset[str] = frozenset()
    hub_signs: tuple[str, ...] = ()
    describe_neighbour: Callable[[Path], str | None] = lambda path: None
    text_beside_jax: bool = False
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Arguments that suit every family whose models are published.
FOR_PUBLISHED = frozenset(
    [
        "loras",
        "text.prompts",
        "text.embeddings",
        "text.device",
        "files.vae",
        "files.text_encoder",
        "files.tokenizer",
        "revision",
        "tiles",
        "codec_dtype",
    ]
)
