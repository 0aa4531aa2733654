"""Opens folders of published Wan models and loads their parts.

Two layouts are published; see `models.wan.layouts`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.conversion import ConversionError
from models.checkpoints.hub import find_checkpoint
from models.checkpoints.memory_map import CheckpointError
from models.diffusion.adapters import check_no_expert, loras_of, merge_adapters
from models.diffusion.folders.layouts import (
    ALL_PARTS,
    FolderLayouts,
    LayoutName,
    Part,
)
from models.diffusion.folders.part_files import (
    PartFiles,
    PartSource,
    check_complete,
    check_files,
    find_layout,
    find_part,
    naming,
    read_json,
    source_in,
)
from models.diffusion.folders.scheduler_settings import (
    SchedulerSettings,
    read_scheduler,
)
from models.diffusion.mesh import DeviceMesh
from models.umt5.tokenizer import find_tokenizer, search_tokenizer
from models.wan.config import WanConfig
from models.wan.convert import (
    LORA_FEATURES,
    load_wan_transformer,
    lora_names,
)
from models.wan.layouts import (
    LAYOUTS,
    LAYOUTS_PAIR,
    hub_patterns,
    layouts_of,
    read_index,
)
from models.wan.pair import check_pair, note_named_adapters
from models.wan.transformer import WanTransformer
from models.wan.transformer_file import TransformerFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanFolder:
    """A folder of a published model, checked for being complete.

    Attributes:
      path: The folder.
      layouts: Files of models of its kind.
      layout: Published layout.
      parts: The parts that it was checked for.
      transformer_config: The transformer's `config.json` as it is.
      index: What diffusers says of the pipeline; empty in the original layout.
    """

    path: Path
    layouts: FolderLayouts
    layout: LayoutName
    parts: frozenset[Part]
    transformer_config: Mapping[str, Any]
    index: Mapping[str, Any]

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, parts: Collection[Part] = ALL_PARTS
    ) -> "WanFolder":
        """Looks at a folder without reading weights.

        Args:
          path: The folder.
          parts: Parts that must be there. An image encoder is asked for only in a
            model that sees its tokens, and no scheduler in the original layout.

        Raises:
          CheckpointError: The path is no folder of a Wan model, files are missing
            (all are named), or its `config.json` is damaged.
          ValueError: There is no such part.
        """
        if unknown := sorted(set(parts) - set(ALL_PARTS)):
            raise ValueError(f"parts={unknown} must be among {ALL_PARTS}")
        path = Path(path)
        layouts = layouts_of(path)
        layout = find_layout(layouts, path)
        config: dict[str, Any] = {}
        file = path / layouts.files[layout]["transformer"][0]
        if file.is_file():
            config = read_json(file)
        wanted = {part for part in parts if part in layouts.files[layout]}
        if layouts is LAYOUTS_PAIR or not _sees_image_tokens(config):
            wanted.discard("image_encoder")
        needed = {
            part: layouts.files[layout][part] for part in ALL_PARTS if part in wanted
        }
        # The transformer's configuration tells what the model is.
        needed.setdefault("transformer", layouts.files[layout]["transformer"][:1])
        check_files(layouts, path, layout, needed)
        return cls(
            path=path,
            layouts=layouts,
            layout=layout,
            parts=frozenset(wanted),
            transformer_config=config,
            index=read_index(path),
        )

    @property
    def is_pair(self) -> bool:
        """Whether there is a transformer for high noise, and one for low."""
        return self.layouts is LAYOUTS_PAIR

    def config(self, **changes: Any) -> WanConfig:
        """Reads the transformer's sizes; `changes` as in `WanConfig.from_dict`.

        Raises:
          CheckpointError: This port lacks what `config.json` asks for.
        """
        try:
            return self.config_of(self.transformer_config, **changes)
        except (ValueError, TypeError) as error:
            file = self.path / self.layouts.files[self.layout]["transformer"][0]
            raise CheckpointError(f"{file}: {error}") from error

    def config_of(self, published: Mapping[str, Any], **changes: Any) -> WanConfig:
        """Reads the sizes of a transformer's `config.json` in this folder."""
        if self.index.get("expand_timesteps") is True:
            changes = {"holds_first_frame": True} | changes
        if self.is_pair and self.layout == "original":
            # Its files are those of Wan2.1, whose models from an image see tokens.
            changes = {"image_dim": None} | changes
        return WanConfig.from_dict(published, **changes)

    def source(self, part: Part) -> PartSource:
        """Opens a part; see `models.diffusion.folders.part_files.source_in`."""
        return source_in(self.layouts, self.path, self.layout, part)

    def part_config(self, part: Part) -> dict[str, Any] | None:
        """Reads a part's `config.json`.

        The original layout has one for the transformer only: its other parts are of
        one size in every model of a kind, and the result is None.

        Raises:
          CheckpointError: The file is missing or damaged.
        """
        patterns = self.layouts.files[self.layout].get(part, ("",))
        if not patterns[0].endswith(".json"):
            return None
        return read_json(self.path / patterns[0])

    @property
    def tokenizer(self) -> Path:
        """The folder of the text encoder's tokenizer."""
        return (self.path / self.layouts.files[self.layout]["tokenizer"][0]).parent

    def scheduler(self) -> SchedulerSettings:
        """Reads how the model is sampled; see `read_scheduler`."""
        stored = self.part_config("scheduler")
        if stored is None:
            return SchedulerSettings()
        file = self.path / self.layouts.files[self.layout]["scheduler"][0]
        return read_scheduler(stored, file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanParts:
    """The parts of a pipeline, opened but not loaded.

    Weights are left on disk, as arrays by key that are read when they are used. A part
    may be loaded to another device, freed before the next is, or not loaded.

    Attributes:
      path: The model's folder, of a repository that of one commit; or its file.
      model: Name of a model that was told by its shapes; None if a `config.json` was
        read.
      config: The transformer's configuration.
      weights: The transformer's weights, adapters included.
      files: The files of the transformer.
      given: Parts that were given by themselves, as paths on this machine.
      scheduler: The sampler that the model is published with.
      sources: The other parts that were asked for, and that the model needs.
      tokenizer: The text encoder's tokenizer, a folder or a file; None if not asked
        for.
      low: The transformer for low noise of a pair, adapters included: then `weights`
        are those for high noise. None for one transformer.
      boundary_ratio: What diffusers' file of a pair says of its boundary, if anything.
    """

    path: Path
    model: str | None
    config: WanConfig
    weights: Mapping[str, Any]
    files: tuple[Path, ...]
    given: PartFiles
    scheduler: SchedulerSettings
    sources: Mapping[Part, PartSource]
    tokenizer: Path | None
    low: PartSource | None = None
    boundary_ratio: float | None = None

    @property
    def text_encoder(self) -> Mapping[str, Any] | None:
        """UMT5's weights; None if they were not asked for."""
        return self._weights("text_encoder")

    @property
    def vae(self) -> Mapping[str, Any] | None:
        """The video autoencoder's weights; None if they were not asked for."""
        return self._weights("vae")

    @property
    def image_encoder(self) -> Mapping[str, Any] | None:
        """CLIP's weights; None if not asked for, or the model takes no image."""
        return self._weights("image_encoder")

    def _weights(self, part: Part) -> Mapping[str, Any] | None:
        return self.sources[part].weights if part in self.sources else None

    def read_config[Config](
        self,
        part: Part,
        read: Callable[..., Config],
        default: Callable[..., Config],
        **changes: Any,
    ) -> Config:
        """Reads a part's sizes; see `PartSource.read_config`.

        A part that was not asked for has the default's.
        """
        if part not in self.sources:
            return default(**changes)
        return self.sources[part].read_config(read, default, **changes)

    def load_transformer(self, mesh: DeviceMesh | None = None) -> WanTransformer:
        """Loads the transformer onto JAX's default device, or those of a mesh.

        Of a pair it is the first.

        Raises:
          CheckpointError: The weights are damaged or do not fit `config.json`; the
            first keys at fault are listed.
        """
        return self._load(self.weights, self.files, mesh)

    def load_low(self, mesh: DeviceMesh | None = None) -> WanTransformer:
        """Loads a pair's transformer for low noise, likewise."""
        assert self.low is not None, "called of pairs"
        return self._load(self.low.weights, self.low.files, mesh)

    def _load(
        self,
        weights: Mapping[str, Any],
        files: tuple[Path, ...],
        mesh: DeviceMesh | None = None,
    ) -> WanTransformer:
        try:
            return load_wan_transformer(weights, self.config, mesh=mesh)
        except ConversionError as error:
            raise CheckpointError(
                f"the transformer in {files[0].parent} does not fit its config.json: "
                f"{error}"
            ) from error


def open_wan_parts(
    name: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    parts: Collection[Part] = ALL_PARTS,
    loras: Iterable[tuple[str | os.PathLike, float]] = (),
    lora_strict: bool = True,
    files: PartFiles | None = None,
    revision: str | None = None,
    **changes: Any,
) -> WanParts:
    """Opens a published model: everything is checked but the weights' values.

    Args:
      name: The model's folder, or its repository on the hub, such as
        "Wan-AI/Wan2.1-T2V-14B"; of a repository only `parts` are fetched. Or the
        `.safetensors` file of a transformer; `files` are the rest then.
      dtype: The transformer computes in it.
      param_dtype: Its weights are stored in it, but for the few that it computes
        with in float32 (`models.wan.convert.FLOAT32`); `dtype` if None.
      parts: Parts that are needed; not the text encoder, say, if embeddings have
        been made before. The transformer always is.
      loras: Adapters to merge, each a `.safetensors` file and its strength. Of a pair
        "high:FILE" and "low:FILE" are for one transformer, others for both.
      lora_strict: Whether parts of adapters that mean nothing to this model are
        refused; else they are skipped with a warning.
      files: Parts that are given by themselves; the model's own are left alone.
      revision: Branch, tag or commit of a repository. It is looked up once: all that
        is fetched is of one commit.
      **changes: Other fields of `WanConfig` to set, such as `tile`.

    Returns:
      The parts; nothing is in memory yet.

    Raises:
      CheckpointError: The model cannot be found, is incomplete, damaged, or of a
        kind this port lacks; or an adapter is damaged.
      ConversionError: An adapter does not fit.
      ImportError: The model is on the hub, and `huggingface_hub` is not installed.
      ValueError: `revision` is given for a path, or an image encoder for a model that
        takes no image.
    """
    parts = {*parts, "transformer", "transformer_2"}
    files = (files or PartFiles()).fetched(parts, LAYOUTS)
    given = files.given()
    sources: dict[Part, PartSource] = {
        part: find_part(layouts_of(file), part, file)
        for part, file in given.items()
        if part != "tokenizer"
    }
    tokenizer = _find_tokenizer(given, sources) if "tokenizer" in parts else None
    own = parts - sources.keys() - ({"tokenizer"} if tokenizer else set())
    path = find_checkpoint(name, patterns=hub_patterns(own), revision=revision)
    changes |= {"dtype": dtype, "param_dtype": param_dtype or dtype}
    wan = (_open_file if path.is_file() else _open_folder)(path, own, changes)
    if "image_encoder" in sources and wan.config.image_dim is None:
        raise ValueError(
            f"image_encoder={os.fspath(given['image_encoder'])!r} is given, but {path} "
            "is a text-to-video model, or one that needs none"
        )
    merge = functools.partial(
        merge_adapters, names_of=lora_names, strict=lora_strict, features=LORA_FEATURES
    )
    loras, low = list(loras), wan.low
    if low is None:
        check_no_expert(loras, path)
    else:
        check_pair(wan.weights, low.weights, {"high": wan.files, "low": low.files})
        note_named_adapters(loras)
        low = dataclasses.replace(
            low, weights=merge(low.weights, loras_of("low", loras))
        )
    return dataclasses.replace(
        wan,
        weights=merge(wan.weights, loras_of("high", loras)),
        low=low,
        given=files,
        sources={**wan.sources, **sources},
        tokenizer=tokenizer or wan.tokenizer,
    )


def _find_tokenizer(
    given: Mapping[Part, Path], sources: Mapping[Part, PartSource]
) -> Path | None:
    """Returns the tokenizer that is given, or that lies beside a given encoder."""
    if "tokenizer" in given:
        with naming("tokenizer", given["tokenizer"]):
            return find_tokenizer(given["tokenizer"])
    if "text_encoder" in sources:
        folder = sources["text_encoder"].files[0].parent
        return search_tokenizer([folder, folder.parent])
    return None


def _open_file(
    path: Path, parts: Collection[Part], changes: dict[str, Any]
) -> WanParts:
    """Opens a transformer in one file; `parts` are those that nobody has given."""
    file = TransformerFile.open(path, **changes)
    sees_tokens = file.config.image_dim is not None
    needed = {*parts} if sees_tokens else {*parts} - {"image_encoder"}
    check_complete(LAYOUTS, path, needed)
    return WanParts(
        path=path,
        model=file.model,
        config=file.config,
        weights=file.weights,
        files=(path,),
        given=PartFiles(),
        scheduler=SchedulerSettings(),
        sources={},
        tokenizer=None,
    )


def _open_folder(
    path: Path, parts: Collection[Part], changes: dict[str, Any]
) -> WanParts:
    """Opens a model's folder for those parts."""
    folder = WanFolder.open(path, parts=parts)
    config = folder.config(**changes)
    transformer = folder.source("transformer")
    others: tuple[Part, ...] = ("text_encoder", "vae", "image_encoder")
    low = None
    if folder.is_pair:
        low = folder.source("transformer_2")
        second = low.read_config(folder.config_of, WanConfig, **changes)
        if second != config:
            raise CheckpointError(
                f"{low.config_file} has other sizes than {transformer.config_file}: "
                f"{second} and {config}; expected two transformers of one kind"
            )
    return WanParts(
        path=path,
        model=None,
        config=config,
        weights=transformer.weights,
        files=transformer.files,
        given=PartFiles(),
        scheduler=folder.scheduler() if "scheduler" in parts else SchedulerSettings(),
        sources={part: folder.source(part) for part in others if part in folder.parts},
        tokenizer=folder.tokenizer if "tokenizer" in parts else None,
        low=low,
        boundary_ratio=folder.index.get("boundary_ratio"),
    )


def names_wan(path: Path) -> bool:
    """Returns whether a `config.json` alone is that of Wan's own code."""
    file = path / layouts_of(path).files["original"]["transformer"][0]
    if not file.is_file():
        return False
    stored = read_json(file)
    kinds = ("t2v", "i2v", "ti2v")
    return stored.get("model_type") in kinds and LAYOUTS.claims(path)


def _sees_image_tokens(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "i2v" or config.get("image_dim") is not None
