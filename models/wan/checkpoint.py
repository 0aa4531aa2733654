"""Opens folders of published Wan2.1 models and loads their parts.

Two layouts are published; see `models.wan.layouts`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from models.checkpoints.conversion import ConversionError
from models.checkpoints.files import find_visible
from models.checkpoints.hub import find_checkpoint
from models.checkpoints.lora import merge_lora
from models.checkpoints.memory_map import CheckpointError
from models.wan.config import WanConfig
from models.wan.convert import (
    LORA_FEATURES,
    LayoutName,
    load_wan_transformer,
    lora_names,
)
from models.wan.layouts import (
    ALL_PARTS,
    LAYOUTS,
    Part,
    describe_layouts,
    describe_neighbour,
    find_layout,
    hub_patterns,
)
from models.wan.part_files import open_part_weights
from models.wan.transformer import WanTransformer

# Settings that the solvers here have; others in a scheduler's file are refused.
_SCHEDULER_ALWAYS = {
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_SCHEDULER_FIXED: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": _SCHEDULER_ALWAYS
    | {
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "bh2",
        "thresholding": False,
        "use_flow_sigmas": True,
    },
    "FlowMatchEulerDiscreteScheduler": _SCHEDULER_ALWAYS
    | {"invert_sigmas": False, "stochastic_sampling": False},
}
# Values that diffusers takes for settings left out, if they are others than these.
_SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {
        "prediction_type": "epsilon",
        "use_flow_sigmas": False,
    },
    "FlowMatchEulerDiscreteScheduler": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """The sampler that a folder names for its model.

    Attributes:
      solver: UniPC of order 2, or Euler steps.
      grid: Noise levels of Wan's own code, or of diffusers.
      shift: Shift of the noise levels. The original says 5, or 3 for videos from an
        image at 480p; its folders do not hold it, and it is 5 then.
    """

    solver: Literal["unipc", "euler"] = "unipc"
    grid: Literal["wan", "diffusers"] = "wan"
    shift: float = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanFolder:
    """A folder of a published model, checked for being complete.

    Attributes:
      path: The folder.
      layout: Published layout.
      task: Whether videos are made from text ("t2v") or from an image too ("i2v").
      parts: The parts that it was checked for.
      transformer_config: The transformer's `config.json` as it is.
    """

    path: Path
    layout: LayoutName
    task: Literal["t2v", "i2v"]
    parts: frozenset[Part]
    transformer_config: Mapping[str, Any]

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, parts: Collection[Part] = ALL_PARTS
    ) -> "WanFolder":
        """Looks at a folder without reading weights.

        Args:
          path: The folder.
          parts: Parts that must be there. An image encoder is not asked for in a
            text-to-video model, nor a scheduler in the original layout.

        Raises:
          CheckpointError: The path is no folder of a Wan model, files are missing
            (all are named), or its `config.json` is damaged.
          ValueError: There is no such part.
        """
        if unknown := sorted(set(parts) - set(ALL_PARTS)):
            raise ValueError(f"parts={unknown} must be among {ALL_PARTS}")
        path = Path(path)
        layout = find_layout(path)
        if layout is None:
            raise CheckpointError(
                f"{path} is no folder of a Wan model; "
                + (describe_neighbour(path) or f"expected {describe_layouts()}")
            )
        _check_one_transformer(path)
        config: dict[str, Any] = {}
        file = path / LAYOUTS[layout]["transformer"][0]
        if file.is_file():
            config = _read_json(file)
        task = _task_of(config)
        wanted = {part for part in parts if part in LAYOUTS[layout]}
        if task == "t2v":
            wanted.discard("image_encoder")
        needed = {part: LAYOUTS[layout][part] for part in ALL_PARTS if part in wanted}
        # The transformer's configuration tells what the model is.
        needed.setdefault("transformer", LAYOUTS[layout]["transformer"][:1])
        missing = [
            f"{pattern} ({part})"
            for part, patterns in needed.items()
            for pattern in patterns
            if not find_visible(path, pattern)
        ]
        if missing and (neighbour := describe_neighbour(path)):
            raise CheckpointError(f"{path} is not a whole Wan model; {neighbour}")
        if missing:
            raise CheckpointError(
                f"{path}, a Wan model in the {layout} layout, lacks "
                f"{', '.join(missing)}; expected {describe_layouts({layout: needed})}"
            )
        return cls(
            path=path,
            layout=layout,
            task=task,
            parts=frozenset(wanted),
            transformer_config=config,
        )

    def config(self, **changes: Any) -> WanConfig:
        """Reads the transformer's sizes; `changes` as in `WanConfig.from_dict`.

        Raises:
          CheckpointError: This port lacks what `config.json` asks for.
        """
        try:
            return WanConfig.from_dict(self.transformer_config, **changes)
        except (ValueError, TypeError) as error:
            file = self.path / LAYOUTS[self.layout]["transformer"][0]
            raise CheckpointError(f"{file}: {error}") from error

    def weights(self, part: Part) -> Mapping[str, Any]:
        """Returns a part's arrays by key, each read from disk when it is used.

        Raises:
          CheckpointError: A file is missing or damaged, or the part has no weights.
        """
        if part not in LAYOUTS[self.layout] or part in ("tokenizer", "scheduler"):
            raise CheckpointError(f"{part=} has no weights in the {self.layout} layout")
        path, stem = self.path, None
        if self.layout == "diffusers":
            path /= part
        elif part == "transformer":
            stem = "diffusion_pytorch_model"
        else:
            path /= LAYOUTS["original"][part][0]
        return open_part_weights(part, path, stem=stem)

    def weight_files(self, part: Part) -> list[Path]:
        """Returns the files of a part's weights; none for a part that has none."""
        patterns = LAYOUTS[self.layout].get(part, ())
        return sorted(
            file
            for pattern in patterns
            if not pattern.endswith(".json")
            for file in find_visible(self.path, pattern)
        )

    def part_config(self, part: Part) -> dict[str, Any] | None:
        """Reads a part's `config.json`.

        The original layout has one for the transformer only: its other parts are of
        one size in every Wan2.1 model, and the result is None.

        Raises:
          CheckpointError: The file is missing or damaged.
        """
        patterns = LAYOUTS[self.layout].get(part, ("",))
        if not patterns[0].endswith(".json"):
            return None
        return _read_json(self.path / patterns[0])

    def read_config[Config](
        self,
        part: Part,
        read: Callable[..., Config],
        default: Callable[..., Config],
        **changes: Any,
    ) -> Config:
        """Reads a part's sizes.

        Args:
          part: Any but the transformer, which has `config`.
          read: Makes them from the part's `config.json`.
          default: Makes them if the layout has no such file, or the part was not
            checked for.
          **changes: Arguments that both are given, such as `dtype`.

        Raises:
          CheckpointError: The file is missing or damaged, or of another model; it is
            named.
        """
        stored = self.part_config(part) if part in self.parts else None
        if stored is None:
            return default(**changes)
        try:
            return read(stored, **changes)
        except (ValueError, TypeError) as error:
            file = self.path / LAYOUTS[self.layout][part][0]
            raise CheckpointError(f"{file}: {error}") from error

    @property
    def tokenizer(self) -> Path:
        """The folder of the text encoder's tokenizer."""
        return (self.path / LAYOUTS[self.layout]["tokenizer"][0]).parent

    def scheduler(self) -> SchedulerSettings:
        """Reads how the model is sampled.

        Raises:
          CheckpointError: The file is missing or damaged, or asks for what no solver
            here computes; all such settings are named.
        """
        stored = self.part_config("scheduler")
        if stored is None:
            return SchedulerSettings()
        file = self.path / LAYOUTS[self.layout]["scheduler"][0]
        name = stored.get("_class_name")
        if name not in _SCHEDULER_FIXED:
            raise CheckpointError(
                f"{file} has _class_name={name!r}; expected one of "
                f"{list(_SCHEDULER_FIXED)}"
            )
        fixed, stored = _SCHEDULER_FIXED[name], _SCHEDULER_DEFAULTS[name] | stored
        if other := {
            key: stored[key]
            for key in fixed
            if stored.get(key, fixed[key]) != fixed[key]
        }:
            needed = {key: fixed[key] for key in other}
            raise CheckpointError(f"{file} asks for {other}; this port has {needed}")
        is_unipc = name == "UniPCMultistepScheduler"
        shift = stored.get("flow_shift" if is_unipc else "shift", 1.0)
        if not isinstance(shift, int | float) or not 0.0 < shift < float("inf"):
            raise CheckpointError(f"{file} has {shift=}; expected a positive number")
        return SchedulerSettings(
            solver="unipc" if is_unipc else "euler",
            grid="diffusers",
            shift=float(shift),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanParts:
    """The parts of a pipeline, opened but not loaded.

    Weights are left on disk, as arrays by key that are read when they are used. A part
    may be loaded to another device, freed before the next is, or not loaded.

    Attributes:
      folder: Folder that everything comes from.
      config: The transformer's configuration.
      weights: The transformer's weights, adapters included.
      scheduler: The sampler that the model is published with.
      text_encoder: UMT5's weights; None if they were not asked for.
      vae: The video autoencoder's weights; None if they were not asked for.
      image_encoder: CLIP's weights; None if they were not asked for, or the model
        takes no image.
      tokenizer: Folder of the text encoder's tokenizer; None if not asked for.
    """

    folder: WanFolder
    config: WanConfig
    weights: Mapping[str, Any]
    scheduler: SchedulerSettings
    text_encoder: Mapping[str, Any] | None
    vae: Mapping[str, Any] | None
    image_encoder: Mapping[str, Any] | None
    tokenizer: Path | None

    def load_transformer(self) -> WanTransformer:
        """Loads the transformer onto JAX's default device.

        Raises:
          CheckpointError: The weights are damaged or do not fit `config.json`; every
            key at fault is listed.
        """
        try:
            return load_wan_transformer(self.weights, self.config)
        except ConversionError as error:
            folder = self.folder.weight_files("transformer")[0].parent
            raise CheckpointError(
                f"the transformer in {folder} does not fit its config.json: {error}"
            ) from error


def open_wan_parts(
    name: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    parts: Collection[Part] = ALL_PARTS,
    loras: Iterable[tuple[str | os.PathLike, float]] = (),
    lora_strict: bool = True,
    revision: str | None = None,
    **changes: Any,
) -> WanParts:
    """Opens a published model: everything is checked but the weights' values.

    Args:
      name: The model's folder, or its repository on the hub, such as
        "Wan-AI/Wan2.1-T2V-14B"; of a repository only `parts` are fetched.
      dtype: The transformer computes in it.
      param_dtype: Its weights are stored in it, but for the few that it computes
        with in float32 (`models.wan.convert.FLOAT32`); `dtype` if None.
      parts: Parts that are needed; not the text encoder, say, if embeddings have
        been made before. The transformer always is.
      loras: Adapters to merge, each a `.safetensors` file and its strength.
      lora_strict: Whether parts of adapters that mean nothing to this model are
        refused; else they are skipped with a warning.
      revision: Branch, tag or commit of a repository.
      **changes: Other fields of `WanConfig` to set, such as `tile`.

    Returns:
      The parts; nothing is in memory yet.

    Raises:
      CheckpointError: The model cannot be found, is incomplete, damaged, or of a
        kind this port lacks; or an adapter is damaged.
      ConversionError: An adapter does not fit.
      ImportError: The model is on the hub, and `huggingface_hub` is not installed.
    """
    parts = {*parts, "transformer"}
    path = find_checkpoint(name, patterns=hub_patterns(parts), revision=revision)
    folder = WanFolder.open(path, parts=parts)
    changes |= {"dtype": dtype, "param_dtype": param_dtype or dtype}
    config = folder.config(**changes)

    def weights_of(part: Part) -> Mapping[str, Any] | None:
        return folder.weights(part) if part in folder.parts else None

    weights = folder.weights("transformer")
    for lora, scale in loras:
        weights = merge_lora(
            weights,
            lora,
            lora_names(weights),
            scale=scale,
            strict=lora_strict,
            features=LORA_FEATURES,
        )
    return WanParts(
        folder=folder,
        config=config,
        weights=weights,
        scheduler=folder.scheduler() if "scheduler" in parts else SchedulerSettings(),
        text_encoder=weights_of("text_encoder"),
        vae=weights_of("vae"),
        image_encoder=weights_of("image_encoder"),
        tokenizer=folder.tokenizer if "tokenizer" in parts else None,
    )


def _check_one_transformer(path: Path) -> None:
    """Raises for Wan2.2's pairs: one alone would load, and make poor videos."""
    index = path / "model_index.json"
    names = ("high_noise_model", "low_noise_model", "transformer_2")
    pair = [name for name in names if (path / name).is_dir()]
    if index.is_file() and any(_read_json(index).get("transformer_2") or ()):
        pair.append(f"transformer_2 in {index.name}")
    if pair:
        raise CheckpointError(
            f"{path} has {', '.join(pair)}: Wan2.2's models with a transformer for "
            "high noise and one for low are not supported; expected a model with one"
        )


def _task_of(config: Mapping[str, Any]) -> Literal["t2v", "i2v"]:
    from_image = (
        config.get("model_type") == "i2v" or config.get("image_dim") is not None
    )
    return "i2v" if from_image else "t2v"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content
