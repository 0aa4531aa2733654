"""A transformer in one file, without a configuration: its shapes tell which model."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from models.checkpoints.conversion import ConversionError, check_parameters
from models.checkpoints.listing import list_names
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.rules import Lookup
from models.diffusion.folders.layouts import LayoutName
from models.wan.config import WanConfig
from models.wan.convert import (
    RULES,
    STACKED,
    detect_layout,
    open_transformer_weights,
)
from models.wan.transformer import WanTransformer

# The only models whose heads are known: shapes do not tell how wide a head is.
_KNOWN: dict[str, Callable[..., WanConfig]] = {
    "Wan2.1-T2V-1.3B": lambda **changes: WanConfig.t2v_1_3b(**changes),
    "Wan2.1-T2V-14B": lambda **changes: WanConfig.t2v_14b(**changes),
    "Wan2.1-I2V-14B": lambda **changes: WanConfig.i2v_14b(**changes),
    "Wan2.2-TI2V-5B": lambda **changes: WanConfig.ti2v_5b(**changes),
}
# Wan2.2's pairs have the shapes of Wan2.1, and one alone would make poor videos.
_PAIR = re.compile(r"wan[-_. ]?2[._]2|(high|low)[-_ ]?noise", re.IGNORECASE)
# Parts of keys that tell of models with more than this port has.
_OTHERS = {
    "vace": "VACE, which edits videos, is not supported",
    "img_emb.emb_pos": "models of videos between two images are not supported",
    "image_embedder.pos_embed": "models of videos between two images are not supported",
    "lora_": "it is an adapter, which --lora merges into a model",
    "gguf": "GGUF is not read",
}
_LAYER = re.compile(r"blocks\.(\d+)\.")
_CONDITIONS = "condition_embedder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerFile:
    """A file that holds a known transformer, whole.

    Attributes:
      path: The file.
      model: Name of the model.
      config: Sizes of the model, and how to run it.
      weights: Arrays by key, each read when it is used.
    """

    path: Path
    model: str
    config: WanConfig
    weights: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, **changes: Any) -> "TransformerFile":
        """Finds out what a file holds, without reading weights.

        Args:
          path: A `.safetensors` file.
          **changes: Fields of `WanConfig` to set, such as `dtype`.

        Raises:
          CheckpointError: The file is damaged, or holds no transformer that is known;
            says which is nearest, and in what it differs.
        """
        weights = open_transformer_weights(path)
        try:
            layout = detect_layout(weights)
        except ConversionError as error:
            raise CheckpointError(
                f"{path} holds no Wan transformer{_explain(weights)}: {error}"
            ) from error
        model, config = _find_model(path, weights, layout)
        if not config.holds_first_frame and _PAIR.search(path.name):
            raise CheckpointError(
                f"{path} is named as one of Wan2.2's pairs of transformers, for high "
                "noise and for low; expected a folder with both"
            )
        try:
            check_parameters(
                lambda: WanTransformer(config, rngs=nnx.Rngs(0)),
                weights,
                RULES[layout],
                stacked=STACKED,
            )
        except ConversionError as error:
            raise CheckpointError(
                f"{path} is not {model}, which its sizes are those of"
                f"{_explain(weights)}: {error}"
            ) from error
        config = dataclasses.replace(config, **changes)
        return cls(path=path, model=model, config=config, weights=weights)


def is_transformer_file(path: Path) -> bool:
    """Returns whether a path may be a transformer's file, by its name alone."""
    return path.is_file() and path.suffix.lower() == ".safetensors"


def _find_model(
    path: Path, weights: Mapping[str, Any], layout: LayoutName
) -> tuple[str, WanConfig]:
    """Returns the known model that has a file's sizes."""
    sizes = _sizes(path, weights, layout)
    known = {name: make() for name, make in _KNOWN.items()}
    differences = {
        name: [
            f"{field}={value!r} ({expected!r})"
            for field, value in sizes.items()
            if (expected := getattr(config, field)) != value
        ]
        for name, config in known.items()
    }
    # Of two as near, the one that starts from what the file does.
    nearest = min(
        differences,
        key=lambda name: (
            len(differences[name]),
            known[name].in_channels != sizes["in_channels"],
        ),
    )
    if differences[nearest]:
        raise CheckpointError(
            f"{path} has the sizes of no model that is known: from {nearest} it "
            f"differs in {', '.join(differences[nearest])}{_explain(weights)}; "
            f"expected one of {', '.join(known)}, or a folder with a config.json"
        )
    return nearest, known[nearest]


def _sizes(
    path: Path, weights: Mapping[str, Any], layout: LayoutName
) -> dict[str, Any]:
    """Returns the fields of `WanConfig` that shapes tell."""
    lookup = Lookup(RULES[layout])
    shapes = {
        paths[0]: tuple(weights[key].shape)
        for key in weights
        for paths, _ in lookup.of_key(key)
    }
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    ranks = {
        "patch_embedding.kernel": 5,
        f"{_CONDITIONS}.time_embedder.linear_1.kernel": 2,
        f"{_CONDITIONS}.text_embedder.linear_1.kernel": 2,
        "blocks.0.ffn.linear_1.kernel": 2,
        "proj_out.kernel": 2,
    }
    if wrong := [
        name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank
    ]:
        raise CheckpointError(
            f"{path} lacks what tells its sizes, or has it in another shape: "
            f"{list_names(wrong)}{_explain(weights)}"
        )
    patch, time, text, ffn, out = map(shapes.__getitem__, ranks)
    dim, in_channels, *patch_size = patch
    norm = shapes.get(f"{_CONDITIONS}.image_embedder.norm1.scale")
    patch_volume = patch_size[0] * patch_size[1] * patch_size[2]
    return {
        "dim": dim,
        "num_layers": max(layers) + 1,
        "ffn_dim": ffn[0],
        "in_channels": in_channels,
        "out_channels": out[0] // patch_volume if patch_volume else 0,
        "patch_size": tuple(patch_size),
        "freq_dim": time[1],
        "text_dim": text[1],
        "image_dim": None if norm is None else norm[0],
    }


def _explain(weights: Mapping[str, Any]) -> str:
    """Says what a file of another kind is, if its keys tell."""
    for sign, reason in _OTHERS.items():
        if any(sign in key for key in weights):
            return f" ({reason})"
    return ""
