"""A pipeline's parts from a published Wan folder, in an order that saves memory."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from draft_jax import SparsitySchedule
from models.clip.config import CLIPVisionConfig
from models.clip.image_encoder import CLIPImageEncoder
from models.diffusion.caches import MagRatios, published_ratios
from models.diffusion.dtypes import Linears, choose_linears, default_dtype
from models.diffusion.folders.layouts import ALL_PARTS, Part
from models.diffusion.folders.part_files import PartFiles, fitting
from models.diffusion.mesh import DeviceMesh
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.diffusion.text_options import TextOptions
from models.umt5.tokenizer import check_text_packages
from models.wan.checkpoint import WanParts, open_wan_parts
from models.wan.conditions import WanConditioning
from models.wan.config import WanConfig
from models.wan.pair import make_experts, note_other_settings
from models.wan.sampling import (
    WanSize,
    WanTask,
    a14b_sampling,
    ti2v_sampling,
    wan_sampling,
    wan_shift,
)
from models.wan.text import TEXT_PARTS, load_text_encoder
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import load_wan_vae

_LOG = logging.getLogger(__name__)

# Pixels of a frame, between those of 480p (399,360) and 720p (921,600).
_BETWEEN_SIZES = 600_000
WAN_FPS = 16.0  # of the videos that Wan was trained on
TI2V_FPS = 24.0  # of those of Wan2.2's 5B model


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanInfo:
    """Settings of a Wan model, read from its folder or file without reading weights.

    Attributes:
      path: The model's folder, of a repository that of one commit; or its file. To
        load exactly this model, give it in place of a name on the hub.
      files: Parts that were given by themselves, as paths on this machine.
      model: Name of a model that was told by its shapes; None if a `config.json` was
        read.
      config: Sizes of the transformer.
      codec: Sizes of the autoencoder.
      sampling: Settings that `generate` takes by default.
      own_shift: Whether the shift is the same at every size: a pair's is, and that of a
        folder that has a scheduler.
      is_pair: Whether there is a transformer for high noise, and one for low.
    """

    path: Path
    files: PartFiles
    model: str | None
    config: WanConfig
    codec: WanVAEConfig
    sampling: Sampling
    own_shift: bool
    is_pair: bool = False

    @property
    def conditioning(self) -> WanConditioning:
        """Wan's rules for requests."""
        return WanConditioning(self.config)

    @property
    def published(self) -> SparsitySchedule:
        """The rule of the published code of DraftAttention, for each of a pair."""
        if self.is_pair:
            return SparsitySchedule.wan_pair_published()
        return SparsitySchedule.wan_published()

    def sampling_at(self, height: int, width: int) -> Sampling:
        """Returns the settings for another size: the shift that Wan takes there."""
        sampling = dataclasses.replace(self.sampling, height=height, width=width)
        if self.own_shift:
            return sampling
        shift = wan_shift(_task(self.config), height, width)
        return dataclasses.replace(sampling, shift=shift)

    def mag_ratios(self, sampling: Sampling, *, from_image: bool) -> MagRatios | None:
        """Returns the ratios published for a model of these sizes, if there are.

        Those of image-to-video models at 480p and 720p, which have the same sizes,
        are told apart by the size of the video.
        """
        sizes = ("dim", "ffn_dim", "num_layers", "in_channels", "image_dim")
        if self.is_pair:
            kind = "i2v" if self.config.takes_image else "t2v"
            same = self.config.dim == WanConfig.t2v_14b().dim
            return published_ratios(f"wan2.2-{kind}-a14b") if same else None
        kind = "image" if from_image else "text"
        small = sampling.height * sampling.width < _BETWEEN_SIZES
        for name, published in (
            ("wan2.1-t2v-1.3b", WanConfig.t2v_1_3b()),
            ("wan2.1-t2v-14b", WanConfig.t2v_14b()),
            (f"wan2.1-i2v-14b-{'480p' if small else '720p'}", WanConfig.i2v_14b()),
            (f"wan2.2-ti2v-5b-{kind}", WanConfig.ti2v_5b()),
        ):
            if all(getattr(self.config, s) == getattr(published, s) for s in sizes):
                return published_ratios(name)
        return None


def describe_wan(
    path: Path | str,
    *,
    parts: Collection[Part] = ALL_PARTS,
    text: TextOptions | None = None,
    files: PartFiles | None = None,
    revision: str | None = None,
) -> WanInfo:
    """Opens a model to look at its settings; fetches it if it is on the hub.

    Takes and raises what `load_wan` does.
    """
    wan = open_wan_parts(
        path, parts=_needed(parts, text), files=files, revision=revision
    )
    return WanInfo(
        path=wan.path,
        files=wan.given,
        model=wan.model,
        config=wan.config,
        codec=_vae_config(wan),
        sampling=_sampling(wan),
        own_shift=_has_own_shift(wan) or wan.low is not None,
        is_pair=wan.low is not None,
    )


def load_wan(
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
    """Loads a pipeline: text first, for it may be freed; then the rest.

    Args:
      path: The model's folder, its repository on the hub, or the `.safetensors` file
        of its transformer.
      parts: What to load; see `open_wan_parts`.
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
      ValueError: `parts` lacks the VAE, an image encoder is given for a model that
        takes no image, the device has no FP8, or the mesh does not fit.
    """
    text = text or TextOptions()
    wan = open_wan_parts(
        path,
        dtype=default_dtype(),
        parts=_needed(parts, text),
        loras=loras,
        lora_strict=lora_strict,
        files=files,
        revision=revision,
        linears=choose_linears(linears),
    )
    vae = _vae_config(wan)
    if wan.vae is None:
        raise ValueError("parts must hold 'vae', which decodes the latents")
    # The transformer last: it takes minutes, and what is wrong shows before.
    with fitting("text_encoder", wan.sources.get("text_encoder")):
        text_encoder = load_text_encoder(wan, text)
    with fitting("image_encoder", wan.sources.get("image_encoder")):
        image_encoder = _load_image_encoder(wan)
    codec = _load_codec(wan, vae)
    _LOG.info("loading the transformer")
    experts, model = None, None
    if wan.low is None:
        model = wan.load_transformer(mesh)
    else:
        model, experts = make_experts(
            wan.config,
            {
                "high": functools.partial(wan.load_transformer, mesh),
                "low": functools.partial(wan.load_low, mesh),
            },
            streamed=None if mesh is None else False,
        )
    return VideoPipeline(
        model=model,
        experts=experts,
        text_encoder=text_encoder,
        codec=codec,
        image_encoder=image_encoder,
        sampling=_sampling(wan),
        fps=TI2V_FPS if wan.config.holds_first_frame else WAN_FPS,
        mesh=mesh,
    )


def load_wan_codec(
    path: Path | str, *, files: PartFiles | None = None, revision: str | None = None
) -> WanVAECodec:
    """Loads the autoencoder alone; takes and raises what `load_wan` does."""
    wan = open_wan_parts(
        path, dtype=default_dtype(), parts={"vae"}, files=files, revision=revision
    )
    return _load_codec(wan, _vae_config(wan))


def _load_codec(wan: WanParts, config: WanVAEConfig) -> WanVAECodec:
    assert wan.vae is not None  # it was asked for
    _LOG.info("loading the VAE")
    with fitting("vae", wan.sources.get("vae")):
        return WanVAECodec(model=load_wan_vae(wan.vae, config))


def _needed(parts: Collection[Part], text: TextOptions | None) -> set[Part]:
    """Returns the parts to open; the packages that their prompts need are there."""
    given = text is not None and text.given
    if "text_encoder" in parts:
        check_text_packages(tokenizer=not given)
    return set(parts).difference(TEXT_PARTS if given else ())


def _vae_config(wan: WanParts) -> WanVAEConfig:
    of_5b = wan.config.holds_first_frame
    default = WanVAEConfig.wan2_2 if of_5b else WanVAEConfig.wan2_1
    return wan.read_config("vae", WanVAEConfig.from_dict, default)


def _load_image_encoder(wan: WanParts) -> CLIPImageEncoder | None:
    if wan.image_encoder is None:
        return None
    config = wan.read_config(
        "image_encoder",
        CLIPVisionConfig.from_dict,
        CLIPVisionConfig.vit_h_14,
        dtype=wan.config.dtype,
        param_dtype=wan.config.dtype,
    )
    _LOG.info("loading the image encoder")
    return CLIPImageEncoder.load(wan.image_encoder, config=config)


def _sampling(wan: WanParts) -> Sampling:
    """Returns Wan's own settings, or the scheduler's in a folder of diffusers.

    Of a pair Wan's own are taken: the schedulers of the published folders have another
    shift, with which too few steps are those of high noise.

    The 1.3B model was trained at 480p only.
    """
    if wan.low is not None:
        own = a14b_sampling(task=_task(wan.config))
        note_other_settings(
            own,
            wan.scheduler,
            config=wan.config,
            boundary_ratio=wan.boundary_ratio,
        )
        return own
    settings: dict[str, Any] = {"solver": wan.scheduler.solver}
    if _has_own_shift(wan):
        settings["shift"] = wan.scheduler.shift
        settings["grid"] = wan.scheduler.grid
    if wan.config.holds_first_frame:
        return ti2v_sampling(**settings)
    size: WanSize = "720p" if wan.config.dim >= WanConfig.t2v_14b().dim else "480p"
    return wan_sampling(size, task=_task(wan.config), **settings)


def _has_own_shift(wan: WanParts) -> bool:
    return wan.scheduler.grid == "diffusers"


def _task(config: WanConfig) -> WanTask:
    return "image" if config.takes_image else "text"
