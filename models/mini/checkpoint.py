"""The folder that a small model is stored in: written by training, read by pipelines.

config.json                  sizes of transformer and codec, and this format's name
transformer*.safetensors     diffusers' keys, bfloat16, perhaps in shards
text_embedding.safetensors   `TextEmbedding`, keys are attribute paths, bfloat16
codec.safetensors            `models.mini.autoencoder`, diffusers' keys, float16
vocabulary.json              `Vocabulary`
ratios.json                  for MagCache, where `draft-video calibrate` was run
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.checkpoints.files import find_visible
from models.checkpoints.safetensors_io import CheckpointError
from models.diffusion.interfaces import TextContext
from models.mini.autoencoder import (
    describe_autoencoder,
    load_autoencoder,
    read_autoencoder_config,
    save_autoencoder,
)
from models.mini.text import TextEmbedding, Vocabulary
from models.wan.config import WanConfig
from models.wan.convert import load_wan_transformer, save_wan_transformer
from models.wan.layouts import LAYOUTS
from models.wan.transformer import WanTransformer
from models.wan.vae.codec import WanVAECodec
from models.wan.vae.config import WanVAEConfig

SHIPPED = Path(__file__).parent / "weights"
FORMAT = "draft-video-1"
FILES = (
    "config.json",
    "text_embedding.safetensors",
    "codec.safetensors",
    "vocabulary.json",
)
RATIOS = "ratios.json"
SMALL_MODEL = (
    "a folder with "
    + ", ".join(FILES)
    + " and transformer*.safetensors, as training writes it (models/mini/weights)"
)


@dataclasses.dataclass(frozen=True)
class MiniTextEncoder:
    """The text encoder of a small model: prompts to context rows."""

    vocabulary: Vocabulary
    embedding: TextEmbedding

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the context of the prompts; its real rows are those of words."""
        ids, counts, _ = self.vocabulary.encode(prompts)
        lengths = jnp.asarray(counts)
        return TextContext(self.embedding(jnp.asarray(ids), lengths), lengths)

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns the words of the prompt that training did not contain.

        A prompt of punctuation alone has no words, and is returned whole.
        """
        _, (length,), (unknown,) = self.vocabulary.encode([prompt])
        return unknown if length or not prompt.strip() else [prompt.strip()]

    def describe_vocabulary(self) -> str:
        """Returns a sentence with the words that training contained."""
        return "it knows: " + " ".join(self.vocabulary.words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniCheckpoint:
    """A small model in memory.

    Attributes:
      transformer: The transformer, whose `config` says the sizes of all parts.
      text_embedding: Makes the context of cross-attention.
      vocabulary: Gives words their ids.
      codec: Videos to latents and back.
    """

    transformer: WanTransformer
    text_embedding: TextEmbedding
    vocabulary: Vocabulary
    codec: WanVAECodec

    @classmethod
    def load(cls, path: Path | str | None = None, **changes: Any) -> "MiniCheckpoint":
        """Reads a checkpoint folder.

        Args:
          path: The folder; the model that ships if None.
          **changes: Fields of `WanConfig` to set, such as `dtype`.

        Raises:
          CheckpointError: The folder is missing, incomplete, damaged, or of another
            format, such as a published Wan checkpoint.
        """
        folder = SHIPPED if path is None else Path(path)
        config = read_config(folder, **changes)
        with _naming_damage(folder):
            vocabulary = Vocabulary.load(folder / "vocabulary.json")
        codec = read_codec(folder, config)
        try:
            transformer = load_wan_transformer(folder, config, stem="transformer")
        except ConversionError as error:
            raise CheckpointError(
                f"the transformer of {folder} does not fit its config.json: {error}"
            ) from error
        return cls(
            transformer=transformer,
            text_embedding=_load_embedding(folder, vocabulary, config),
            vocabulary=vocabulary,
            codec=codec,
        )

    def save(
        self, folder: Path | str, *, max_shard_bytes: int | None = 15 * 2**20
    ) -> None:
        """Writes a checkpoint folder; `load` reads it.

        Weights become 16-bit numbers. Ratios of weights that were there before go.

        Args:
          folder: Made if it does not exist.
          max_shard_bytes: Most bytes of a file of the transformer's weights.
        """
        folder = Path(folder)
        save_wan_transformer(
            self.transformer,
            folder,
            stem="transformer",
            max_shard_bytes=max_shard_bytes,
        )
        state = nnx.to_flat_state(nnx.state(self.text_embedding))
        tensors = {
            ".".join(map(str, path)): np.asarray(leaf[...].astype(jnp.bfloat16))
            for path, leaf in state
        }
        safetensors.numpy.save_file(tensors, folder / "text_embedding.safetensors")
        self.vocabulary.save(folder / "vocabulary.json")
        config = self.transformer.config
        stored = {
            "format": FORMAT,
            "transformer": config.to_dict(),
            "text_length": config.text_length,
            "tile": list(config.tile),
            "codec": describe_autoencoder(self.codec.model.config),
        }
        save_autoencoder(folder / "codec.safetensors", self.codec.model)
        (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
        (folder / RATIOS).unlink(missing_ok=True)


def read_config(folder: Path, **changes: Any) -> WanConfig:
    """Reads the transformer's sizes; `changes` are fields of `WanConfig` to set.

    Raises:
      CheckpointError: The folder is missing, incomplete, damaged, or of another
        format.
    """
    stored = _read_stored(folder)
    with _naming_damage(folder):
        return WanConfig.from_dict(
            stored["transformer"],
            text_length=stored["text_length"],
            tile=tuple(stored["tile"]),
            **changes,
        )


def read_codec(folder: Path, config: WanConfig) -> WanVAECodec:
    """Reads the codec, which must have the transformer's channels.

    Raises:
      CheckpointError: It is damaged, or has other sizes.
    """
    sizes = read_codec_sizes(folder, config)
    try:
        return load_autoencoder(folder / "codec.safetensors", sizes)
    except ConversionError as error:
        raise CheckpointError(
            f"the codec of {folder} does not fit its config.json: {error}"
        ) from error


def read_codec_sizes(folder: Path, config: WanConfig) -> WanVAEConfig:
    """Reads the sizes of the codec, which must have the transformer's channels.

    Raises:
      CheckpointError: They are damaged, or others.
    """
    stored = _read_stored(folder)
    with _naming_damage(folder):
        sizes = read_autoencoder_config(stored["codec"])
    if sizes.latent_channels != config.in_channels:
        raise CheckpointError(
            f"{folder / 'config.json'} has a codec of {sizes.latent_channels} latent "
            f"channels; the transformer needs {config.in_channels}"
        )
    return sizes


def _read_stored(folder: Path) -> dict[str, Any]:
    """Reads config.json of a folder of this format."""
    _check_folder(folder)
    stored = read_json(folder / "config.json")
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'config.json'} has format={stored.get('format')!r}; "
            f"expected {FORMAT!r}"
        )
    return stored


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Says which folder a file was of that cannot be read."""
    try:
        yield
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error!r}") from error


def is_small_model(folder: Path) -> bool:
    """Returns whether a folder holds any file of a small model.

    `config.json` does not count: many models have one.
    """
    patterns = (*FILES[1:], "transformer*.safetensors")
    return any(find_visible(folder, pattern) for pattern in patterns)


def _check_folder(folder: Path) -> None:
    """Raises if files are missing or of another model; reads nothing."""
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder} is not a folder; expected {SMALL_MODEL}"
        )
    present = {file.name for file in folder.iterdir()}
    missing = [name for name in FILES if name not in present]
    if not find_visible(folder, "transformer*.safetensors"):
        missing.append("transformer*.safetensors")
    if not missing:
        return
    layout = LAYOUTS.find(folder)
    if layout is not None:
        raise CheckpointError(
            f"checkpoint {folder} is a published Wan model in the {layout} layout, "
            f"which models.wan.checkpoint loads; expected {SMALL_MODEL}"
        )
    raise CheckpointError(
        f"checkpoint {folder} lacks {missing}; expected {SMALL_MODEL}"
    )


def _load_embedding(
    folder: Path, vocabulary: Vocabulary, config: WanConfig
) -> TextEmbedding:
    embedding = nnx.eval_shape(
        lambda: TextEmbedding(
            vocabulary.size, vocabulary.max_length, config.text_dim, rngs=nnx.Rngs(0)
        )
    )
    structure, parameters = nnx.split(embedding)
    flat = dict(nnx.to_flat_state(parameters))
    file = folder / "text_embedding.safetensors"
    try:
        tensors = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    expected = {".".join(map(str, path)): leaf.shape for path, leaf in flat.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise CheckpointError(f"{file} does not fit config and vocabulary: {wrong}")
    for path, leaf in flat.items():
        tensor = jnp.asarray(tensors[".".join(map(str, path))], jnp.float32)
        flat[path] = leaf.replace(tensor)
    return nnx.merge(structure, nnx.from_flat_state(flat))


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CheckpointError: The file holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content
