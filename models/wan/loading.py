"""A pipeline's parts from a published Wan folder, in an order that saves memory."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from models.clip.config import CLIPVisionConfig
from models.clip.image_encoder import CLIPImageEncoder
from models.memory_map import CheckpointError
from models.umt5.config import UMT5Config
from models.umt5.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
    encoder_identity,
)
from models.umt5.text_encoder import UMT5TextEncoder, default_dtype
from models.umt5.tokenizer import UMT5Tokenizer
from models.wan.checkpoint import (
    ALL_PARTS,
    Part,
    WanFolder,
    WanParts,
    find_layout,
    open_wan_parts,
)
from models.wan.conditions import takes_image
from models.wan.config import WanConfig
from models.wan.interfaces import TextEncoder
from models.wan.sampling import Sampling, WanSize, WanTask, wan_shift
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import load_wan_vae

WAN_FPS = 16.0  # of the videos that Wan was trained on
_TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a Wan model's prompts become embeddings.

    Attributes:
      prompts: Encoded before the transformer is loaded, after which the text encoder
        (11 GB) is freed; `generate` then takes these alone, and what `embeddings`
        has. Negative prompts count. None keeps the encoder in memory for any prompt.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedWan:
    """The fields of a `VideoPipeline`."""

    model: WanTransformer
    text_encoder: TextEncoder | None
    codec: WanVAECodec
    image_encoder: CLIPImageEncoder | None
    sampling: Sampling
    fps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanInfo:
    """What a Wan folder says of its model, told without reading weights.

    Attributes:
      config: Of the transformer.
      vae: Of the autoencoder.
      sampling: The settings that `generate` takes by default.
      own_shift: Whether the folder has a scheduler, which says its shift.
    """

    config: WanConfig
    vae: WanVAEConfig
    sampling: Sampling
    own_shift: bool

    def sampling_at(self, height: int, width: int) -> Sampling:
        """The settings for another size: the shift that Wan takes there."""
        sampling = dataclasses.replace(self.sampling, height=height, width=width)
        if self.own_shift:
            return sampling
        shift = wan_shift(_task(self.config), height, width)
        return dataclasses.replace(sampling, shift=shift)


def is_wan(path: Path | str) -> bool:
    """Whether a checkpoint is a Wan folder, or else a name to look for on the hub."""
    return find_layout(path) is not None or not Path(path).exists()


def describe_wan(
    path: Path | str,
    *,
    parts: Collection[Part] = ALL_PARTS,
    text: TextOptions | None = None,
) -> WanInfo:
    """Opens a model to look at its settings; fetches it if it is on the hub.

    Takes and raises what `load_wan` does.
    """
    wan = open_wan_parts(path, parts=_needed(parts, text))
    return WanInfo(
        config=wan.config,
        vae=_vae_config(wan.folder),
        sampling=_sampling(wan),
        own_shift=wan.folder.layout == "diffusers",
    )


def load_wan(
    path: Path | str,
    *,
    parts: Collection[Part] = ALL_PARTS,
    loras: Iterable[tuple[Path | str, float]] = (),
    text: TextOptions | None = None,
) -> LoadedWan:
    """Loads what a pipeline needs: text first, for it may be freed; then the rest.

    Args:
      path: The model's folder, or its repository on the hub.
      parts: What to load; see `open_wan_parts`.
      loras: Adapters to merge, each with its strength.
      text: How prompts become embeddings; `TextOptions()` if None.

    Raises:
      CheckpointError: The model cannot be found, is incomplete, damaged, or of a
        kind this port lacks; or an adapter or stored embeddings are damaged.
      ConversionError: An adapter or a part does not fit.
      ImportError: An optional package is needed and not installed.
      UnknownPromptError: Prompts are not among the embeddings of a file.
      ValueError: `parts` lacks the VAE.
    """
    text = text or TextOptions()
    wan = open_wan_parts(
        path, dtype=default_dtype(), parts=_needed(parts, text), loras=loras
    )
    if wan.vae is None:
        raise ValueError("parts must hold 'vae', which decodes the latents")
    text_encoder = _load_text_encoder(wan, text)
    return LoadedWan(
        model=wan.load_transformer(),
        text_encoder=text_encoder,
        codec=WanVAECodec(model=load_wan_vae(wan.vae, _vae_config(wan.folder))),
        image_encoder=_load_image_encoder(wan),
        sampling=_sampling(wan),
        fps=WAN_FPS,
    )


def _needed(parts: Collection[Part], text: TextOptions | None) -> set[Part]:
    without = _TEXT_PARTS if text is not None and text.given else ()
    return set(parts).difference(without)


def _vae_config(folder: WanFolder) -> WanVAEConfig:
    stored = folder.part_config("vae") if "vae" in folder.parts else None
    return WanVAEConfig.from_dict(stored) if stored else WanVAEConfig.wan2_1()


def _load_text_encoder(wan: WanParts, options: TextOptions) -> TextEncoder | None:
    """What makes contexts; `options.prompts` have been through it."""
    prompts = options.prompts
    length = wan.config.text_length
    if options.embeddings is not None and options.given:
        encoder: Any = GivenTextEncoder.load(options.embeddings, text_length=length)
    elif wan.text_encoder is None or wan.tokenizer is None:
        return None
    else:
        load = functools.partial(
            UMT5TextEncoder.load,
            wan.text_encoder,
            wan.tokenizer,
            config=_text_config(wan.folder, wan.text_encoder, options.device),
            max_length=length,
            device=options.device,
        )
        if options.embeddings is None:
            encoder = load()
            if prompts is not None:
                vectors = encoder.embed(prompts)
                encoder.free()
                encoder = GivenTextEncoder(embeddings=vectors, text_length=length)
            return encoder
        encoder = CachedTextEncoder(
            cache=_cache(wan, options.embeddings, load.keywords["config"]),
            text_length=length,
            load_encoder=load,
        )
    if prompts is not None:
        encoder.encode(prompts)
    return encoder


def _cache(wan: WanParts, folder: Path, config: UMT5Config) -> EmbeddingCache:
    assert wan.tokenizer is not None
    identity = encoder_identity(
        config,
        UMT5Tokenizer(wan.tokenizer, max_length=wan.config.text_length),
        wan.folder.weight_files("text_encoder"),
    )
    return EmbeddingCache(folder=folder, identity=identity)


def _text_config(
    folder: WanFolder, weights: Mapping[str, Any], device: jax.Device | None
) -> UMT5Config:
    """Computes in what is fast on the device; stores what the file has, or less."""
    dtype = default_dtype(device)
    narrow = all(weights[key].dtype.name == "bfloat16" for key in weights)
    dtypes = {"dtype": dtype, "param_dtype": "bfloat16" if narrow else dtype}
    stored = folder.part_config("text_encoder")
    if stored is None:
        return UMT5Config.xxl(**dtypes)
    return UMT5Config.from_dict(stored, **dtypes)


def _load_image_encoder(wan: WanParts) -> CLIPImageEncoder | None:
    if wan.image_encoder is None:
        return None
    stored = wan.folder.part_config("image_encoder")
    dtypes = {"dtype": wan.config.dtype, "param_dtype": wan.config.dtype}
    config = (
        CLIPVisionConfig.from_dict(stored, **dtypes)
        if stored
        else CLIPVisionConfig.vit_h_14(**dtypes)
    )
    return CLIPImageEncoder.load(wan.image_encoder, config=config)


def _sampling(wan: WanParts) -> Sampling:
    """Wan's own settings for this model; a folder of diffusers has its scheduler's.

    The 1.3B model was trained at 480p only.
    """
    settings: dict[str, Any] = {"solver": wan.scheduler.solver}
    if wan.folder.layout == "diffusers":
        settings["shift"] = wan.scheduler.shift
        settings["grid"] = wan.scheduler.grid if wan.scheduler.grid != "wan" else None
    size: WanSize = "720p" if wan.config.dim >= WanConfig.t2v_14b().dim else "480p"
    return Sampling.wan(size, task=_task(wan.config), **settings)


def _task(config: WanConfig) -> WanTask:
    return "image" if takes_image(config) else "text"
