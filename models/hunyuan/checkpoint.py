"""Opens folders and files of published HunyuanVideo models."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from models.checkpoints.conversion import ConversionError, check_parameters
from models.checkpoints.files import find_visible
from models.checkpoints.hub import find_checkpoint
from models.checkpoints.memory_map import CheckpointError
from models.diffusion.adapters import merge_adapters
from models.diffusion.folders.layouts import LayoutName, Part
from models.diffusion.folders.part_files import (
    PartFiles,
    PartSource,
    check_complete,
    check_files,
    find_layout,
    find_part,
    read_json,
    source_in,
)
from models.diffusion.folders.scheduler_settings import read_scheduler
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import (
    LORA_FEATURES,
    RULES,
    STACKED,
    detect_layout,
    lora_names,
    open_transformer_weights,
)
from models.hunyuan.layouts import LAYOUTS, TEXT_PARTS
from models.hunyuan.text_files import HunyuanTextFiles
from models.hunyuan.transformer import HunyuanTransformer

_MODEL = "HunyuanVideo"
_SUFFIXES = (".safetensors", ".pt")
NO_I2V = "HunyuanVideo-I2V, which starts from an image, is not supported"
# Its later model has the keys and shapes of HunyuanVideo: only names tell it.
_I2V_NAME = re.compile(r"i2v|image[-_ ]?to[-_ ]?video", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanParts:
    """The parts of a pipeline, opened but not loaded.

    Attributes:
      path: The model's folder, of a repository that of one commit; or its file.
      model: Name of a model that was told by its shapes; None if a `config.json` was
        read.
      config: The transformer's configuration.
      transformer: The transformer's weights, adapters included, and their files.
      vae: The autoencoder's.
      given: Parts that were given by themselves, as paths on this machine.
      text_files: The text encoders; None if they were not asked for.
      shift: Shift of the noise levels.
    """

    path: Path
    model: str | None
    config: HunyuanConfig
    transformer: PartSource
    vae: PartSource
    given: PartFiles
    text_files: HunyuanTextFiles | None
    shift: float


def open_hunyuan_parts(
    name: Path | str,
    *,
    parts: Collection[Part],
    loras: Iterable[tuple[Path | str, float]] = (),
    lora_strict: bool = True,
    files: PartFiles | None = None,
    revision: str | None = None,
    **changes: Any,
) -> HunyuanParts:
    """Opens a published model: everything is checked but the weights' values.

    Args:
      name: The model's folder, its repository on the hub, or a file of a transformer;
        `files` are the rest then.
      parts: Parts that are needed. The transformer and the autoencoder always are.
      loras: Adapters to merge, each a `.safetensors` file and its strength.
      lora_strict: Whether parts of adapters that mean nothing to this model are
        refused; else they are skipped with a warning.
      files: Parts that are given by themselves; the model's own are left alone.
      revision: Branch, tag or commit of a repository.
      **changes: Fields of `HunyuanConfig` to set, such as `dtype`.

    Raises:
      CheckpointError: The model cannot be found, is incomplete or damaged, or of a
        kind this port lacks; or an adapter is damaged.
      ConversionError: An adapter does not fit.
      ImportError: The model is on the hub, and `huggingface_hub` is not installed.
    """
    wanted: set[Part] = {*parts, "transformer", "vae", "scheduler"}
    given = (files or PartFiles()).fetched(wanted, LAYOUTS)
    own = wanted - given.given().keys()
    path = find_checkpoint(name, patterns=LAYOUTS.hub_patterns(own), revision=revision)
    needs_text = not wanted.isdisjoint(TEXT_PARTS)
    shift = 7.0
    if path.is_file():
        check_complete(LAYOUTS, path, own)
        model, config, transformer = _open_file(path, changes)
        layout, folder = None, None
    else:
        model, folder = None, path
        layout = _check_folder(path, own)
        transformer = source_in(LAYOUTS, path, layout, "transformer")
        config = transformer.read_config(
            HunyuanConfig.from_dict, HunyuanConfig.video_13b, **changes
        )
        shift = _read_shift(path, layout)
    if given.vae is not None:
        vae = find_part(LAYOUTS, "vae", Path(given.vae))
    else:
        assert layout is not None  # a file alone was found to be incomplete
        vae = source_in(LAYOUTS, path, layout, "vae")
    weights = merge_adapters(
        transformer.weights,
        loras,
        functools.partial(lora_names, config=config),
        strict=lora_strict,
        features=LORA_FEATURES,
    )
    return HunyuanParts(
        path=path,
        model=model,
        config=config,
        transformer=dataclasses.replace(transformer, weights=weights),
        vae=vae,
        given=given,
        text_files=_find_text(folder, given) if needs_text else None,
        shift=shift,
    )


def is_hunyuan_file(path: Path) -> bool:
    """Returns whether a file holds a HunyuanVideo transformer, by its keys."""
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        return False
    if path.suffix.lower() == ".pt":
        return True  # no other family takes one
    try:
        weights = open_transformer_weights(path)
    except (CheckpointError, OSError):
        return False
    signs = ("double_blocks.", "single_transformer_blocks.")
    return any(key.startswith(signs) for key in weights)


def _open_file(
    path: Path, changes: Mapping[str, Any]
) -> tuple[str, HunyuanConfig, PartSource]:
    """Opens a transformer in one file, which must have the published sizes."""
    _check_no_fp8(path)
    _check_no_i2v(path)
    weights = open_transformer_weights(path)
    config = HunyuanConfig.video_13b(**changes)
    try:
        check_parameters(
            lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)),
            weights,
            RULES[detect_layout(weights)],
            stacked=STACKED,
        )
    except ConversionError as error:
        raise CheckpointError(
            f"{path} is not {_MODEL}{_explain(weights)}: {error}"
        ) from error
    return _MODEL, config, PartSource(weights=weights, files=(path,))


def _explain(weights: Mapping[str, Any]) -> str:
    """Says what a file of another kind is, if its keys tell."""
    keys = list(weights)
    if any(key.startswith(("audio_", "bg_in", "bg_proj")) for key in keys):
        return " (HunyuanCustom's audio and editing variants are not supported)"
    if any("lora_" in key for key in keys):
        return " (it is an adapter)"
    first = ("img_in.proj.weight", "x_embedder.proj.weight")
    shapes = [weights[key].shape for key in first if key in weights]
    if any(shape[1:2] == (33,) for shape in map(tuple, shapes)):
        return f" ({NO_I2V})"
    embeds = ("guidance_in", "time_text_embed.guidance_embedder")
    if not any(key.startswith(embeds) for key in keys):
        return (
            " (it embeds no guidance: HunyuanCustom and models before distillation "
            "are not loaded)"
        )
    return ""


def _check_no_fp8(path: Path) -> None:
    if path.suffix == ".pt" and "fp8" in path.name:
        raise CheckpointError(
            f"{path}: FP8 weights whose scales are in a map beside them are not read; "
            "expected mp_rank_00_model_states.pt"
        )


def _check_no_i2v(path: Path) -> None:
    # The original's file has one name in every model: its folder tells.
    named = path.name if path.suffix != ".pt" else path.absolute().parent.parent.name
    if _I2V_NAME.search(named):
        raise CheckpointError(f"{path}, by the name {named}: {NO_I2V}")


def _check_folder(path: Path, parts: Collection[Part]) -> LayoutName:
    """Returns a folder's layout; raises if files of the parts are missing."""
    layout = find_layout(LAYOUTS, path)
    table = LAYOUTS.files[layout]
    if not find_visible(path, table["transformer"][-1]):
        for fp8 in find_visible(path, "*/transformers/*_fp8.pt"):
            _check_no_fp8(fp8)
    needed = {part: files for part, files in table.items() if part in parts}
    check_files(LAYOUTS, path, layout, needed)
    return layout


def _read_shift(path: Path, layout: LayoutName) -> float:
    """Returns the scheduler's shift; the original's is 7."""
    if layout == "original":
        return 7.0
    file = path / LAYOUTS.files[layout]["scheduler"][0]
    settings = read_scheduler(read_json(file), file)
    if settings.solver != "euler":
        raise CheckpointError(
            f"{file} names the solver {settings.solver}; HunyuanVideo's is euler "
            "(FlowMatchEulerDiscreteScheduler)"
        )
    return settings.shift


def _find_text(folder: Path | None, given: PartFiles) -> HunyuanTextFiles:
    """Returns the folders of the text encoders, those that are given first."""

    def find(encoder: Part, tokenizer: Part) -> tuple[Path, Path]:
        paths = given.given()
        own = paths.get(encoder) or folder
        assert own is not None  # a file alone was found to be incomplete
        beside = own / tokenizer
        own = own / encoder if (own / encoder).is_dir() else own
        chosen = paths.get(tokenizer) or (beside if beside.is_dir() else own)
        inner = chosen / tokenizer
        return own, inner if inner.is_dir() else chosen

    first, second = (
        find("text_encoder", "tokenizer"),
        find("text_encoder_2", "tokenizer_2"),
    )
    return HunyuanTextFiles(
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
    )
