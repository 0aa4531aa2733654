"""Small models, such as the one that ships, as a family of models."""

import dataclasses
from pathlib import Path
from typing import Any

from draft_jax import SparsitySchedule
from models.diffusion.caches import MagRatios, read_ratios
from models.diffusion.dtypes import Linears
from models.diffusion.family import Family
from models.diffusion.folders.part_files import PartFiles
from models.diffusion.interfaces import LatentSizes
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.mini.checkpoint import (
    RATIOS,
    SHIPPED,
    SMALL_MODEL,
    is_small_model,
    read_codec,
    read_codec_sizes,
    read_config,
)
from models.mini.pipeline import load_mini
from models.wan.conditions import WanConditioning
from models.wan.vae.codec import WanVAECodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniInfo:
    """Settings of a small model; see `models.diffusion.family.ModelInfo`."""

    path: Path
    conditioning: WanConditioning
    codec: LatentSizes
    sampling: Sampling
    files: PartFiles = dataclasses.field(default_factory=PartFiles)
    model: str | None = None
    published: SparsitySchedule | None = None

    def sampling_at(self, height: int, width: int) -> Sampling:
        """Returns the settings for another size."""
        return dataclasses.replace(self.sampling, height=height, width=width)

    def mag_ratios(self, sampling: Sampling, *, from_image: bool) -> MagRatios | None:
        """Returns the ratios that lie beside the weights, if there are.

        Raises:
          RatiosError: The file is damaged.
        """
        file = self.path / RATIOS
        return read_ratios(file) if file.exists() else None


def describe_mini(path: Path | str | None = None, **options: Any) -> MiniInfo:
    """Reads the sizes of a small model, which takes none of the options.

    Raises:
      CheckpointError: The folder is missing, incomplete, or of another format.
    """
    del options
    folder = SHIPPED if path is None else Path(path)
    config = read_config(folder)
    return MiniInfo(
        path=folder,
        conditioning=WanConditioning(config),
        codec=read_codec_sizes(folder, config),
        sampling=Sampling(),
    )


def _load(
    path: Path | str | None,
    *,
    linears: Linears = "bfloat16",
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> VideoPipeline:
    """Loads a small model, for which other options have no meaning."""
    del options
    return load_mini(path, linears=linears, mesh=mesh)


def _load_codec(path: Path | str | None, **options: Any) -> WanVAECodec:
    """Loads a small model's codec, for which the options have no meaning."""
    del options
    folder = SHIPPED if path is None else Path(path)
    return read_codec(folder, read_config(folder))


MINI = Family(
    name="small",
    owns=is_small_model,
    describe=describe_mini,
    load=_load,
    load_codec=_load_codec,
    expected=SMALL_MODEL,
)
