"""A pipeline's parts from a published HunyuanVideo model, text first."""

import dataclasses
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from draft_jax import SparsitySchedule
from models.checkpoints.conversion import ConversionError
from models.checkpoints.memory_map import CheckpointError
from models.diffusion.caches import MagRatios, published_ratios
from models.diffusion.dtypes import Linears, choose_linears, default_dtype
from models.diffusion.folders.layouts import ALL_PARTS, Part
from models.diffusion.folders.part_files import PartFiles, fitting
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.text_options import TextOptions
from models.hunyuan.checkpoint import HunyuanParts, open_hunyuan_parts
from models.hunyuan.conditions import HunyuanConditioning
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import load_hunyuan_transformer
from models.hunyuan.layouts import TEXT_PARTS
from models.hunyuan.sampling import hunyuan_sampling
from models.hunyuan.text import load_text_encoder
from models.hunyuan.text_encoder import check_text_packages
from models.hunyuan.vae.codec import HunyuanVAECodec
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.convert import load_hunyuan_vae

_LOG = logging.getLogger(__name__)

# Pixels of a frame, between those of 540p (522,240) and 720p (921,600).
_BETWEEN_SIZES = 700_000
HUNYUAN_FPS = 24.0  # of the videos that HunyuanVideo was trained on


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanInfo:
    """Settings of a model; see `models.diffusion.family.ModelInfo`."""

    path: Path
    files: PartFiles
    model: str | None
    config: HunyuanConfig
    codec: HunyuanVAEConfig
    sampling: Sampling

    @property
    def conditioning(self) -> HunyuanConditioning:
        """HunyuanVideo's rules for requests."""
        return HunyuanConditioning(self.config)

    @property
    def published(self) -> SparsitySchedule:
        """The rule of the published code of DraftAttention."""
        return SparsitySchedule.hunyuan_published()

    def sampling_at(self, height: int, width: int) -> Sampling:
        """Returns the settings for another size, which are the same."""
        return dataclasses.replace(self.sampling, height=height, width=width)

    def mag_ratios(self, sampling: Sampling, *, from_image: bool) -> MagRatios | None:
        """Returns the ratios published for HunyuanVideo, at the nearer of two sizes."""
        published = HunyuanConfig.video_13b()
        names = ("dim", "num_double_blocks", "num_single_blocks", "reference_frames")
        if any(getattr(self.config, n) != getattr(published, n) for n in names):
            return None
        small = sampling.height * sampling.width < _BETWEEN_SIZES
        return published_ratios(f"hunyuanvideo-{'540p' if small else '720p'}")


def describe_hunyuan(
    path: Path | str,
    *,
    parts: Collection[Part] = ALL_PARTS,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
) -> HunyuanInfo:
    """Opens a model to look at its settings; fetches it if it is on the hub.

    Takes and raises what `load_hunyuan` does.
    """
    opened = open_hunyuan_parts(
        path, parts=_needed(parts, text), files=files, revision=revision
    )
    return HunyuanInfo(
        path=opened.path,
        files=opened.given,
        model=opened.model,
        config=opened.config,
        codec=_vae_config(opened),
        sampling=_sampling(opened),
    )


def load_hunyuan(
    path: Path | str,
    *,
    parts: Collection[Part] = ALL_PARTS,
    loras: Iterable[tuple[Path | str, float]] = (),
    lora_strict: bool = True,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
    linears: Linears = "bfloat16",
    mesh: DeviceMesh | None = None,
) -> VideoPipeline:
    """Loads a pipeline: text first, in a process that ends; then the rest.

    Where nothing else has used JAX before, the text encoders find the whole GPU free:
    JAX takes most of its memory at its first use, which is after them.

    Args:
      path: The model's folder, its repository on the hub, or a file of its
        transformer.
      parts: What to load; without text encoders, `generate` takes contexts.
      loras: Adapters to merge, each with its strength.
      lora_strict: Whether parts of adapters that mean nothing to this model are
        refused; else they are skipped with a warning.
      text: How prompts become embeddings; `TextOptions()` if None.
      files: Parts that are given by themselves.
      revision: Branch, tag or commit of a repository.
      linears: Precision of the transformer's linear layers; see `load_pipeline`.
      mesh: Devices that share the transformer; see `load_pipeline`.

    Raises:
      CheckpointError: The model cannot be found, is incomplete, damaged, or of a
        kind this port lacks; or an adapter or stored embeddings are damaged.
      ConversionError: An adapter does not fit.
      ImportError: An optional package is needed and not installed.
      UnknownPromptError: Prompts are not among the embeddings of a file.
      ValueError: The device has no FP8.
    """
    text = text or TextOptions()
    opened = open_hunyuan_parts(
        path,
        parts=_needed(parts, text),
        loras=loras,
        lora_strict=lora_strict,
        files=files,
        revision=revision,
    )
    text_encoder = load_text_encoder(opened.text_files, text)
    dtype = default_dtype()  # starts JAX on the GPU
    chosen = choose_linears(linears)
    codec = _load_codec(opened)
    _LOG.info("loading the transformer")
    try:
        config = dataclasses.replace(
            opened.config, dtype=dtype, param_dtype=dtype, linears=chosen
        )
        model = load_hunyuan_transformer(opened.transformer.weights, config, mesh=mesh)
    except ConversionError as error:
        folder = opened.transformer.files[0].parent
        raise CheckpointError(
            f"the transformer in {folder} does not fit HunyuanVideo's sizes: {error}"
        ) from error
    return VideoPipeline(
        model=model,
        text_encoder=text_encoder,
        codec=codec,
        sampling=_sampling(opened),
        fps=HUNYUAN_FPS,
        mesh=mesh,
    )


def load_hunyuan_codec(
    path: Path | str, *, files: PartFiles | None = None, revision: str | None = None
) -> HunyuanVAECodec:
    """Loads the autoencoder alone; takes and raises what `load_hunyuan` does."""
    opened = open_hunyuan_parts(path, parts=(), files=files, revision=revision)
    return _load_codec(opened)


def _load_codec(opened: HunyuanParts) -> HunyuanVAECodec:
    _LOG.info("loading the VAE")
    dtype = default_dtype()
    vae = _vae_config(opened, dtype=dtype, param_dtype=dtype)
    with fitting("vae", opened.vae):
        return HunyuanVAECodec(model=load_hunyuan_vae(opened.vae.weights, vae))


def _needed(parts: Collection[Part], text: TextOptions | None) -> set[Part]:
    """Returns the parts to open; the packages that their prompts need are there."""
    if text is not None and text.given:
        return set(parts).difference(TEXT_PARTS)
    if "text_encoder" in parts:
        check_text_packages()
    return set(parts)


def _vae_config(opened: HunyuanParts, **changes: Any) -> HunyuanVAEConfig:
    return opened.vae.read_config(
        HunyuanVAEConfig.from_dict, HunyuanVAEConfig.video, **changes
    )


def _sampling(opened: HunyuanParts) -> Sampling:
    told = 6.0 if opened.config.guidance_embeds else None
    return hunyuan_sampling(shift=opened.shift, embedded_guidance=told)
